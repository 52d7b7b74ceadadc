"""Lowerings of look-ups: embedding, gather, index, scatter, one-hot."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from . import geometry
from .halves import ROUNDED
from .language import Const, Dim, Expr, Load, Op, Scatter
from .lowering import Lowering, Unsupported, lowers
from .ops_pointwise import Point, node_arg


def checked(low: Lowering, index: Expr, size: Dim, from_end: bool = False, copy: bool = True) -> Expr:
    """The indices as int64, none outside an axis of `size`: the kernel tells when it finds one, see `Check`.

    from_end: negative ones count from the end, as in x[index] alone. copy: False where each is read once.
    """
    index = low.make.cast(index, torch.int64)
    if isinstance(index, Const) and isinstance(size, int) and 0 <= index.value < size:
        return index
    found = low.inside(index, size, from_end=from_end)
    return low.copy(found, "index") if copy else found


def lookup(
    low: Lowering, table: Expr, dim: int, index: Expr, index_axes: tuple[int, ...], shape: Any
) -> Expr:
    """out[i...] = table[.., index, ..] with `index` (`checked`, of `shape`) along `dim`.

    index_axes: for every other axis of the table, the axis of `shape` that runs along it.
    """
    if isinstance(table, Op) and table.name == "cast" and table.args[0].dtype in ROUNDED:
        # of half precision only what is looked up is made float32
        return low.make.cast(lookup(low, table.args[0], dim, index, index_axes, shape), table.dtype)
    table = low.realise(table)
    if not isinstance(table, Load):
        table = low.copy(table)
    strides: list[Dim] = [0] * len(shape)
    others = [d for d in range(len(table.shape)) if d != dim]
    for axis, d in zip(index_axes, others):
        strides[axis] = table.strides[d]
    at = (*table.at, (low.expand(index, tuple(shape)), table.strides[dim]))
    return low.make.load(Load(table.buffer, tuple(shape), tuple(strides), table.offset, at))


@lowers("embedding")
def _embedding(low: Lowering, node: fx.Node) -> Expr:
    table, index = low.args(node)[:2]
    shape = low.shape(node)
    index = checked(low, index, table.shape[0])
    wide = low.view(index, geometry.unsqueeze(len(index.shape)))
    return lookup(low, table, 0, wide, (len(shape) - 1,), shape)


@lowers("index_select")
def _index_select(low: Lowering, node: fx.Node) -> Expr:
    value, dim, index = low.args(node)
    shape = low.shape(node)
    if not shape:
        raise Unsupported("places of a value without axes")
    dim = dim % len(value.shape)
    if low.has_batch(node.args[0], dim):
        raise Unsupported("index_select along the batch axis")
    index = checked(low, index, value.shape[dim])
    wide = low.reshape(index, tuple(shape[dim] if d == dim else 1 for d in range(len(shape))))
    return lookup(low, value, dim, wide, tuple(d for d in range(len(shape)) if d != dim), shape)


@lowers("gather")
def _gather(low: Lowering, node: fx.Node) -> Expr:
    value, dim, index = low.args(node)[:3]
    shape = low.shape(node)
    if not shape:
        return value
    dim = low.inner(node.args[0], dim)
    index = checked(low, index, value.shape[dim])
    return lookup(low, value, dim, index, tuple(d for d in range(len(shape)) if d != dim), shape)


@lowers("index", "_unsafe_index")
def _index(low: Lowering, node: fx.Node) -> Expr:
    value, indices = low.args(node)
    used = [d for d, i in enumerate(indices) if i is not None]
    if len(used) != 1 or indices[used[0]].dtype == torch.bool:
        raise Unsupported("indexing by several tensors or by a mask")
    dim = used[0]
    if low.has_batch(node.args[0], dim):
        raise Unsupported("indexing along the batch axis")
    index, shape = checked(low, indices[dim], value.shape[dim], from_end=True), low.shape(node)
    count = len(index.shape)
    wide = low.reshape(index, (*index.shape, *(1,) * (len(shape) - dim - count)))
    axes = (*range(dim), *range(dim + count, len(shape)))
    return lookup(low, value, dim, wide, axes, shape)


@lowers("scatter", "scatter_add")
def _scatter(low: Lowering, node: fx.Node) -> Expr:
    value, dim, index, source = low.args(node)[:4]
    if node.kwargs.get("reduce") or len(node.args) > 4:
        raise Unsupported("scatter with a reduction")
    add = node.target.overloadpacket.__name__ == "scatter_add"
    if not low.shape(node):
        raise Unsupported("scatter into a value without axes")
    dim = low.inner(node, dim)
    return _write(low, node, value, dim, checked(low, index, value.shape[dim], copy=False), source, add)


def _write(low: Lowering, node: fx.Node, value: Expr, dim: int, index: Expr, source: Any, add: bool) -> Expr:
    """`index`: `checked`, in the shape of what is written."""
    target = low.copy(low.expand(value, low.shape(node)), node.name)
    shape = index.shape
    if isinstance(source, (int, float, bool)):
        source = low.const(source, value.dtype, shape)
    for d, size in enumerate(shape):
        source = low.view(source, geometry.narrow(d, 0, size))
    strides = tuple(0 if d == dim else s for d, s in enumerate(target.strides))
    at = ((index, target.strides[dim]),)
    low.emit(Scatter(Load(target.buffer, shape, strides, target.offset, at), source, add))
    return target


@lowers("index_add", "index_copy")
def _index_add(low: Lowering, node: fx.Node) -> Expr:
    value, dim, index, source = low.args(node)[:4]
    if not low.shape(node):
        raise Unsupported("adding to places of a value without axes")
    dim = low.inner(node, dim)
    index = checked(low, index, value.shape[dim])
    wide = low.reshape(index, tuple(source.shape[dim] if d == dim else 1 for d in range(len(source.shape))))
    wide = low.expand(wide, source.shape)
    add = node.target.overloadpacket.__name__ == "index_add"
    alpha = low.argument(node.kwargs.get("alpha", 1))
    if add and alpha != 1:
        source = Point(low, node, shape=source.shape).mul(source, alpha)
    return _write(low, node, value, dim, wide, source, add)


@lowers("index_put", "_unsafe_index_put")
def _index_put(low: Lowering, node: fx.Node) -> Expr:
    value, indices, source = low.args(node)[:3]
    add = node_arg(low, node, 3, False)
    used = [d for d, i in enumerate(indices) if i is not None]
    if len(used) != 1 or indices[used[0]].dtype == torch.bool:
        raise Unsupported("writing by several tensors or by a mask")
    dim = low.inner(node, used[0])
    index, shape = indices[dim], low.shape(node)
    if len(index.shape) != 1:
        raise Unsupported("writing by an index of several axes")
    index = checked(low, index, shape[dim], from_end=True)
    wanted = (*shape[:dim], index.shape[0], *shape[dim + 1 :])
    wide = low.reshape(index, tuple(n if d == dim else 1 for d, n in enumerate(wanted)))
    return _write(low, node, value, dim, low.expand(wide, wanted), low.expand(source, wanted), add)


@lowers("embedding_dense_backward")
def _embedding_backward(low: Lowering, node: fx.Node) -> Expr:
    raise Unsupported("the gradient of an embedding table inside the loop")
