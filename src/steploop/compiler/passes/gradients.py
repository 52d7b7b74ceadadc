"""Gradients in forms of which each part can go its own way."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

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


def factor_for_gradients(step: StepGraph) -> None:
    """What the gradients of det, slogdet and solve read of the forward is factored by a call of its own.

    torch leaves them the LU factors of the matrix or of its transpose, whichever suits its strides, and the gradient
    was captured for the strides of that moment. Loops and batched pieces have others, and a capture has no copies.
    """
    for node in calls(step, *FIRST_FACTOR):
        first, matrix = FIRST_FACTOR[node.target], node.args[0]
        items = [u for u in node.users if u.target is operator.getitem and first <= u.args[1] < first + 2]
        transposed = _leaves_transposed(node.target, node.meta["contiguous"])
        if not items or (node.target is aten._linalg_solve_ex.default and not transposed):
            continue
        if transposed:
            matrix = call(node, aten.transpose.int, matrix, -2, -1)
        factors = call(node, aten.linalg_lu_factor_ex.default, matrix)
        for item in items:
            which = item.args[1] - first
            item.args = (factors, which)
            item.meta["val"] = factors.meta["val"][which]
    remove_dead(step)


FIRST_FACTOR: dict[Any, int] = {
    aten._linalg_det.default: 1, aten._linalg_slogdet.default: 2, aten._linalg_solve_ex.default: 1
}  # fmt: skip


@functools.cache
def _leaves_transposed(target: Any, is_contiguous: bool) -> bool:
    """Whether the factors are those of the transpose, in this version of torch."""
    with _disable_current_modes(), torch.no_grad():
        matrix = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64, device="cpu")
        matrix = matrix if is_contiguous else matrix.t().contiguous().t()
        given = (matrix, matrix) if target is aten._linalg_solve_ex.default else (matrix,)
        lu = target(*given)[FIRST_FACTOR[target]]
        return lu[0, 0].item() == 2.0  # the largest number of the first row, not of the first column


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
