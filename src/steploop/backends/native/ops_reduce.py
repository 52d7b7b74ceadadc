"""Lowerings of reductions over features, softmax, normalisation and running sums."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from . import geometry
from .language import Dim, Expr, Load, Scan, product, whole
from .lowering import Lowering, Unsupported, lowers
from .ops_pointwise import Point, node_arg, option


class Axes:
    """Some axes of a value, moved to the end and back."""

    def __init__(self, low: Lowering, node: fx.Node, value: Expr, dims: Any):
        self.low, self.value = low, value
        rank = len(value.shape)
        if dims is None or dims == [] or dims == ():
            dims = range(rank)
        dims = [dims] if isinstance(dims, int) else list(dims)
        self.dims = sorted({low.inner_or_unit(node, d) for d in dims}) if rank else []
        self.rest = [d for d in range(rank) if d not in self.dims]

    @property
    def count(self) -> Dim:
        return product([self.value.shape[d] for d in self.dims])

    def moved(self, value: Expr) -> Expr:
        return self.low.view(value, geometry.permute([*self.rest, *self.dims]))

    def reduce(self, kind: str, value: Expr, dtype: torch.dtype) -> Load:
        return self.low.reduce(kind, self.moved(value), len(self.dims), dtype)

    def keep(self, reduced: Expr) -> Expr:
        """The reduced value with its reduced axes as axes of size 1."""
        shape = tuple(1 if d in self.dims else n for d, n in enumerate(self.value.shape))
        return self.low.reshape(reduced, shape)


def _result(low: Lowering, node: fx.Node, axes: Axes, reduced: Expr) -> Expr:
    return low.reshape(reduced, low.shape(node))


@lowers("sum", "prod")
def _sum(low: Lowering, node: fx.Node) -> Expr:
    kind = node.target.overloadpacket.__name__
    dtype = node.meta["val"].dtype
    value = low.make.cast(node_arg(low, node, 0), dtype)
    axes = Axes(low, node.args[0], value, node_arg(low, node, 1))
    return _result(low, node, axes, axes.reduce(kind, value, dtype))


@lowers("mean")
def _mean(low: Lowering, node: fx.Node) -> Expr:
    dtype = node.meta["val"].dtype
    value = low.make.cast(node_arg(low, node, 0), dtype)
    axes = Axes(low, node.args[0], value, node_arg(low, node, 1))
    total = _result(low, node, axes, axes.reduce("sum", value, dtype))
    return Point(low, node).div(total, Count(low, axes.count).expr(dtype))


class Count:
    """A number of elements as a constant, known now or at run time."""

    def __init__(self, low: Lowering, count: Dim):
        self.low, self.count = low, count

    def expr(self, dtype: torch.dtype) -> Expr:
        return self.low.make.cast(self.low.make.iota((), (), self.count), dtype)


def _count(low: Lowering, count: Dim) -> Any:
    return count if isinstance(count, int) else low.make.iota((), (), count)


@lowers("amax", "amin")
def _extreme(low: Lowering, node: fx.Node) -> Expr:
    value = node_arg(low, node, 0)
    axes = Axes(low, node.args[0], value, option(low, node, 1, "dim"))
    kind = node.target.overloadpacket.__name__
    return _result(low, node, axes, axes.reduce(kind, value, value.dtype))


@lowers("max", "min")
def _max(low: Lowering, node: fx.Node) -> Any:
    kind = node.target.overloadpacket.__name__
    value = node_arg(low, node, 0)
    found = node.meta["val"]
    if not isinstance(found, (tuple, list)):
        if len(node.args) > 1:
            raise Unsupported(f"{kind} of two tensors")
        axes = Axes(low, node.args[0], value, None)
        return axes.reduce("a" + kind, value, value.dtype)
    axes = Axes(low, node.args[0], value, node_arg(low, node, 1))
    best = axes.reduce("a" + kind, value, value.dtype)
    where = axes.reduce("arg" + kind, value, torch.int64)
    return [low.reshape(r, low.sizes(v.shape)) for r, v in zip((best, where), found)]


@lowers("aminmax")
def _aminmax(low: Lowering, node: fx.Node) -> list[Expr]:
    value = node_arg(low, node, 0)
    axes = Axes(low, node.args[0], value, option(low, node, 1, "dim"))
    ends = [axes.reduce(kind, value, value.dtype) for kind in ("amin", "amax")]
    return [low.reshape(end, low.sizes(v.shape)) for end, v in zip(ends, node.meta["val"])]


@lowers("argmax", "argmin")
def _arg(low: Lowering, node: fx.Node) -> Expr:
    value = node_arg(low, node, 0)
    dim = option(low, node, 1, "dim")
    if dim is None:
        for d in range(len(value.shape)):
            low.inner(node.args[0], d)
        value, dim = low.reshape(value, (product(value.shape),)), 0
        reduced = low.reduce(node.target.overloadpacket.__name__, value, 1, torch.int64)
        return low.reshape(reduced, low.shape(node))
    axes = Axes(low, node.args[0], value, dim)
    return _result(low, node, axes, axes.reduce(node.target.overloadpacket.__name__, value, torch.int64))


@lowers("any", "all")
def _any(low: Lowering, node: fx.Node) -> Expr:
    value = low.make.cast(node_arg(low, node, 0), torch.bool)
    axes = Axes(low, node.args[0], value, node_arg(low, node, 1))
    return _result(low, node, axes, axes.reduce(node.target.overloadpacket.__name__, value, torch.bool))


@lowers("var", "std", "var_mean")
def _var(low: Lowering, node: fx.Node) -> Any:
    name = node.target.overloadpacket.__name__
    vals = node.meta["val"] if name == "var_mean" else [node.meta["val"]]
    value = low.realise(node_arg(low, node, 0))
    dims = option(low, node, 1, "dim")
    if isinstance(dims, bool):
        raise Unsupported("var over everything with the old unbiased argument")
    correction = node.kwargs.get("correction", 1)
    if len(node.args) > 2 and isinstance(node.args[2], bool):
        correction = int(node.args[2])
    correction = 1 if correction is None else correction
    axes = Axes(low, node.args[0], value, dims)
    mean, spread = moments(low, axes, value)
    count = axes.count
    if not isinstance(count, int):
        raise Unsupported("var over an axis of unknown size")
    shape = low.sizes(vals[0].shape)
    point = Point(low, node, shape, value.dtype)
    scale = 1.0 / (count - correction) if count > correction else math.inf
    if count <= correction:
        variance = point.mul(low.reshape(spread, shape), math.nan if count == correction else scale)
    else:
        variance = point.div(low.reshape(spread, shape), float(count - correction))
    if name == "std":
        return point.op("sqrt", variance)
    return [variance, low.reshape(mean, shape)] if name == "var_mean" else variance


def moments(low: Lowering, axes: Axes, value: Expr) -> tuple[Expr, Expr]:
    """The mean and the sum of squared differences from it, with reduced axes of size 1."""
    keep = axes.keep(axes.reduce("sum", value, value.dtype))
    inner = Point(low, None, keep.shape, value.dtype)
    mean = low.realise(inner.div(keep, Count(low, axes.count).expr(value.dtype)), "mean")
    point = Point(low, None, value.shape, value.dtype)
    gap = point.sub(value, mean)
    return mean, axes.keep(axes.reduce("sum", point.mul(gap, gap), value.dtype))


@lowers("_softmax", "softmax")
def _softmax(low: Lowering, node: fx.Node) -> Expr:
    return softmax(low, node, node_arg(low, node, 0), node_arg(low, node, 1))


def softmax(low: Lowering, node: fx.Node, value: Expr, dim: int) -> Expr:
    value = low.realise(low.make.cast(value, node.meta["val"].dtype))
    axes = Axes(low, node.args[0], value, dim)
    point = Point(low, node, value.shape, value.dtype)
    top = axes.keep(axes.reduce("amax", value, value.dtype))
    powers = low.realise(point.op("exp", point.sub(value, top)), "powers")
    total = axes.keep(axes.reduce("sum", powers, value.dtype))
    share = low.realise(Point(low, None, total.shape, total.dtype).op("reciprocal", total), "share")
    return point.mul(powers, share)


@lowers("_safe_softmax")
def _safe_softmax(low: Lowering, node: fx.Node) -> Expr:
    value, dim = node_arg(low, node, 0), node_arg(low, node, 1)
    point = Point(low, node)
    found = softmax(low, node, value, dim)
    axes = Axes(low, node.args[0], value, dim)
    top = axes.keep(axes.reduce("amax", value, value.dtype))
    return point.where(point.test("eq", top, -math.inf), 0, found)


@lowers("_softmax_backward_data")
def _softmax_backward(low: Lowering, node: fx.Node) -> Expr:
    grad, output, dim = low.args(node)[:3]
    point = Point(low, node)
    product_ = low.realise(point.mul(grad, output), "weighted")
    axes = Axes(low, node.args[1], output, dim)
    total = axes.keep(axes.reduce("sum", product_, output.dtype))
    return point.sub(product_, point.mul(output, total))


@lowers("_log_softmax", "log_softmax")
def _log_softmax(low: Lowering, node: fx.Node) -> Expr:
    value, dim = (
        low.realise(low.make.cast(node_arg(low, node, 0), node.meta["val"].dtype)),
        node_arg(low, node, 1),
    )
    axes = Axes(low, node.args[0], value, dim)
    point = Point(low, node)
    top, total = _log_total(low, axes, value)
    log = low.realise(Point(low, None, total.shape, total.dtype).op("log", total), "log_total")
    return point.sub(point.sub(value, top), log)


def _log_total(low: Lowering, axes: Axes, value: Expr) -> tuple[Expr, Expr]:
    """The maximum and the sum of exp(value - maximum)."""
    top = axes.keep(axes.reduce("amax", value, value.dtype))
    point = Point(low, None, value.shape, value.dtype)
    return top, axes.keep(axes.reduce("sum", point.op("exp", point.sub(value, top)), value.dtype))


@lowers("_log_softmax_backward_data")
def _log_softmax_backward(low: Lowering, node: fx.Node) -> Expr:
    grad, output, dim = low.args(node)[:3]
    grad = low.realise(grad)
    point = Point(low, node)
    axes = Axes(low, node.args[0], grad, dim)
    total = axes.keep(axes.reduce("sum", grad, grad.dtype))
    return point.sub(grad, point.mul(point.op("exp", output), total))


@lowers("logsumexp")
def _logsumexp(low: Lowering, node: fx.Node) -> Expr:
    value = low.realise(low.make.cast(node_arg(low, node, 0), node.meta["val"].dtype))
    axes = Axes(low, node.args[0], value, node_arg(low, node, 1))
    top = axes.keep(axes.reduce("amax", value, value.dtype))
    inner = Point(low, None, top.shape, value.dtype)
    endless = inner.test("eq", inner.op("abs", top), math.inf)
    base = low.realise(inner.where(endless, 0, top), "base")
    point = Point(low, None, value.shape, value.dtype)
    total = axes.keep(axes.reduce("sum", point.op("exp", point.sub(value, base)), value.dtype))
    return low.reshape(inner.add(inner.op("log", total), base), low.shape(node))


@lowers("native_layer_norm")
def _layer_norm(low: Lowering, node: fx.Node) -> list[Expr]:
    value, size, weight, bias, eps = low.args(node)
    value = low.realise(value)
    rank = len(value.shape)
    axes = Axes(low, node.args[0], value, list(range(rank - len(size), rank)))
    mean, spread = moments(low, axes, value)
    inner = Point(low, None, mean.shape, value.dtype)
    variance = inner.div(spread, Count(low, axes.count).expr(value.dtype))
    rstd = low.realise(inner.op("rsqrt", inner.add(variance, eps)), "rstd")
    point = Point(low, None, value.shape, value.dtype)
    found = point.mul(point.sub(value, mean), rstd)
    if weight is not None:
        found = point.mul(found, weight)
    if bias is not None:
        found = point.add(found, bias)
    return [found, mean, rstd]


@lowers("native_layer_norm_backward")
def _layer_norm_backward(low: Lowering, node: fx.Node) -> list[Any]:
    grad, value, size, mean, rstd, weight = low.args(node)[:6]
    wanted = low.args(node)[-1]
    if (wanted[1] or wanted[2]) and any(u.args[1] != 0 and u.users for u in node.users):
        raise Unsupported("weight gradients of a layer norm inside the loop")
    rank = len(value.shape)
    axes = Axes(low, node.args[1], value, list(range(rank - len(size), rank)))
    point = Point(low, None, value.shape, value.dtype)
    normal = low.realise(point.mul(point.sub(value, mean), rstd), "normal")
    scaled = low.realise(point.mul(grad, weight) if weight is not None else point(grad), "scaled")
    first = axes.keep(axes.reduce("sum", scaled, value.dtype))
    second = axes.keep(axes.reduce("sum", point.mul(scaled, normal), value.dtype))
    inner = Point(low, None, first.shape, value.dtype)
    count = Count(low, axes.count).expr(value.dtype)
    first, second = low.realise(inner.div(first, count)), low.realise(inner.div(second, count))
    found = point.mul(rstd, point.sub(point.sub(scaled, first), point.mul(normal, second)))
    return [found, None, None]


@lowers("cumsum", "cumprod")
def _cumsum(low: Lowering, node: fx.Node) -> Expr:
    dtype = node.meta["val"].dtype
    value = low.make.cast(node_arg(low, node, 0), dtype)
    if not value.shape:
        return value
    dim = low.inner_or_unit(node.args[0], node_arg(low, node, 1))
    rank = len(value.shape)
    order = [d for d in range(rank) if d != dim] + [dim]
    moved = low.view(value, geometry.permute(order))
    target = whole(low.temp(moved.shape, dtype))
    low.emit(Scan(target, node.target.overloadpacket.__name__.removeprefix("cum"), moved))
    back = [order.index(d) for d in range(rank)]
    return low.view(low.make.load(target), geometry.permute(back))
