"""The table of lowerings, and what they work with: a loop on its way from ATen calls to the loop language.

Values stay expressions as long as that is free: a value is written to a buffer when more than one place reads it, or
where a statement needs an array (products, reductions, concatenations). `fuse.py` later drops the buffers that only
one nest reads.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import sympy
import torch
from torch import Tensor, fx

from ...compiler.ir.check import checking
from ...compiler.ir.graph import LoopProgram, Size, expression, line_of, op_name
from ...compiler.ops.table import is_view
from . import geometry
from .expressions import Expressions, is_contiguous, same_shape
from .halves import ROUNDED
from .language import (
    Buffer,
    Check,
    Const,
    Dim,
    Expr,
    Iota,
    Load,
    Op,
    Reduce,
    RowProgram,
    Statement,
    Store,
    product,
    same,
    whole,
)  # fmt: skip
from .reserved import reserved

DTYPES = (
    torch.float32, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip

_THE = {"cpu": "the CPU", "cuda": "CUDA devices here"}

Lowered = Any  # Expr or a tuple of them
TABLE: dict[str, Callable[[Lowering, fx.Node], Lowered]] = {}
_Rule = TypeVar("_Rule", bound="Callable[[Lowering, fx.Node], Lowered]")


def lowers(*names: str) -> Callable[[_Rule], _Rule]:
    """Registers the lowering of ATen packets."""

    def register(function: _Rule) -> _Rule:
        for name in names:
            TABLE[name] = function
        return function

    return register


class Unsupported(Exception):
    """The native loop can't take an operation; the message says why."""


