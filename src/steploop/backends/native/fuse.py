"""From a list of statements to phases: what a tile does one after the other at one step.

A phase first multiplies all rows of the tile with weights, then takes the rows one by one through loop nests.
A nest runs several statements with the same index space; a value that only its own nest reads stays in
registers. Arrays that only one phase touches need the space of one row and stay in the first cache.
Products of sequences with weights wait for no state: they are made early, for several steps at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeGuard, overload

from . import geometry
from .expressions import Expressions
from .language import (
    Buffer,
    Dim,
    Expr,
    Iota,
    Load,
    Nested,
    Product,
    Reduce,
    Routine,
    RowProgram,
    Scan,
    Scatter,
    Statement,
    Store,
    loads,
    same,
    walk,
)


@dataclass(eq=False)
class Nest:
    """Statements over one index space of `shape`. `reduced` trailing axes are summed away (0: none).

    across: the vectors run along the last axis that stays, not along the reduced one.
    serial: a scan, a scatter or a routine, one element (or matrix) after the other.
    """

    shape: tuple[Dim, ...]
    statements: list[Nested]
    reduced: int = 0
    across: bool = False
    serial: bool = False
    silent: set[int] = field(default_factory=set)  # ids of stores that stay in registers


@dataclass(eq=False)
class Phase:
    products: list[Product] = field(default_factory=list)
    nests: list[Nest] = field(default_factory=list)


@dataclass(eq=False)
class Fused:
    """`shared` temporaries hold all rows of a tile, `local` ones a single row; those of `early` products, of several
    steps."""

    program: RowProgram
    early: list[Product]
    phases: list[Phase]
    shared: list[Buffer]
    local: list[Buffer]
    in_place: set[int]  # indices of states whose next value may overwrite the previous one


def fuse(program: RowProgram) -> Fused:
    statements = _alive(program)
    for statement in statements:
        _squeeze(program.make, statement)
    statements = [_without_reduction(program.make, s) for s in statements]
    early = [s for s in statements if _is_early(s)]
    phases = _schedule([s for s in statements if not _is_early(s)])
    _silence(phases)
    shared, local = _scopes(program, phases, {id(p.target.buffer) for p in early})
    return Fused(program, early, phases, shared, local, _in_place(program, phases))


def _is_early(statement: Statement) -> TypeGuard[Product]:
    if not isinstance(statement, Product):
        return False
    left = statement.left
    return left.buffer.place == "step" and left.buffer.rows and left.buffer.order is None and same(left.shape[0], 1)


def _in_place(program: RowProgram, phases: list[Phase]) -> set[int]:
    """States that are only read before, or at the very place where, their next value is written."""
    order: list[tuple[int, Nest | None, Statement]] = []
    number = 0
    for phase in phases:
        groups: list[tuple[Nest | None, Sequence[Statement]]] = [(None, phase.products)]
        groups += [(nest, nest.statements) for nest in phase.nests]
        for group, statements in groups:
            number += 1
            order += [(number, group, statement) for statement in statements]
    return {
        index for index, (prev, after) in enumerate(zip(program.prevs, program.nexts))
        if _overwrites_nothing(order, prev, after)
    }  # fmt: skip


def _overwrites_nothing(order: list[tuple[int, Nest | None, Statement]], prev: Buffer, after: Buffer) -> bool:
    writes = [i for i, (_, _, statement) in enumerate(order) if statement.target.buffer is after]
    if len(writes) != 1:
        return False
    number, nest, store = order[writes[0]]
    seen: set[int] = set()  # loads that stand in a register when the store comes
    for i, (when, _, statement) in enumerate(order):
        for load in loads(statement):
            if load.buffer is not prev or when < number:
                continue
            late = i > writes[0] and id(load) not in seen
            if when > number or late or not _same_place(load, store, nest):
                return False
            seen.add(id(load))
    return True


def _same_place(load: Load, store: Statement, nest: Nest | None) -> bool:
    target = store.target
    if nest is None or load.at or nest.across or nest.serial or load.shape != target.shape:
        return False
    return load.strides == target.strides and same(load.offset, target.offset)


def _alive(program: RowProgram) -> list[Statement]:
    """The statements that something wanted depends on."""
    wanted = {id(b) for b in (*program.nexts, *program.kept)}
    alive = []
    for statement in reversed(program.statements):
        if id(statement.target.buffer) in wanted:
            alive.append(statement)
            wanted |= {id(load.buffer) for load in loads(statement)}
    return alive[::-1]


def _squeeze(make: Expressions, statement: Statement) -> None:
    """Drops axes of size 1, so that equal index spaces look equal."""
    if isinstance(statement, (Product, Routine)):
        return
    value = statement.value
    kept = [d for d, n in enumerate(value.shape) if not same(n, 1)]
    if isinstance(statement, Reduce):
        outer = len(value.shape) - statement.axes
        statement.axes = sum(d >= outer for d in kept)
        target = [d for d in kept if d < outer]
    elif isinstance(statement, Scan):
        last = len(value.shape) - 1
        kept = kept if last in kept else [*kept, last]
        target = kept
    else:
        target = kept
    statement.value = _pick(make, value, kept)
    statement.target = _pick(make, statement.target, target)


def _without_reduction(make: Expressions, statement: Statement) -> Statement:
    """A reduction of single elements is a store."""
    if not isinstance(statement, Reduce) or statement.axes:
        return statement
    value = statement.value
    if statement.kind.startswith("arg"):
        value = make.const(0, value.shape, statement.target.dtype)
    return Store(statement.target, value, line=statement.line)


@overload
def _pick(make: Expressions, expr: Load, axes: list[int]) -> Load: ...


@overload
def _pick(make: Expressions, expr: Expr, axes: list[int]) -> Expr: ...


def _pick(make: Expressions, expr: Expr, axes: list[int]) -> Expr:
    def change(shape: geometry.Shape, strides: geometry.Shape) -> tuple[geometry.Shape, geometry.Shape, Dim]:
        return tuple(shape[d] for d in axes), tuple(strides[d] for d in axes), 0

    return make.view(expr, change)


class _Placement:
    """Where the statements went so far."""

    def __init__(self) -> None:
        self.nests: list[tuple[int, Nest]] = []  # (level, nest) in order of execution within a level
        self.products: list[tuple[int, Product]] = []
        self.writers: dict[
            int, list[tuple[Statement, int, int]]
        ] = {}  # buffer -> (statement, level, nest or -1)

    def needs(self, statement: Statement) -> tuple[int, int]:
        """(level, first nest that may hold the statement)."""
        level, first = 0, 0
        for load in loads(statement):
            writers = self.writers.get(id(load.buffer), ())
            exact = [w for w in writers if isinstance(w[0], Store) and w[0].target is load]
            only = len(exact) == 1 and not any(isinstance(w[0], Scatter) for w in writers)
            for _, at, nest in exact if only else writers:
                level = max(level, at + (1 if isinstance(statement, Product) else 0))
                if nest >= 0:
                    first = max(first, nest if only else nest + 1)
        if isinstance(statement, Scatter):
            for _, at, nest in self.writers.get(id(statement.target.buffer), ()):
                level, first = max(level, at), max(first, nest + 1)
        return level, first

    def place(self, statement: Statement) -> None:
        level, first = self.needs(statement)
        if isinstance(statement, Product):
            self.products.append((level, statement))
            self._wrote(statement, level, -1)
            return
        number = self._join(statement, level, first)
        if number is None:
            number = len(self.nests)
            self.nests.append((level, _nest(statement)))
        self._wrote(statement, level, number)

    def _wrote(self, statement: Statement, level: int, nest: int) -> None:
        self.writers.setdefault(id(statement.target.buffer), []).append((statement, level, nest))

    def _join(self, statement: Nested, level: int, first: int) -> int | None:
        """Puts the statement into a nest with its index space."""
        if isinstance(statement, (Scan, Scatter, Routine)):
            return None
        wanted = _nest(statement)
        for number in range(first, len(self.nests)):
            at, nest = self.nests[number]
            if at == level and _agree(nest, wanted):
                nest.statements.append(statement)
                nest.reduced = max(nest.reduced, wanted.reduced)
                return number
        return None


def _schedule(statements: list[Statement]) -> list[Phase]:
    placement = _Placement()
    for statement in statements:
        placement.place(statement)
    levels = [level for level, _ in (*placement.nests, *placement.products)]
    phases = [Phase() for _ in range(max(levels, default=-1) + 1)]
    for level, product in placement.products:
        phases[level].products.append(product)
    for level, nest in placement.nests:
        phases[level].nests.append(nest)
    return phases


def _nest(statement: Nested) -> Nest:
    if isinstance(statement, Routine):
        return Nest(statement.lead, [statement], serial=True)
    shape = statement.value.shape
    if isinstance(statement, (Scan, Scatter)):
        return Nest(shape, [statement], serial=True)
    if not isinstance(statement, Reduce):
        return Nest(shape, [statement])
    return Nest(shape, [statement], statement.axes, across=_better_across(statement))


def _better_across(reduce: Reduce) -> bool:
    """Whether more loads run along the last axis that stays than along the reduced one."""
    outer = len(reduce.value.shape) - reduce.axes
    if not outer or not reduce.axes or reduce.kind.startswith("arg"):
        return False
    bad = [0, 0]

    def visit(expr: Expr) -> None:
        if isinstance(expr, (Load, Iota)):
            for choice, axis in enumerate((len(expr.shape) - 1, outer - 1)):
                bad[choice] += not (same(expr.strides[axis], 0) or same(expr.strides[axis], 1))

    walk(reduce.value, visit)
    return bad[1] < bad[0]


def _agree(nest: Nest, other: Nest) -> bool:
    if nest.serial or other.serial or nest.across != other.across:
        return False
    if nest.reduced and other.reduced and nest.reduced != other.reduced:
        return False
    if nest.across and (not other.reduced or nest.reduced != other.reduced):
        return False
    return len(nest.shape) == len(other.shape) and all(map(same, nest.shape, other.shape))


def _silence(phases: list[Phase]) -> None:
    """Marks stores whose value is only read by their own nest, at the same place."""
    readers: dict[int, list[tuple[Load, Nest | None]]] = {}
    for phase in phases:
        for product in phase.products:
            readers.setdefault(id(product.left.buffer), []).append((product.left, None))
        for nest in phase.nests:
            for statement in nest.statements:
                for load in loads(statement):
                    readers.setdefault(id(load.buffer), []).append((load, nest))
    writers = Counter(id(s.target.buffer) for p in phases for n in p.nests for s in n.statements)
    for phase in phases:
        for nest in phase.nests:
            for statement in nest.statements:
                target = statement.target
                if not isinstance(statement, Store) or target.buffer.place != "temp":
                    continue
                found = readers.get(id(target.buffer), [])
                if writers[id(target.buffer)] == 1 and all(
                    load is target and where is nest for load, where in found
                ):
                    nest.silent.add(id(statement))


def _scopes(program: RowProgram, phases: list[Phase], early: set[int]) -> tuple[list[Buffer], list[Buffer]]:
    """Which temporaries live across phases (or meet a product); early ones have a place of their own."""
    touched: dict[int, set[int]] = {}
    shared: set[int] = set()
    for number, phase in enumerate(phases):
        for product in phase.products:
            shared |= {id(product.target.buffer), id(product.left.buffer)}
        for nest in phase.nests:
            for statement in nest.statements:
                if id(statement) not in nest.silent:
                    touched.setdefault(id(statement.target.buffer), set()).add(number)
                for load in loads(statement):
                    touched.setdefault(id(load.buffer), set()).add(number)
    silent = {id(s.target.buffer) for p in phases for n in p.nests for s in n.statements if id(s) in n.silent}
    used = [b for b in program.temps if (id(b) in touched or id(b) in shared) and id(b) not in silent | early]
    wide = [b for b in used if id(b) in shared or len(touched[id(b)]) > 1]
    return wide, [b for b in used if b not in wide]
