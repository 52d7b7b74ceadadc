"""Rules for the batch axis that several operations share.

A rule is given a call and the symbol of the batch size. The rows of the call's inputs are known, and one of them at
least has some. The rule gives where the batch axis of the result is (a tuple for several results), or raises `Mixed`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ..ir.graph import Rows, expression, shape_of

aten = torch.ops.aten


class Mixed(Exception):
    """An operation lets one row influence another."""


CONTRACTED = "contracted"  # a sum over rows: what a gradient of something without rows is made of
Axis = Rows | None | str
Rule = Callable[[fx.Node, sympy.Symbol], Axis | tuple[Axis, ...]]


def has(size: Any, batch: sympy.Symbol) -> bool:
    return not isinstance(size, int) and batch in size.free_symbols


def is_inner(size: sympy.Expr, batch: sympy.Symbol) -> bool:
    """Whether it can be the size of what stands inside the batch: a number, or a size that other inputs have."""
    return bool(size.is_integer) and not has(size, batch) and size.is_polynomial(*size.free_symbols)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


def aligned(nodes: list[fx.Node], rank: int) -> Rows:
    """The common batch axis of values that are broadcast against each other."""
    found: Any = None
    for n in nodes:
        rows = n.meta["rows"]
        if rows is None:
            continue
        here = Rows(rows.dim + rank - len(shape_of(n)), rows.outer, rows.inner)
        if found is not None and here != found:
            raise Mixed("combines every row with every other")
        found = here
    return found


def pointwise(node: fx.Node, batch: sympy.Symbol) -> Axis | tuple[Axis, ...]:
    """Several results (frexp) have one shape."""
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return aligned(tensor_inputs(node), value.dim())
    rows = aligned(tensor_inputs(node), value[0].dim())
    return tuple(rows for _ in value)


def made_up(node: fx.Node, batch: sympy.Symbol) -> Axis:
    """No input has rows: a value made from sizes, e.g. zeros(B, H), or one without a batch."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        tensors = [v for v in value if isinstance(v, Tensor)] if isinstance(value, (list, tuple)) else []
        if any(has(expression(s), batch) for t in tensors for s in t.shape):
            raise Mixed("makes several values of the batch's size")
        return None
    dims = [d for d, s in enumerate(shape_of(node)) if has(s, batch)]
    if not dims:
        return None
    size = shape_of(node)[dims[0]]
    if len(dims) > 1 or node.target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        raise Mixed("numbers the rows of the batch")
    factor = sympy.simplify(size / batch)
    if not is_inner(factor, batch):
        raise Mixed("has an axis that is not a multiple of the batch")
    return Rows(dims[0], 1, int(factor) if factor.is_number else factor)


def axes_of(node: fx.Node, position: int = 1, name: str = "dim") -> list[int]:
    dims = node.args[position] if position < len(node.args) else node.kwargs.get(name)
    rank = len(shape_of(node.args[0]))
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank))
    return [d % max(rank, 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


def keepdim(node: fx.Node, position: int) -> bool:
    return bool(node.args[position] if position < len(node.args) else node.kwargs.get("keepdim", False))


def reduction(linear: bool, dim_at: int = 1, keep_at: int = 2, results: int = 1) -> Rule:
    def rule(node: fx.Node, batch: sympy.Symbol) -> Axis | tuple[Axis, ...]:
        rows = node.args[0].meta["rows"]
        dims = axes_of(node, dim_at)
        if rows.dim in dims:
            if not linear:
                raise Mixed("reduces over the rows of the batch")
            return CONTRACTED
        if not keepdim(node, keep_at):
            rows = Rows(rows.dim - sum(d < rows.dim for d in dims), rows.outer, rows.inner)
        return rows if results == 1 else (rows,) * results

    return rule


def along(dim_at: int = 1, name: str = "dim", results: int = 1, default: int | None = None) -> Rule:
    """Operations along one axis that keep the shape (softmax, cumsum, sort, ...)."""

    def rule(node: fx.Node, batch: sympy.Symbol) -> Axis | tuple[Axis, ...]:
        operands = [n for n in tensor_inputs(node) if n.meta["rows"] is not None]
        rank = len(shape_of(operands[0]))
        rows = aligned(operands, rank)
        dims: Any = node.args[dim_at] if dim_at < len(node.args) else node.kwargs.get(name, default)
        if dims is None or (name == "dims" and not dims):  # roll takes all axes as one then
            raise Mixed("works along all axes")
        for dim in dims if isinstance(dims, (list, tuple)) else [dims]:
            if dim % rank == rows.dim:
                raise Mixed("works along the rows of the batch")
        return rows if results == 1 else (rows,) * results

    return rule


def first_axis(also: tuple[int, ...] = (), least: int = 1) -> Rule:
    """Axis 0 is the batch of every operand that has rows; the results' too.

    also: operands that must have none.  least: axes of an operand with rows, as torch takes a value with fewer of them
    for a single row, and its axis 0 for another axis.
    """

    def rule(node: fx.Node, batch: sympy.Symbol) -> Axis | tuple[Axis, ...]:
        operands = [n for n in tensor_inputs(node) if n.meta["rows"] is not None]
        found = {n.meta["rows"] for n in operands}
        if len(found) != 1 or next(iter(found)).dim != 0 or any(len(shape_of(n)) < least for n in operands):
            raise Mixed("works across the rows of the batch")
        for position in also:
            operand = node.args[position] if position < len(node.args) else None
            if isinstance(operand, fx.Node) and operand.meta["rows"] is not None:
                raise Mixed("has weights with a batch axis")
        rows = found.pop()
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return rows
        return tuple(leading(rows, v, batch) for v in value)

    return rule


def leading(rows: Rows, value: Any, batch: sympy.Symbol) -> Axis:
    if not isinstance(value, Tensor) or value.dim() == 0 or not has(expression(value.shape[0]), batch):
        return None
    return rows
