"""Lowerings of views, and of the operations that put arrays together."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from . import geometry
from .language import Dim, Expr, same, whole
from .lowering import Lowering, Unsupported, lowers
from .ops_pointwise import node_arg, option


@lowers("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")
def _view(low: Lowering, node: fx.Node) -> Expr:
    return low.reshape(node_arg(low, node, 0), low.shape(node))


@lowers("squeeze", "unsqueeze")
def _unit_axes(low: Lowering, node: fx.Node) -> Expr:
    return low.reshape(node_arg(low, node, 0), low.shape(node))


@lowers("t", "numpy_T")
def _t(low: Lowering, node: fx.Node) -> Expr:
    value = node_arg(low, node, 0)
    return low.view(value, geometry.permute(range(len(value.shape))[::-1]))


@lowers("transpose", "swapaxes")
def _transpose(low: Lowering, node: fx.Node) -> Expr:
    value, a, b = low.args(node)
    order = list(range(len(value.shape)))
    if order:
        order[a], order[b] = order[b], order[a]
    return low.view(value, geometry.permute(order))


@lowers("permute")
def _permute(low: Lowering, node: fx.Node) -> Expr:
    value, order = low.args(node)
    return low.view(value, geometry.permute([d % len(value.shape) for d in order]))


@lowers("expand")
def _expand(low: Lowering, node: fx.Node) -> Expr:
    return low.expand(node_arg(low, node, 0), low.shape(node))


@lowers("slice", "narrow")
def _slice(low: Lowering, node: fx.Node) -> Expr:
    value = node_arg(low, node, 0)
    dim = node_arg(low, node, 1, 0) % len(value.shape)
    if low.has_batch(node.args[0], dim):
        if _covers(low, node, dim):
            return value
        raise Unsupported("a slice of the batch axis")
    start = _clip(node_arg(low, node, 2) or 0, value.shape[dim])
    step = node_arg(low, node, 4, 1)
    return low.view(value, geometry.narrow(dim, start, low.shape(node)[dim], step))


def _covers(low: Lowering, node: fx.Node, dim: int) -> bool:
    before, after = node.args[0].meta["val"].shape[dim], node.meta["val"].shape[dim]
    return str(before) == str(after) and not node_arg(low, node, 2) and node_arg(low, node, 4, 1) == 1


def _clip(index: Dim, size: Dim) -> Dim:
    if isinstance(index, int) and isinstance(size, int):
        index = index + size if index < 0 else index
        return min(max(index, 0), size)
    return index + size if isinstance(index, int) and index < 0 else index


@lowers("select")
def _select(low: Lowering, node: fx.Node) -> Expr:
    value, dim, index = low.args(node)
    dim = low.inner(node.args[0], dim)
    index = index + value.shape[dim] if isinstance(index, int) and index < 0 else index
    return low.view(value, geometry.select(dim, index))


@lowers("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split")
def _split(low: Lowering, node: fx.Node) -> list[Expr]:
    value = node_arg(low, node, 0)
    dim = low.inner(node.args[0], option(low, node, 2, "dim", 0))
    parts, start = [], 0
    for part in node.meta["val"]:
        size = low.size(part.shape[dim])
        parts.append(low.view(value, geometry.narrow(dim, start, size)))
        start = start + size
    return parts


@lowers("unbind")
def _unbind(low: Lowering, node: fx.Node) -> list[Expr]:
    value = node_arg(low, node, 0)
    dim = low.inner(node.args[0], option(low, node, 1, "dim", 0))
    return [low.view(value, geometry.select(dim, i)) for i in range(len(node.meta["val"]))]


@lowers("flip")
def _flip(low: Lowering, node: fx.Node) -> Expr:
    value, dims = low.args(node)
    for dim in dims:
        value = low.view(value, geometry.flip(low.inner(node.args[0], dim)))
    return value


@lowers("diagonal")
def _diagonal(low: Lowering, node: fx.Node) -> Expr:
    value = node_arg(low, node, 0)
    offset = option(low, node, 1, "offset", 0)
    first, second = option(low, node, 2, "dim1", 0), option(low, node, 3, "dim2", 1)
    rank = len(value.shape)
    first, second = low.inner(node.args[0], first % rank), low.inner(node.args[0], second % rank)
    size = low.shape(node)[-1]

    def change(shape: Any, strides: Any) -> Any:
        rest = [d for d in range(rank) if d not in (first, second)]
        begin = offset * strides[second] if offset >= 0 else -offset * strides[first]
        return (
            (*(shape[d] for d in rest), size),
            (*(strides[d] for d in rest), strides[first] + strides[second]),
            begin,
        )

    return low.view(value, change)


@lowers("diagonal_backward")
def _diagonal_backward(low: Lowering, node: fx.Node) -> Expr:
    grad, _, offset, first, second = low.args(node)
    shape, rank = low.shape(node), len(low.shape(node))
    first, second = low.inner(node, first), low.inner(node, second)
    if offset or (first, second) != (rank - 2, rank - 1) or shape[first] != shape[second]:
        return low.otherwise(low, node)
    apart = low.make.iota(shape, (*(0,) * first, 1, -1))
    mask = low.make.op("eq", [apart, low.const(0, torch.int64, shape)], torch.bool)
    spread = low.expand(low.view(grad, geometry.unsqueeze(second)), shape)
    return low.make.op("where", [mask, spread, low.const(0, grad.dtype, shape)], grad.dtype)


@lowers("unfold")
def _unfold(low: Lowering, node: fx.Node) -> Expr:
    value, dim, size, step = low.args(node)
    dim = low.inner(node.args[0], dim)
    count = low.shape(node)[dim]

    def change(shape: Any, strides: Any) -> Any:
        stride = strides[dim]
        return (
            (*shape[:dim], count, *shape[dim + 1 :], size),
            (*strides[:dim], stride * step, *strides[dim + 1 :], stride),
            0,
        )

    return low.view(value, change)


@lowers("unfold_backward")
def _unfold_backward(low: Lowering, node: fx.Node) -> Expr:
    grad, _, dim, size, step = low.args(node)
    dim = low.inner(node, dim)
    shape = low.shape(node)
    if step != 1:
        raise Unsupported("the gradient of an unfold with a step")
    # What stands at p comes from frame p - i, place i: with size - 1 frames of zeros at both ends, a slanted view.
    side = low.const(0, grad.dtype, (*grad.shape[:dim], size - 1, *grad.shape[dim + 1 :]))
    frames = join(low, [side, grad, side], dim)

    def slanted(_: Any, strides: Any) -> Any:
        return (*shape, size), (*strides[:-1], strides[-1] - strides[dim]), (size - 1) * strides[dim]

    return low.reduce("sum", low.view(frames, slanted), 1, grad.dtype)


@lowers("as_strided")
def _as_strided(low: Lowering, node: fx.Node) -> Expr:
    raise Unsupported("as_strided depends on the layout of its input")


def place(low: Lowering, node: fx.Node, parts: list[Expr], dim: int) -> Expr:
    """Parts one after the other along an axis, in a new buffer."""
    shape = low.shape(node)
    parts = [p for p in parts if not (len(p.shape) == 1 and p.shape[0] == 0 and len(shape) != 1)]
    if len(parts) == 1:
        return parts[0]
    target = whole(low.temp(shape, node.meta["val"].dtype))
    start: Dim = 0
    slots = []
    for part in parts:
        size = part.shape[dim]
        if size != 0:
            slots.append(low.make.view(target, geometry.narrow(dim, start, size)))
            low.store(slots[-1], low.make.cast(part, target.dtype))
        start = start + size
    found = low.make.load(target)
    low.pieces[id(found)] = slots
    return found


@lowers("cat", "concat")
def _cat(low: Lowering, node: fx.Node) -> Expr:
    parts = node_arg(low, node, 0)
    return place(low, node, parts, low.inner(node, option(low, node, 1, "dim", 0)))


@lowers("stack")
def _stack(low: Lowering, node: fx.Node) -> Expr:
    parts = node_arg(low, node, 0)
    dim = option(low, node, 1, "dim", 0) % (len(parts[0].shape) + 1)
    return place(low, node, [low.view(p, geometry.unsqueeze(dim)) for p in parts], dim)


@lowers("repeat")
def _repeat(low: Lowering, node: fx.Node) -> Expr:
    value, counts = low.args(node)
    missing = len(counts) - len(value.shape)
    shape = (1,) * missing + tuple(value.shape)
    value = low.reshape(value, shape)
    # (n0, n1) repeated (c0, c1) is the expand of (1, n0, 1, n1) to (c0, n0, c1, n1)
    thin = tuple(n for size in shape for n in (1, size))
    wide = tuple(n for count, size in zip(counts, shape) for n in (count, size))
    value = low.expand(low.reshape(value, thin), wide)
    return low.reshape(value, low.shape(node))


@lowers("roll")
def _roll(low: Lowering, node: fx.Node) -> Expr:
    value, shifts = low.args(node)[:2]
    dims = option(low, node, 2, "dims", [])
    if not dims:
        raise Unsupported("roll of a flattened array")
    for shift, dim in zip(shifts, dims):
        dim = low.inner(node, dim)
        size = value.shape[dim]
        if same(size, 0):
            continue
        cut = (-shift) % size
        if cut:
            tail = low.view(value, geometry.narrow(dim, cut, size - cut))
            head = low.view(value, geometry.narrow(dim, 0, cut))
            value = place(low, node, [tail, head], dim)
    return value


def surround(low: Lowering, node: fx.Node, middle: Expr, dim: int, start: Dim, around: Any) -> Expr:
    """`middle` at `start` along an axis; around it a number, or the rest of an array of the full shape."""
    shape = low.shape(node)
    stop = start + middle.shape[dim]

    def rest(begin: Dim, size: Dim) -> Expr:
        if isinstance(around, (int, float, bool)):
            return low.const(around, middle.dtype, (*shape[:dim], size, *shape[dim + 1 :]))
        return low.view(around, geometry.narrow(dim, begin, size))

    parts = [rest(0, start)] if start != 0 else []
    parts.append(middle)
    if stop != shape[dim]:
        parts.append(rest(stop, shape[dim] - stop))
    return place(low, node, parts, dim)


def interleave(low: Lowering, node: fx.Node, middle: Expr, dim: int, start: Dim, step: int, around: Any) -> Expr:
    """`middle` at every `step`-th place from `start` along an axis, in a new buffer of the full shape."""
    shape = low.shape(node)
    if not all(isinstance(n, int) for n in (start, shape[dim], middle.shape[dim])):
        raise Unsupported("a slice with a step on an axis of unknown size")
    target = whole(low.temp(shape, node.meta["val"].dtype))

    def fill(begin: int, count: int, pace: int, value: Expr | None = None) -> None:
        if count <= 0:
            return
        view = geometry.narrow(dim, begin, count, pace)
        if value is None and isinstance(around, (int, float, bool)):
            value = low.const(around, middle.dtype, (*shape[:dim], count, *shape[dim + 1 :]))
        low.store(low.make.view(target, view), low.view(around, view) if value is None else value)

    count = middle.shape[dim]
    fill(0, start, 1)
    fill(start, count, step, middle)
    fill(start + count * step, _places(start + count * step, shape[dim], step), step)
    for offset in range(1, step):
        fill(start + offset, _places(start + offset, shape[dim], step), step)
    return low.make.load(target)


def _places(begin: int, stop: int, step: int) -> int:
    return max(0, -(-(stop - begin) // step))


@lowers("slice_backward")
def _slice_backward(low: Lowering, node: fx.Node) -> Expr:
    grad, _, dim, start, _, step = low.args(node)
    dim = low.inner(node, dim)
    if step != 1:
        return interleave(low, node, grad, dim, _clip(start, low.shape(node)[dim]), step, 0)
    return surround(low, node, grad, dim, _clip(start, low.shape(node)[dim]), 0)


@lowers("select_backward")
def _select_backward(low: Lowering, node: fx.Node) -> Expr:
    grad, _, dim, index = low.args(node)
    dim = low.inner(node, dim)
    middle = low.view(grad, geometry.unsqueeze(dim))
    return surround(low, node, middle, dim, _clip(index, low.shape(node)[dim]), 0)


@lowers("slice_scatter")
def _slice_scatter(low: Lowering, node: fx.Node) -> Expr:
    value, source = low.args(node)[:2]
    dim = option(low, node, 2, "dim", 0)
    start, step = option(low, node, 3, "start") or 0, option(low, node, 5, "step", 1)
    if low.has_batch(node, dim % len(value.shape)) and source.shape == value.shape:
        return source
    dim = low.inner(node, dim)
    if step != 1:
        return interleave(low, node, source, dim, _clip(start, value.shape[dim]), step, value)
    return surround(low, node, source, dim, _clip(start, value.shape[dim]), value)


@lowers("select_scatter")
def _select_scatter(low: Lowering, node: fx.Node) -> Expr:
    value, source, dim, index = low.args(node)
    dim = low.inner(node, dim)
    middle = low.view(source, geometry.unsqueeze(dim))
    return surround(low, node, middle, dim, _clip(index, value.shape[dim]), value)


@lowers("constant_pad_nd")
def _pad(low: Lowering, node: fx.Node) -> Expr:
    value, pads = low.args(node)[:2]
    fill = option(low, node, 2, "value", 0)
    rank = len(value.shape)
    for axis, (before, after) in enumerate(zip(pads[::2], pads[1::2])):
        dim = low.inner(node, rank - 1 - axis)
        parts = []
        if before < 0 or after < 0:
            cut, stop = max(-before, 0), value.shape[dim] + min(after, 0)
            value = low.view(value, geometry.narrow(dim, cut, stop - cut))
        shape = value.shape
        for count in (before, after):
            side = (*shape[:dim], max(count, 0), *shape[dim + 1 :])
            parts.append(low.const(fill, value.dtype, side))
        value = join(low, [parts[0], value, parts[1]], dim)
    return value


def join(low: Lowering, parts: list[Expr], dim: int) -> Expr:
    """Parts of any shapes one after the other; empty ones vanish, as long as something is left."""
    parts = [p for p in parts if p.shape[dim] != 0] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    total: Dim = 0
    for part in parts:
        total = total + part.shape[dim]
    shape = parts[0].shape
    target = whole(low.temp((*shape[:dim], total, *shape[dim + 1 :]), parts[0].dtype))
    start: Dim = 0
    for part in parts:
        low.store(low.make.view(target, geometry.narrow(dim, start, part.shape[dim])), part)
        start = start + part.shape[dim]
    return low.make.load(target)


@lowers("tril", "triu")
def _triangle(low: Lowering, node: fx.Node) -> Expr:
    value = node_arg(low, node, 0)
    diagonal = option(low, node, 1, "diagonal", 0)
    shape, rank = value.shape, len(value.shape)
    low.inner(node, rank - 1), low.inner(node, rank - 2)
    strides = (0,) * (rank - 2) + (-1, 1)
    offset = low.make.iota(shape, strides)  # column - row
    name = "le" if node.target.overloadpacket.__name__ == "tril" else "ge"
    mask = low.make.op(name, [offset, low.const(diagonal, torch.int64, shape)], torch.bool)
    return low.make.op("where", [mask, value, low.const(0, value.dtype, shape)], value.dtype)