class Lowering:
    """otherwise: what lowers an operation that is not in TABLE."""

    def __init__(
        self, loop: LoopProgram, otherwise: Callable[[Lowering, fx.Node], Lowered], device: str,
        halves: dict[fx.Node, torch.dtype],
    ):  # fmt: skip
        self.loop, self.otherwise, self.device, self.halves = loop, otherwise, device, halves
        self.program = RowProgram()
        self.make = Expressions()
        self.values: dict[fx.Node, Lowered] = {}
        self.reasons: list[tuple[str, str]] = []
        self.pieces: dict[int, list[Load]] = {}  # load of a concatenation -> where its parts were written
        self.routines: dict[tuple[Any, ...], Load] = {}  # what a routine works on -> where its results are
        self._symbols: set[sympy.Symbol] = set()
        self._taken: set[str] = set()
        self._line = ""
        self._name = "value"
        self.operation = ""

    # Sizes and arguments

    def size(self, value: Any) -> Dim:
        """An int, SymInt or Size with one row in the batch."""
        expr = expression(value)
        if isinstance(expr, int):
            return expr
        if self.loop.batch is not None:
            expr = expr.xreplace({self.loop.batch: sympy.Integer(1)})
        expr = sympy.expand(expr)
        if expr.is_Integer:
            return int(expr)
        if not expr.is_polynomial(*expr.free_symbols):
            raise Unsupported(f"a size is not a polynomial of the input sizes: {expr}")
        self._symbols |= expr.free_symbols
        return expr

    def sizes(self, values: Sequence[Any]) -> tuple[Dim, ...]:
        return tuple(self.size(v) for v in values)

    def shape(self, node: fx.Node) -> tuple[Dim, ...]:
        return self.sizes(node.meta["val"].shape)

    def value(self, node: fx.Node) -> Any:
        return self.values[node]

    def args(self, node: fx.Node) -> list[Any]:
        return [self.argument(a) for a in node.args]

    def argument(self, arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return self.value(arg)
        if isinstance(arg, (Size, torch.SymInt)):
            return self.size(arg)
        if isinstance(arg, (list, tuple)):
            return [self.argument(a) for a in arg]
        return arg

    def has_batch(self, node: fx.Node, dim: int) -> bool:
        """Whether an axis of a node holds the batch."""
        size = expression(node.meta["val"].shape[dim])
        return (
            self.loop.batch is not None and not isinstance(size, int) and self.loop.batch in size.free_symbols
        )

    def inner(self, node: fx.Node, dim: int) -> int:
        """A non-negative axis that must not be the batch's."""
        rank = node.meta["val"].dim()
        dim = dim % rank if rank else 0
        if rank and self.has_batch(node, dim):
            raise Unsupported(f"{self._name} works along the batch axis")
        return dim

    def inner_or_unit(self, node: fx.Node, dim: int) -> int:
        """As `inner`; reductions over everything of a value without axes are fine."""
        return self.inner(node, dim) if node.meta["val"].dim() else 0

    # Expressions

    def const(self, value: Any, dtype: torch.dtype, shape: tuple[Dim, ...] = ()) -> Const:
        return self.make.const(value, shape, dtype)

    def as_expr(self, value: Any, shape: tuple[Dim, ...], dtype: torch.dtype) -> Expr:
        """A value or Python number as an expression of a shape and dtype."""
        if isinstance(value, (Const, Load, Iota, Op)):
            return self.expand(self.make.cast(value, dtype), shape)
        return self.make.const(value, shape, dtype)

    def expand(self, expr: Expr, shape: tuple[Dim, ...]) -> Expr:
        """Broadcasts; what costs something is computed before it is repeated."""
        if same_shape(expr.shape, shape):
            return expr
        if isinstance(expr, Op) and not same(product(expr.shape), product(shape)):
            expr = self.realise(expr)
        return self.make.expand(expr, shape)

    def view(self, expr: Expr, change: geometry.View) -> Expr:
        try:
            return self.make.view(expr, change)
        except geometry.NotAffine:
            return self.make.view(self.copy(expr), change)

    def reshape(self, expr: Expr, shape: tuple[Dim, ...]) -> Expr:
        return expr if same_shape(expr.shape, shape) else self.view(expr, geometry.reshape(shape))

    # Statements

    def temp(self, shape: tuple[Dim, ...], dtype: torch.dtype, hint: str = "") -> Buffer:
        buffer = Buffer(self.unique(hint or self._name), dtype, tuple(shape), "temp")
        self.program.temps.append(buffer)
        return buffer

    def unique(self, hint: str) -> str:
        name = base = "".join(c if c.isalnum() and c.isascii() else "_" for c in hint).strip("_") or "value"
        if name[0].isdigit():
            name = base = f"v{name}"
        if name in reserved() or name.startswith(("lanes_", "__")):
            name = base = f"{name}_"
        count = 1
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name

    def emit(self, statement: Statement) -> None:
        statement.line = self._line
        self.program.statements.append(statement)

    def store(self, target: Load, value: Expr) -> None:
        self.emit(Store(target, value))

    def store_parts(self, target: Load, value: Expr) -> None:
        """A concatenation is stored part by part, each beside the computation of the part."""
        for part in self.pieces.get(id(value), ()):
            self.store(Load(target.buffer, part.shape, part.strides, part.offset), part)
        if id(value) not in self.pieces:
            self.store(target, value)

    def copy(self, expr: Expr, hint: str = "") -> Load:
        """The value in a contiguous buffer of its own."""
        target = whole(self.temp(expr.shape, expr.dtype, hint))
        self.store(target, expr)
        return self.make.load(target)

    def realise(self, expr: Expr, hint: str = "") -> Expr:
        """The value in a buffer, unless it is in one (or a constant)."""
        if isinstance(expr, (Const, Iota)) or (isinstance(expr, Load) and not expr.at):
            return expr
        return self.copy(expr, hint)

    def dense(self, expr: Expr) -> Load:
        """The value in a buffer, contiguous."""
        if isinstance(expr, Load) and not expr.at and is_contiguous(expr):
            return expr
        return self.copy(expr)

    def reduce(self, kind: str, value: Expr, axes: int, dtype: torch.dtype) -> Load:
        """Reduces the last `axes` axes."""
        shape = value.shape[: len(value.shape) - axes]
        target = whole(self.temp(shape, dtype))
        self.emit(Reduce(target, kind, value, axes))
        return self.make.load(target)

    def inside(self, index: Expr, size: Dim, operation: str = "", from_end: bool = False) -> Expr:
        """Indices (int64), none outside an axis of `size`: the kernel tells when it finds one, see `Check`.

        operation: what they are for, by default the operation at hand.  from_end: negative ones count from the end.
        """
        self.program.checks.append(Check(operation or self.operation, size, self._line))
        of_the_check = [self.const(n, torch.int64, index.shape) for n in (size, len(self.program.checks))]
        return self.make.op("inside_from_end" if from_end else "inside", [index, *of_the_check], torch.int64)

    # The walk

    def run(self) -> RowProgram:
        self._inputs()
        for node in self.loop.calls:
            self._call(node)
        if not self.reasons:
            self._results()
        if self.loop.ends is not None and not self.reasons:
            self.program.ends = self.program.prevs[self.loop.ends]
        self.program.make = self.make
        self.program.symbols = sorted(map(str, self._symbols))
        return self.program

    def _guarded(self, node: fx.Node, action: Callable[[], None]) -> None:
        self._line, self._name = line_of(node), node.name
        try:
            action()
        except Unsupported as error:
            self.reasons.append((str(error), line_of(node)))

    def _inputs(self) -> None:
        placed = {node: (index, "prev") for index, node in enumerate(self.loop.prevs)}
        for index, item in enumerate(self.loop.inputs):
            placed[item.node] = (index, item.kind)
        self.program.inputs = [None] * len(self.loop.inputs)  # type: ignore[list-item]
        self.program.prevs = [None] * len(self.loop.prevs)  # type: ignore[list-item]
        for node, (index, place) in placed.items():
            self._guarded(node, partial(self._input, node, index, place))

    def _input(self, node: fx.Node, index: int, place: str) -> None:
        self.check_dtype(node.meta["val"])
        rows = place == "prev" or self.loop.inputs[index].rows is not None
        hint = self.loop.names[index] if place == "prev" else self.loop.inputs[index].name
        held = node.meta["val"].dtype
        buffer = Buffer(self.unique(hint), self.halves.get(node, held), self.shape(node), place, rows, index)
        if not rows and place == "once":
            buffer.order = geometry.memory_order(node.meta["val"])
        (self.program.prevs if place == "prev" else self.program.inputs)[index] = buffer
        self.values[node] = self.make.cast(self.make.load(whole(buffer)), held)

    def check_dtype(self, value: Any) -> None:
        for tensor in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(tensor, Tensor) and tensor.dtype not in DTYPES:
                raise Unsupported(f"the native loop has no {str(tensor.dtype).removeprefix('torch.')}")
            if isinstance(tensor, Tensor) and tensor.device.type != self.device:  # a kernel takes addresses
                raise Unsupported(f"its values are on {tensor.device}, and native loops run on {_THE[self.device]}")

    def _call(self, node: fx.Node) -> None:
        if any(a not in self.values for a in node.all_input_nodes):
            return  # a reason is known already
        self._guarded(node, lambda: self.lower_node(node))

    def lower_node(self, node: fx.Node) -> None:
        self.check_dtype(node.meta["val"])
        if node.target is operator.getitem:
            value = self.value(node.args[0])[node.args[1]]
            self.values[node] = self._settle(node, value)
            return
        name = self.operation = op_name(node)
        self._check_batch(node, name)
        try:
            value = TABLE.get(name, self.otherwise)(self, node)
        except Unsupported:
            raise
        except Exception as error:  # whoever calls must not suffer where an argument was not thought of; tests do
            if not isinstance(error, geometry.NotAffine) and checking():
                raise
            raise Unsupported(f"no native form of {node.target}".replace(".default", "")) from None
        self._check_types(node, value)
        if isinstance(value, (tuple, list)):
            self.values[node] = list(value)
        else:
            self.values[node] = self._settle(node, value)

    def _check_types(self, node: fx.Node, value: Any) -> None:
        """One packet may hold operations that differ: view(dtype) is no view. What comes out tells."""
        given, wanted = value, node.meta["val"]
        pairs = zip(given, wanted) if isinstance(given, (tuple, list)) else [(given, wanted)]
        for found, like in pairs:
            if isinstance(found, (Const, Load, Iota, Op)) and isinstance(like, Tensor):
                if found.dtype != like.dtype or not same_shape(found.shape, self.sizes(like.shape)):
                    raise Unsupported(f"no native form of {node.target}".replace(".default", ""))

    def _check_batch(self, node: fx.Node, name: str) -> None:
        """A value without batch axis made of values with one mixes rows."""
        if self.loop.batch is None:
            return
        found = node.meta["val"]
        results = found if isinstance(found, (tuple, list)) else [found]
        mixed = all(not self._carries_batch(r) for r in results)
        if mixed and any(self._carries_batch(a.meta["val"]) for a in node.all_input_nodes):
            raise Unsupported(f"{name} takes several rows of the batch together")

    def _carries_batch(self, value: Any) -> bool:
        if isinstance(value, (tuple, list)):
            return any(map(self._carries_batch, value))
        if not isinstance(value, Tensor):
            return False
        return any(self.loop.batch in getattr(expression(s), "free_symbols", ()) for s in value.shape)

    def _settle(self, node: fx.Node, value: Expr) -> Expr:
        """Writes a value to a buffer where recomputing it would cost more."""
        if node in self.halves and not is_view(node):
            value = self.make.op(ROUNDED[self.halves[node]], [value], value.dtype)
        if isinstance(value, Op):
            self.make.names.setdefault(id(value), node.name)
            if self._uses(node) > 1:
                value = self.realise(value, node.name)
        return value

    def _uses(self, node: fx.Node, whole_size: Dim | None = None) -> float:
        """How often an element of a value is read, on average; views are looked through."""
        total = whole_size if whole_size is not None else product(self.shape(node))
        count = 0.0
        for user in node.users:
            if is_view(user) and not isinstance(user.meta["val"], (tuple, list)):
                count += self._uses(user, total)
            elif is_view(user):
                count += sum(self._uses(item, total) for item in user.users)
            else:
                count += _ratio(product(self.shape(node)), total)
        return count

    def _results(self) -> None:
        for index, (prev, node) in enumerate(zip(self.loop.prevs, self.loop.nexts)):
            self._guarded(node, partial(self._next, index, prev, node))
        for index, node in enumerate(self.loop.kept):
            self._guarded(node, partial(self._keep, index, node))

    def _next(self, index: int, prev: fx.Node, node: fx.Node) -> None:
        before = self.program.prevs[index]
        after = Buffer(self.unique(f"next_{before.name}"), before.dtype, before.shape, "next", True, index)
        self.program.nexts.append(after)
        if node is not prev:
            value = self.as_expr(self.values[node], before.shape, before.dtype)
            self.store_parts(whole(after), value)

    def _keep(self, index: int, node: fx.Node) -> None:
        value = self.values[node]
        if not isinstance(value, (Const, Load, Iota, Op)):
            raise Unsupported("a value with several results is wanted from every step")
        if self.loop.batch is not None and not self._carries_batch(node.meta["val"]):
            raise Unsupported("a value without batch axis is wanted from every step")
        dtype = self.halves.get(node, value.dtype)
        buffer = Buffer(self.unique(f"all_{node.name}"), dtype, self.shape(node), "kept", True, index)
        self.program.kept.append(buffer)
        self.store_parts(whole(buffer), self.make.cast(value, dtype))


def _ratio(part: Dim, total: Dim) -> float:
    if isinstance(part, int) and isinstance(total, int):
        return part / max(total, 1)
    ratio = sympy.cancel(sympy.sympify(part) / total)
    return float(ratio) if ratio.is_number else 1.0
