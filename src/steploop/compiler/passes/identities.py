"""Removes what changes nothing, and what is computed twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..ir.edit import argument, call, calls, made, remove_dead, replace, sizes_of
from ..ir.graph import Size, StepGraph, expression, shape_of
from ..ops.table import is_random

aten = torch.ops.aten
_END = 2**63 - 1


def remove_identities(step: StepGraph) -> None:
    """Copies, full slices, views and casts that change nothing."""
    for node in calls(step):
        same = _same_as(node)
        if same is not None and same is not node:
            replace(step, node, same)
    remove_dead(step)


def _same_as(node: fx.Node) -> fx.Node | None:
    plain: Any = _PLAIN_FORMS.get(node.target, node.target)
    node.target = plain
    target, args = node.target, node.args
    if target is aten.copy.default:
        return _copied(node)
    if target in (aten.new_zeros.default, aten._efficientzerotensor.default):  # (the second holds no numbers)
        like = node.meta["val"]
        node.target, node.args = aten.zeros.default, (args[0] if target is not aten.new_zeros.default else args[1],)
        node.kwargs = {"dtype": like.dtype, "device": like.device}
        return None
    if target in (aten.view.default, aten.expand.default, aten.reshape.default, aten._unsafe_view.default):
        source = args[0]
        if shape_of(source) == shape_of(node):
            return source
        if target is not aten.expand.default:
            if -1 in args[1]:  # no rows at all leave it open what -1 stands for
                shape: list[Any] = [s if isinstance(s, int) else Size(s) for s in shape_of(node)]
                args = node.args = (source, shape)
            node.target = aten.view.default if target is not aten.reshape.default else target
            if source.target is aten.view.default and target is not aten.reshape.default:
                node.args = (source.args[0], args[1])
        return None
    if not args or not isinstance(args[0], fx.Node):
        return None
    if target is aten._to_copy.default:
        source = args[0].meta["val"]
        return args[0] if (source.dtype, source.device) == (node.meta["val"].dtype, node.meta["val"].device) else None
    if target is aten.slice.Tensor and shape_of(args[0]) == shape_of(node):
        return args[0] if argument(node, 4, "step", 1) == 1 else None
    if target is aten.slice_scatter.default:
        _within_the_axis(node)
        if shape_of(args[0]) == shape_of(args[1]):
            return args[1]
    if target is aten.slice_backward.default and shape_of(args[0]) == shape_of(node):
        return args[0]
    if target is aten.t.default and isinstance(args[0], fx.Node) and args[0].target is aten.t.default:
        return args[0].args[0]
    if target in (aten.squeeze.dims, aten.squeeze.dim) and shape_of(args[0]) == shape_of(node):
        return args[0]
    return None


def _within_the_axis(node: fx.Node) -> None:
    """Where to write as places of the axis: `x[2:]` has the largest number there is for its end, `x[-2:]` a start that
    counts from the end, and torch's vmap computes with them as they are."""
    dim, step = argument(node, 2, "dim", 0), argument(node, 5, "step", 1)
    start, end = argument(node, 3, "start", None), argument(node, 4, "end", None)
    size = sizes_of(node.meta["val"].shape)[dim]
    if isinstance(size, int):
        start, end, _ = slice(start, end).indices(size) if _numbers(start, end) else (start, end, 1)
    elif isinstance(end, int) and end >= _END:
        end = size
    start, end = 0 if start is None else start, size if end is None else end
    node.args, node.kwargs = (*node.args[:2], dim, start, end, step), {}


def _numbers(*values: Any) -> bool:
    return all(value is None or isinstance(value, int) for value in values)


_PLAIN_FORMS = {
    aten.unsafe_split.Tensor: aten.split.Tensor,
    aten.unsafe_split_with_sizes.default: aten.split_with_sizes.default,
}


def _copied(node: fx.Node) -> fx.Node:
    """copy(a, b) is b in a's shape and dtype."""
    source, like = node.args[1], node.meta["val"]
    if source.meta["val"].dtype != like.dtype:
        source = call(node, aten._to_copy.default, source, dtype=like.dtype)
    if shape_of(source) != tuple(expression(s) for s in like.shape):
        sizes = [Size(e) if not isinstance(e, int) else e for e in map(expression, like.shape)]
        source = call(node, aten.expand.default, source, sizes)
    return source


def remove_duplicates(step: StepGraph) -> None:
    """Common subexpressions."""
    known: dict[Any, fx.Node] = {}
    for node in calls(step):
        if is_random(node):
            continue
        key = (node.target, _key(node.args), _key(tuple(sorted(node.kwargs.items()))))
        try:
            first = known.setdefault(key, node)
        except TypeError:
            continue
        if first is not node:
            replace(step, node, first)
    remove_dead(step)


def _key(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return tuple(_key(a) for a in argument)
    if isinstance(argument, float):
        return ("float", repr(argument))
    return (type(argument), argument)


def free_constants(step: StepGraph) -> None:
    """new_zeros, ones_like and the like of known sizes depend on no value: they are the same at every step."""
    for node in calls(step):
        target = _FROM_SIZES.get(node.target)
        if target is None or not all(isinstance(size, int) for size in shape_of(node)):
            continue
        like = node.meta["val"]
        filled = node.args[2:3] if node.target is aten.new_full.default else node.args[1:2]
        args = (sizes_of(like.shape), *(filled if target is aten.full.default else ()))
        replace(step, node, made(node, target, *args, like=like))
    remove_dead(step)


_FROM_SIZES = {
    **dict.fromkeys([aten.new_zeros.default, aten.zeros_like.default], aten.zeros.default),
    **dict.fromkeys([aten.new_ones.default, aten.ones_like.default], aten.ones.default),
    **dict.fromkeys([aten.new_full.default, aten.full_like.default], aten.full.default),
}  # fmt: skip
