"""torch's attention in a loop, as products and a softmax: the forms that a native loop can take, and of which parts
may leave the loop (a key that does not change is turned once). Outside loops it stays one call."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from ..ir.edit import call, calls, remove_dead, replace, sizes_of
from ..ir.graph import StepGraph, shape_of

aten = torch.ops.aten
_FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def expose_attention(step: StepGraph, in_loop: set[fx.Node]) -> bool:
    """Attention without dropout whose keys all have one head each, as for the CPU."""
    changed = False
    for node in calls(step, _FORWARD, _BACKWARD):
        if node not in in_loop or any(u.target is not operator.getitem for u in node.users) or not _plain(node):
            continue
        results = _forward(node) if node.target is _FORWARD else _backward(node)
        for user in list(node.users):
            replace(step, user, results[user.args[1]])
        changed = True
    remove_dead(step)
    return changed


def _plain(node: fx.Node) -> bool:
    dropout, causal = _options(node)
    query, key = _operands(node)[:2]
    wide = query.meta["val"].dtype in (torch.float32, torch.float64)
    return wide and dropout == 0.0 and not causal and shape_of(query)[:2] == shape_of(key)[:2]


def _options(node: fx.Node) -> tuple[float, bool]:
    at = 3 if node.target is _FORWARD else 6
    rest = (*node.args[at : at + 2], *(0.0, False)[len(node.args[at : at + 2]) :])
    return rest[0], rest[1]


def _operands(node: fx.Node) -> tuple[Any, ...]:
    """query, key, value (B, heads, L or S, E)"""
    return node.args[:3] if node.target is _FORWARD else node.args[1:4]


def _scores(node: fx.Node) -> fx.Node:
    """(B, heads, L, S): scaled products with the mask added, -inf where a bool mask forbids."""
    query, key, _ = _operands(node)
    scores = _product(node, _scaled(node, query), _turned(node, key))
    mask = node.kwargs.get("attn_mask")
    if mask is None:
        return scores
    if mask.meta["val"].dtype == torch.bool:
        return call(node, aten.where.ScalarOther, mask, scores, -math.inf)
    return call(node, aten.add.Tensor, scores, mask)


def _scaled(node: fx.Node, value: fx.Node) -> fx.Node:
    scale = node.kwargs.get("scale")
    width = _operands(node)[0].meta["val"].shape[-1]
    return call(node, aten.mul.Tensor, value, 1 / math.sqrt(width) if scale is None else scale)


def _product(node: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
    """(B, heads, m, k) times (B, heads, k, n)"""
    left, right = a.meta["val"], b.meta["val"]
    rows = left.shape[0] * left.shape[1]
    flat = [call(node, aten.reshape.default, v, sizes_of((rows, *v.meta["val"].shape[2:]))) for v in (a, b)]
    product = call(node, aten.bmm.default, *flat)
    shape = (left.shape[0], left.shape[1], left.shape[2], right.shape[3])
    return call(node, aten.reshape.default, product, sizes_of(shape))


def _turned(node: fx.Node, value: fx.Node) -> fx.Node:
    return call(node, aten.transpose.int, value, -2, -1)


def _forward(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The output and, (B, heads, L), the logarithm of the softmax' denominators; both zero for what may look at
    nothing."""
    scores = _scores(node)
    top = call(node, aten.amax.default, scores, [-1], True)
    top = call(node, aten.where.ScalarSelf, call(node, aten.eq.Scalar, top, -math.inf), 0.0, top)
    powers = call(node, aten.exp.default, call(node, aten.sub.Tensor, scores, top))
    total = call(node, aten.sum.dim_IntList, powers, [-1], True)
    total = call(node, aten.where.ScalarSelf, call(node, aten.eq.Scalar, total, 0), 1.0, total)
    output = _product(node, call(node, aten.div.Tensor, powers, total), node.args[2])
    logarithm = call(node, aten.add.Tensor, top, call(node, aten.log.default, total))
    return output, call(node, aten.squeeze.dim, logarithm, -1)


def _backward(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The gradients of query, key and value."""
    grad, query, key, value, output, logarithm = node.args[:6]
    wide = call(node, aten.unsqueeze.default, logarithm, -1)
    weights = call(node, aten.exp.default, call(node, aten.sub.Tensor, _scores(node), wide))
    slope = _product(node, grad, _turned(node, value))
    mean = call(node, aten.sum.dim_IntList, call(node, aten.mul.Tensor, grad, output), [-1], True)
    of_scores = call(node, aten.mul.Tensor, weights, call(node, aten.sub.Tensor, slope, mean))
    of_query = _scaled(node, _product(node, of_scores, key))
    of_key = _product(node, _turned(node, of_scores), _scaled(node, query))
    return of_query, of_key, _product(node, _turned(node, weights), grad)
