"""Operations that move numbers and compute nothing: views, joins, parts, and what gradients of those are."""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from torch import fx

from ..ir.graph import Rows, shape_of
from .rules import Axis, Mixed, Rule, aligned, along, first_axis, has, is_inner
from .table import add

aten = torch.ops.aten


def _view(node: fx.Node, batch: sympy.Symbol) -> Axis:
    source, rows = shape_of(node.args[0]), node.args[0].meta["rows"]
    before = sympy.Integer(1)
    for size in source[: rows.dim]:
        before *= size
    outer = before * rows.outer  # the value as (outer, B, inner)
    passed = sympy.Integer(1)
    for dim, size in enumerate(shape_of(node)):
        if has(size, batch):
            # The axes before this one must be part of `outer`, and what is left over stands inside this axis.
            left = sympy.simplify(outer / passed)
            right = sympy.simplify(size / (left * batch))
            if left.is_integer and left.is_number and is_inner(right, batch):
                return Rows(dim, int(left), int(right) if right.is_number else right)
            raise Mixed("reshapes the batch together with other axes")
        passed *= size
    if not any(has(s, batch) for s in shape_of(node)):
        raise Mixed("reshapes the batch away")
    raise Mixed("reshapes the batch together with other axes")


def _permutation(order: Callable[[fx.Node, int], list[int]]) -> Rule:
    def rule(node: fx.Node, batch: sympy.Symbol) -> Axis:
        rows = node.args[0].meta["rows"]
        new = order(node, len(shape_of(node.args[0])))
        return Rows(new.index(rows.dim), rows.outer, rows.inner)

    return rule


