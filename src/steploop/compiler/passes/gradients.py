"""Gradients in forms of which each part can go its own way."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..ir.edit import call, calls, remove_dead, replace
from ..ir.graph import StepGraph, shape_of
from ..ops.table import operation_of

aten = torch.ops.aten


def free_of_buffers(step: StepGraph) -> None:
    """The gradient of log_sigmoid from its input: what the forward leaves for it is something on the CPU alone."""
    for node in calls(step, aten.log_sigmoid_backward.default):
        grad, x, _ = node.args
        if x.meta["val"].device.type != "cpu":
            slope = call(node, aten.sigmoid.default, call(node, aten.neg.default, x))
            replace(step, node, call(node, aten.mul.Tensor, grad, slope))
    remove_dead(step)


def expose_fixed_statistics(step: StepGraph) -> None:
    """The gradient of a batch norm in eval mode as arithmetic: it is one of a product and a sum."""
    for node in calls(step, aten.native_batch_norm_backward.default):
        if node.args[7] or any(u.target is not operator.getitem for u in node.users):
            continue
        for user in list(node.users):
            replace(step, user, _of_fixed_statistics(node, user.args[1]))
    remove_dead(step)


def _of_fixed_statistics(node: fx.Node, which: int) -> fx.Node:
    """The gradient of input, weight or bias."""
    grad, x, weight, mean, variance = node.args[:5]
    rank = len(shape_of(grad))

    def wide(value: fx.Node) -> fx.Node:
        return call(node, aten.view.default, value, [-1, *[1] * (rank - 2)])

    inverse = call(node, aten.rsqrt.default, call(node, aten.add.Tensor, variance, node.args[8]))
    if which == 0:
        scale = inverse if weight is None else call(node, aten.mul.Tensor, inverse, weight)
        return call(node, aten.mul.Tensor, grad, wide(scale))
    if which == 1:
        normal = call(node, aten.mul.Tensor, call(node, aten.sub.Tensor, x, wide(mean)), wide(inverse))
        grad = call(node, aten.mul.Tensor, grad, normal)
    return call(node, aten.sum.dim_IntList, grad, [0, *range(2, rank)])


def split_backward_calls(step: StepGraph) -> None:
    """A backward call that gives the gradients of input and weights becomes two: one may have to stay in the
    loop, the other never."""
    for node in calls(step):
        where = operation_of(node).mask
        if where is None or where >= len(node.args):
            continue
        mask = list(node.args[where])
        items = [u for u in node.users if u.target is operator.getitem]
        if len(items) != len(node.users) or not mask[0] or not any(mask[1:]):
            continue
        groups = {True: [True, False, False], False: [False, *mask[1:]]}
        for is_input, wanted in groups.items():
            chosen = [u for u in items if (u.args[1] == 0) == is_input]
            if not chosen:
                continue
            args = (*node.args[:where], wanted, *node.args[where + 1 :])
            with node.graph.inserting_before(node):
                part = node.graph.call_function(node.target, args, node.kwargs)
            part.meta.update(val=tuple(v if w else None for v, w in zip(node.meta["val"], wanted)),
                             line=node.meta.get("line", ""))  # fmt: skip
            for item in chosen:
                item.update_arg(0, part)
    remove_dead(step)
