"""Lowerings of matrix products: with weights that are the same for all rows and steps, and per row."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import fx

from . import geometry
from .expressions import is_contiguous
from .halves import ROUNDED
from .language import Dim, Expr, Load, Op, Product, same, whole
from .lowering import Lowering, lowers
from .ops_pointwise import Point, node_arg


def is_weight(expr: Any) -> TypeGuard[Load]:
    """Whether a matrix stands still: a view of an input that is the same for all rows and steps."""
    return isinstance(expr, Load) and expr.buffer.place == "once" and not expr.buffer.rows and not expr.at


def as_stored(expr: Expr) -> Expr:
    """A weight in half precision as it is kept, which products read, where `expr` is its numbers in float32."""
    cast = isinstance(expr, Op) and expr.name == "cast" and expr.args[0].dtype in ROUNDED
    return expr.args[0] if cast and is_weight(expr.args[0]) else expr  # type: ignore[union-attr]


def matmul(low: Lowering, left: Expr, right: Expr) -> Expr:
    """(M, K) @ (K, N) of one row."""
    stands_left, stands_right = is_weight(as_stored(left)), is_weight(as_stored(right))
    if stands_right and not stands_left:
        return weighted(low, left, as_stored(right))
    if stands_left and not stands_right:
        swap = geometry.permute((1, 0))
        found = weighted(low, low.view(right, swap), low.view(as_stored(left), swap))
        return low.view(found, swap)
    return contract(low, left, right)


def weighted(low: Lowering, left: Expr, right: Any) -> Load:
    """right: a load, of a weight."""
    rows, inner = left.shape
    left = low.realise(left)
    if not isinstance(left, Load) or not (same(left.strides[1], 1) or same(inner, 1)):
        left = low.copy(left)
    elif not same(rows, 1) and not is_contiguous(left):
        left = low.copy(left)
    target = whole(low.temp((rows, right.shape[1]), left.dtype))
    low.emit(Product(target, left, right))
    return low.make.load(target)


def contract(low: Lowering, left: Expr, right: Expr) -> Load:
    """(..., M, K) @ (..., K, N) as a reduction over K, each row by itself."""
    left, right = low.realise(left), low.realise(right)
    batch = left.shape[:-2]
    shape: tuple[Dim, ...] = (*batch, left.shape[-2], right.shape[-1], left.shape[-1])
    rank = len(shape)
    wide_left = low.expand(low.view(left, geometry.unsqueeze(rank - 2)), shape)
    flipped = low.view(right, geometry.permute((*range(rank - 3), rank - 2, rank - 3)))
    wide_right = low.expand(low.view(flipped, geometry.unsqueeze(rank - 3)), shape)
    value = low.make.op("mul", [wide_left, wide_right], left.dtype)
    return low.reduce("sum", value, 1, left.dtype)


@lowers("mm")
def _mm(low: Lowering, node: fx.Node) -> Expr:
    return matmul(low, *low.args(node))


@lowers("mv")
def _mv(low: Lowering, node: fx.Node) -> Expr:
    left, right = low.args(node)
    found = matmul(low, left, low.view(right, geometry.unsqueeze(1)))
    return low.reshape(found, low.shape(node))


@lowers("dot", "vdot")
def _dot(low: Lowering, node: fx.Node) -> Expr:
    left, right = low.args(node)
    found = matmul(low, low.view(left, geometry.unsqueeze(0)), low.view(right, geometry.unsqueeze(1)))
    return low.reshape(found, ())


@lowers("addmm", "addmv", "baddbmm")
def _addmm(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    bias, left, right = low.args(node)
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    name = node.target.overloadpacket.__name__
    if name == "addmv":
        found = low.reshape(matmul(low, left, low.view(right, geometry.unsqueeze(1))), point.shape)
    elif name == "addmm":
        found = matmul(low, left, right)
    else:
        found = batched(low, node.args[1], left, node.args[2], right)
    value = point(found) if alpha == 1 else point.mul(found, alpha)
    if beta == 0:
        return value
    return point.add(value, bias if beta == 1 else point.mul(bias, beta))


@lowers("linear")
def _linear(low: Lowering, node: fx.Node) -> Expr:
    value, weight = low.args(node)[:2]
    bias = node_arg(low, node, 2)
    rows: Dim = 1
    for size in value.shape[:-1]:
        rows = rows * size
    flat = low.reshape(value, (rows, value.shape[-1]))
    found = matmul(low, flat, low.view(weight, geometry.permute((1, 0))))
    found = low.reshape(found, low.shape(node))
    return found if bias is None else Point(low, node).add(found, bias)


def batched(low: Lowering, left_node: fx.Node, left: Expr, right_node: fx.Node, right: Expr) -> Expr:
    """(G, M, K) @ (G, K, N) where G is the batch, the batch times heads, or heads."""
    if same(left.shape[0], 1) and (is_weight(as_stored(right)) or is_weight(as_stored(left))):
        flat = matmul(low, low.view(left, geometry.select(0, 0)), low.view(right, geometry.select(0, 0)))
        return low.view(flat, geometry.unsqueeze(0))
    return contract(low, left, right)


@lowers("bmm")
def _bmm(low: Lowering, node: fx.Node) -> Expr:
    left, right = low.args(node)
    return batched(low, node.args[0], left, node.args[1], right)


@lowers("outer", "ger")
def _outer(low: Lowering, node: fx.Node) -> Expr:
    left, right = low.args(node)
    return Point(low, node).mul(low.view(left, geometry.unsqueeze(1)), right)