def _transpose_order(node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    a, b = node.args[1] % rank, node.args[2] % rank
    order[a], order[b] = order[b], order[a]
    return order


def _unsqueeze(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows, dim = node.args[0].meta["rows"], node.args[1] % len(shape_of(node))
    return Rows(rows.dim + (dim <= rows.dim), rows.outer, rows.inner)


def _squeeze(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows, rank = node.args[0].meta["rows"], len(shape_of(node.args[0]))
    dims = node.args[1] if len(node.args) > 1 else list(range(rank))
    dims = [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    gone = [d for d in dims if d < rows.dim and shape_of(node.args[0])[d] == 1]
    return Rows(rows.dim - len(gone), rows.outer, rows.inner)


def _expand(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows = node.args[0].meta["rows"]
    return Rows(rows.dim + len(shape_of(node)) - len(shape_of(node.args[0])), rows.outer, rows.inner)


def _select(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows, dim = node.args[0].meta["rows"], node.args[1] % len(shape_of(node.args[0]))
    if dim == rows.dim:
        raise Mixed("selects a row of the batch")
    return Rows(rows.dim - (dim < rows.dim), rows.outer, rows.inner)


def _slice(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows = node.args[0].meta["rows"]
    if (node.args[1] if len(node.args) > 1 else 0) % len(shape_of(node.args[0])) == rows.dim:
        raise Mixed("slices the batch")
    return rows


def _pieces(node: fx.Node, batch: sympy.Symbol) -> tuple[Axis, ...]:
    rows = node.args[0].meta["rows"]
    dim = (node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)) % len(shape_of(node.args[0]))
    if dim == rows.dim:
        raise Mixed("splits the batch")
    return (rows,) * len(node.meta["val"])


def _unbind(node: fx.Node, batch: sympy.Symbol) -> tuple[Axis, ...]:
    rows = node.args[0].meta["rows"]
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(shape_of(node.args[0]))
    if dim == rows.dim:
        raise Mixed("unbinds the batch")
    return (Rows(rows.dim - (dim < rows.dim), rows.outer, rows.inner),) * len(node.meta["val"])


def _cat(node: fx.Node, batch: sympy.Symbol) -> Axis:
    parts = list(node.args[0])
    rows = aligned(parts, len(shape_of(node)))
    if any(p.meta["rows"] is None for p in parts):
        raise Mixed("joins values with and without a batch")
    if (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(shape_of(node)) == rows.dim:
        raise Mixed("concatenates along the batch")
    return rows


def _stack(node: fx.Node, batch: sympy.Symbol) -> Axis:
    parts = list(node.args[0])
    if any(p.meta["rows"] is None for p in parts):
        raise Mixed("joins values with and without a batch")
    rows = aligned(parts, len(shape_of(parts[0])))
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(shape_of(node))
    return Rows(rows.dim + (dim <= rows.dim), rows.outer, rows.inner)


def _pad(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows, padding = node.args[0].meta["rows"], node.args[1]
    if rows.dim >= len(shape_of(node)) - len(padding) // 2:
        raise Mixed("pads the batch")
    return rows


def _repeat(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows, counts = node.args[0].meta["rows"], node.args[1]
    shift = len(counts) - len(shape_of(node.args[0]))
    if counts[rows.dim + shift] != 1:
        raise Mixed("repeats the batch")
    return Rows(rows.dim + shift, rows.outer, rows.inner)


def _grown(node: fx.Node, batch: sympy.Symbol) -> Axis:
    """select_backward and slice_backward: the batch axis is where the result has it."""
    rows = node.args[0].meta["rows"]
    dim = node.args[2] % len(shape_of(node))
    if node.target is aten.select_backward.default:
        rows = Rows(rows.dim + (dim <= rows.dim), rows.outer, rows.inner)
    if rows.dim == dim:
        raise Mixed("selects rows of the batch")
    return rows


def _select_scatter(node: fx.Node, batch: sympy.Symbol) -> Axis:
    base, part = node.args[0].meta["rows"], node.args[1].meta["rows"]
    dim = node.args[2] % len(shape_of(node))
    if part is not None:
        part = Rows(part.dim + (dim <= part.dim), part.outer, part.inner)
    if base is None or part is None or part != base or base.dim == dim:
        raise Mixed("writes into rows of the batch")
    return base


def _slice_scatter(node: fx.Node, batch: sympy.Symbol) -> Axis:
    base, part = node.args[0].meta["rows"], node.args[1].meta["rows"]
    dim = (node.args[2] if len(node.args) > 2 else 0) % len(shape_of(node))
    if base is None or part != base or base.dim == dim:
        raise Mixed("writes into rows of the batch")
    return base


def _diagonal(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows, rank = node.args[0].meta["rows"], len(shape_of(node.args[0]))
    a = (node.args[2] if len(node.args) > 2 else 0) % rank
    b = (node.args[3] if len(node.args) > 3 else 1) % rank
    if rows.dim in (a, b):
        raise Mixed("takes a diagonal of the batch")
    return Rows(rows.dim - sum(d < rows.dim for d in (a, b)), rows.outer, rows.inner)


def _diagonal_backward(node: fx.Node, batch: sympy.Symbol) -> Axis:
    """The batch axis is where the result has it, among the axes that are not the diagonal's."""
    rows, rank = node.args[0].meta["rows"], len(shape_of(node))
    a, b = (d % rank for d in node.args[3:5])
    if rows.dim == rank - 2:
        raise Mixed("spreads the batch over a diagonal")
    return Rows([d for d in range(rank) if d not in (a, b)][rows.dim], rows.outer, rows.inner)


def _diagonal_scatter(node: fx.Node, batch: sympy.Symbol) -> Axis:
    base, part = node.args[0].meta["rows"], node.args[1].meta["rows"]
    a, b = (d % len(shape_of(node)) for d in (*node.args[3:], *(0, 1)[len(node.args[3:]) :]))
    if base is None or part is None or base.dim in (a, b):
        raise Mixed("writes into a diagonal of the batch")
    if part != Rows(base.dim - sum(d < base.dim for d in (a, b)), base.outer, base.inner):
        raise Mixed("writes into a diagonal of the batch")
    return base


def _unfold(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows = node.args[0].meta["rows"]
    if node.args[1] % len(shape_of(node.args[0])) == rows.dim:
        raise Mixed("unfolds the batch")
    return rows


def _unfold_backward(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows, rank = node.args[0].meta["rows"], len(shape_of(node))
    if rows.dim in (node.args[2] % rank, rank):
        raise Mixed("unfolds the batch")
    return rows


def _leading_axes(node: fx.Node, batch: sympy.Symbol) -> Axis:
    """Operations that add or take away the last axis."""
    rows = node.args[0].meta["rows"]
    if rows.dim >= min(len(shape_of(node)), len(shape_of(node.args[0]))):
        raise Mixed("takes the batch axis apart")
    return rows


def _diag_embed(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows, rank = node.args[0].meta["rows"], len(shape_of(node.args[0]))
    if len(node.args) > 2 or node.kwargs or rows.dim == rank - 1:
        raise Mixed("spreads the batch over a diagonal")
    return rows




# -- the rows of the table -----------------------------------------------------------------------------------

FIRST = ((0,),)

add("view reshape _unsafe_view", rows=_view, sizes=(1,), view="shape", linear=FIRST)
add("squeeze", rows=_squeeze, view="shape", linear=FIRST)
add("unsqueeze", rows=_unsqueeze, view="shape", linear=FIRST)
add("expand", rows=_expand, sizes=(1,), view="shape", linear=FIRST)
add("permute", rows=_permutation(lambda node, rank: [d % rank for d in node.args[1]]), view="order", linear=FIRST)
add("transpose", rows=_permutation(_transpose_order), view="order", linear=FIRST)
add("t", rows=_permutation(lambda node, rank: list(range(rank))[::-1]), view="order", linear=FIRST)
add("select", rows=_select, view="part", linear=FIRST)
add("slice", rows=_slice, view="part", linear=FIRST)
add("split split_with_sizes chunk", rows=_pieces, view="part", linear=FIRST)
add("unbind", rows=_unbind, view="part", linear=FIRST)
add("diagonal", rows=_diagonal, view="part", linear=FIRST)
add("unfold", rows=_unfold, view="part", linear=FIRST)
add("view_as_real view_as_complex", rows=_leading_axes, view="shape", linear=FIRST)
add("alias detach", pointwise=True, view="shape", linear=FIRST)
add("clone contiguous", pointwise=True, view="shape", linear=FIRST)

add("cat", rows=_cat, moves=True, row_pass=True, linear=FIRST)
add("stack", rows=_stack, moves=True, linear=FIRST)
add("flip", rows=along(), linear=FIRST)
add("roll", rows=along(2, "dims"), linear=FIRST)
add("repeat", rows=_repeat, linear=FIRST)
add("constant_pad_nd", rows=_pad, linear=((0, 2),))
add("diag_embed", rows=_diag_embed, linear=FIRST)
add("select_backward slice_backward", rows=_grown, sizes=(1,), linear=FIRST)
add("diagonal_backward", rows=_diagonal_backward, sizes=(1,), linear=FIRST)
add("unfold_backward", rows=_unfold_backward, sizes=(1,), linear=FIRST)
add("select_scatter", rows=_select_scatter, linear=((0, 1),))
add("slice_scatter", rows=_slice_scatter, linear=((0, 1),))
add("diagonal_scatter", rows=_diagonal_scatter, linear=((0, 1),))
add("pixel_shuffle pixel_unshuffle", rows=first_axis(least=4))
