"""The loop language: what one row of a loop computes at one step, as assignments over small dense arrays.

Rows of the batch are independent here, so every value is that of ONE row: an array of a fixed shape (a size
may be a symbol, e.g. the length of a memory), which is the captured graph's shape with B := 1. A program is
a list of statements over buffers:

    Store    target[i, j] = expression(i, j)
    Reduce   target[i] = sum over j of expression(i, j)       (or prod, amax, argmax, ...)
    Product  target[i, n] = sum over k of left[i, k] * right[k, n], `right` the same for all rows and steps
    Scan     target[i, j] = target[i, j-1] (+) expression(i, j)
    Scatter  target[.., index(i, j), ..] = expression(i, j)   (or +=), one after the other
    Routine  target[i, :] = a routine of kernels/ on the matrices i of some buffers

An expression is a tree of pointwise operations over loads; a load addresses its buffer by an affine function
of the statement's indices, so slices, transposes and broadcasts cost nothing. `interpret.py` gives the
language its meaning, `emit.py` prints it as C++.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

import sympy
import torch

Dim = Union[int, sympy.Expr]  # noqa: UP007  (a runtime value)


@dataclass(eq=False)
class Buffer:
    """An array per row (`rows`), or one for all rows.

    place: "step" and "once" are inputs; "prev" and "next" a state before and after the step; "kept" is wanted
    from every step; "temp" lives within one step.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[Dim, ...]
    place: str
    rows: bool = True
    index: int = -1
    order: tuple[int, ...] | None = (
        None  # axes from the outermost to the innermost in memory, where not 0, 1, 2...
    )

    @property
    def numel(self) -> Dim:
        return product(self.shape)


@dataclass(frozen=True, eq=False)
class Const:
    value: Any
    shape: tuple[Dim, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Load:
    """buffer[offset + sum(index * stride)]; `at` adds (index expression, stride) for gathers.

    Those indices are inside their axis: operations "inside" and "inside_from_end" have looked at them.
    """

    buffer: Buffer
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    offset: Dim
    at: tuple[tuple[Expr, Dim], ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return self.buffer.dtype


@dataclass(frozen=True, eq=False)
class Iota:
    """The number offset + sum(index * stride), as int64."""

    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    offset: Dim
    dtype: torch.dtype = torch.int64


@dataclass(frozen=True, eq=False)
class Op:
    name: str
    args: tuple[Expr, ...]
    shape: tuple[Dim, ...]
    dtype: torch.dtype


Expr = Union[Const, Load, Iota, Op]  # noqa: UP007


@dataclass(eq=False)
class _Statement:
    """`target` is where the result goes: a load's geometry, used for writing."""

    target: Load
    line: str = field(default="", kw_only=True)


@dataclass(eq=False)
class Store(_Statement):
    value: Expr


@dataclass(eq=False)
class Reduce(_Statement):
    """Reduces the last `axes` axes of `value`; `target.shape` has those before them."""

    kind: str
    value: Expr
    axes: int


@dataclass(eq=False)
class Product(_Statement):
    """(M, K) @ (K, N): `left` has such a matrix per row of the batch, `right` is one "once" input for all."""

    left: Load
    right: Load


@dataclass(eq=False)
class Scan(_Statement):
    """Runs along the last axis; kind "sum" or "prod"."""

    kind: str
    value: Expr


@dataclass(eq=False)
class Scatter(_Statement):
    """target has an `at` whose index expressions have the shape of `value`; later writes win."""

    value: Expr
    add: bool


@dataclass(eq=False)
class Routine(_Statement):
    """A routine of kernels/linalg.h or largest.h on small matrices, one after the other.

    operands: (*lead, rows, columns) each, `lead` being all axes of the target but its last, which holds the results of
    one matrix. options: numbers, known when a kernel is built, that choose the variant. `ops_linalg.py` and
    `ops_largest.py` have them.
    """

    name: str
    operands: tuple[Load, ...]
    options: tuple[int, ...]

    @property
    def lead(self) -> tuple[Dim, ...]:
        return self.target.shape[:-1]


Nested = Union[Store, Reduce, Scan, Scatter, Routine]  # noqa: UP007  (what loop nests do)
Statement = Union[Nested, Product]  # noqa: UP007


@dataclass(frozen=True)
class Check:
    """Indices that must be inside an axis of `size`: what took them (an ATen name), and where it stands.

    Of a division of whole numbers the index is 1 where the divisor is 0, else 0.
    Of "linalg.solve" and its like the index is the number of a column without a pivot: 0, where all have one.
    """

    operation: str
    size: Dim
    line: str


@dataclass(eq=False)
class RowProgram:
    """One step of one row: inputs, states and kept values in the order of the loop, and temporaries.

    ends: the state, one bool, of which `LoopProgram.ends` tells; None: there is none.
    """

    inputs: list[Buffer] = field(default_factory=list)
    prevs: list[Buffer] = field(default_factory=list)
    nexts: list[Buffer] = field(default_factory=list)
    kept: list[Buffer] = field(default_factory=list)
    temps: list[Buffer] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    make: Any = None  # the Expressions that built it
    symbols: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)  # operation "inside" numbers them from 1
    ends: Buffer | None = None


def product(sizes: Sequence[Dim]) -> Dim:
    total: Dim = 1
    for size in sizes:
        total = total * size
    return total if isinstance(total, int) else sympy.expand(total)


def at_least(shape: Sequence[Dim]) -> int:
    """Elements, with symbols counted as 64."""
    return int(product([size if isinstance(size, int) else 64 for size in shape]))


def same(a: Dim, b: Dim) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return sympy.expand(a - b) == 0


def contiguous(shape: Sequence[Dim]) -> tuple[Dim, ...]:
    """Row-major strides."""
    strides: list[Dim] = []
    step: Dim = 1
    for size in reversed(shape):
        strides.append(step)
        step = step * size
    return tuple(reversed(strides))


def whole(buffer: Buffer) -> Load:
    if buffer.order is None:
        return Load(buffer, tuple(buffer.shape), contiguous(buffer.shape), 0)
    stored = contiguous([buffer.shape[d] for d in buffer.order])
    strides = tuple(stored[buffer.order.index(d)] for d in range(len(buffer.shape)))
    return Load(buffer, tuple(buffer.shape), strides, 0)


def children(expr: Expr) -> tuple[Expr, ...]:
    if isinstance(expr, Op):
        return expr.args
    if isinstance(expr, Load):
        return tuple(index for index, _ in expr.at)
    return ()


def walk(expr: Expr, visit: Callable[[Expr], None], seen: set[int] | None = None) -> None:
    """Visits every node of an expression once, arguments first."""
    seen = set() if seen is None else seen
    if id(expr) in seen:
        return
    seen.add(id(expr))
    for child in children(expr):
        walk(child, visit, seen)
    visit(expr)


def expressions(statement: Statement) -> list[Expr]:
    """What a statement reads."""
    found: list[Expr] = [index for index, _ in statement.target.at]
    if isinstance(statement, Product):
        return [*found, statement.left, statement.right]
    if isinstance(statement, Routine):
        return [*found, *statement.operands]
    return [*found, statement.value]


def loads(statement: Statement) -> list[Load]:
    found: list[Load] = []
    seen: set[int] = set()
    for expr in expressions(statement):
        walk(expr, lambda e: found.append(e) if isinstance(e, Load) else None, seen)
    return found
