"""Random numbers leave the loop: what does not depend on it is drawn outside, for all steps at once.

Draws in the shape of a state (rand_like, dropout's mask) depend on sizes only. Where the distribution depends on
the loop, a standard draw outside is followed by arithmetic inside: what torch does itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..ir.edit import argument, call, calls, made, remove_dead, replace, sizes_of
from ..ir.graph import StepGraph

aten = torch.ops.aten


def hoist_masks(step: StepGraph, in_loop: set[fx.Node]) -> bool:
    """native_dropout in a loop as a mask, which depends on nothing but sizes, and a product."""
    changed = False
    for node in calls(step, aten.native_dropout.default):
        x, p, train = node.args
        rows = x.meta["rows"]
        if node not in in_loop or train is False or not (rows is None or rows.outer == 1):
            continue
        value, mask = node.meta["val"]
        zeros = made(node, aten.zeros.default, sizes_of(value.shape), like=value)
        kept = call(node, aten.bernoulli.p, zeros, 1 - p)
        scaled = call(node, aten.mul.Tensor, kept, 0.0 if p == 1 else 1 / (1 - p))
        kept = call(node, aten._to_copy.default, kept, dtype=mask.dtype)
        results = (call(node, aten.mul.Tensor, x, scaled), kept)
        for user in list(node.users):
            replace(step, user, results[user.args[1]])
        changed = True
    remove_dead(step)
    return changed


def hoist_draws(step: StepGraph, in_loop: set[fx.Node]) -> bool:
    """Random numbers are drawn outside the loop, for all steps at once: in the shape of a state (rand_like,
    dropout's mask) as well, and where their distribution depends on the loop, as standard ones and arithmetic."""
    changed = False
    for node in calls(step):
        rows = node.meta.get("rows")
        # Sizes alone tell where the rows are, unless something stands in front of them in one axis.
        if node in in_loop and node.target in _DRAWS and (rows is None or rows.outer == 1):
            drawn = _DRAWS[node.target](node)
            if drawn is not None:
                replace(step, node, drawn)
                changed = True
    remove_dead(step)
    return changed


def _like_another(target: Any, sizes_at: int) -> Callable[[fx.Node], fx.Node]:
    """rand_like(a) = rand(sizes of a)"""

    def draw(node: fx.Node) -> fx.Node:
        like = node.meta["val"]
        return made(node, target, *node.args[1:sizes_at], sizes_of(like.shape), like=like)

    return draw


def _written_over(node: fx.Node) -> fx.Node | None:
    """a.uniform_(): nothing of a is read."""
    source = node.args[0].meta["val"]
    zeros = made(node, aten.zeros.default, sizes_of(source.shape), like=source)
    return call(node, node.target, zeros, *node.args[1:], **node.kwargs)


def _standard(node: fx.Node) -> bool:
    """Whether a draw is from torch's own generator, in a dtype whose standard draws are as fine as torch's."""
    return node.kwargs.get("generator") is None and node.meta["val"].dtype in (torch.float32, torch.float64)


def _bernoulli(node: fx.Node) -> fx.Node | None:
    """bernoulli(p) = (uniform < p); nan where torch would complain that p is no probability."""
    p, like = node.args[-1], node.meta["val"]
    if not _standard(node) or p.meta["val"].dtype != like.dtype:
        return None
    uniform = made(node, aten.rand.default, sizes_of(like.shape), like=like)
    drawn = call(node, aten._to_copy.default, call(node, aten.lt.Tensor, uniform, p), dtype=like.dtype)
    valid = call(node, aten.eq.Tensor, call(node, aten.clamp.default, p, 0, 1), p)
    return call(node, aten.where.ScalarOther, valid, drawn, float("nan"))


def _normal(node: fx.Node) -> fx.Node | None:
    """normal(mean, std) = mean + std * standard normal; nan where torch would complain that std is negative."""
    mean, std, like = argument(node, 0, "mean", 0.0), argument(node, 1, "std", 1.0), node.meta["val"]
    if not _standard(node):
        return None
    if isinstance(std, fx.Node):
        std = call(node, aten.where.ScalarOther, call(node, aten.ge.Scalar, std, 0), std, float("nan"))
    drawn = made(node, aten.randn.default, sizes_of(like.shape), like=like)
    return call(node, aten.add.Tensor, call(node, aten.mul.Tensor, drawn, std), mean)


def _multinomial(node: fx.Node) -> fx.Node | None:
    """Draws without replacement, or one, are the largest p / exponential. Whether p is valid is not checked."""
    p, count = node.args[:2]
    like, replacement = p.meta["val"], argument(node, 2, "replacement", False)
    if (replacement and count != 1) or node.kwargs.get("generator") is not None or not like.dtype.is_floating_point:
        return None
    zeros = made(node, aten.zeros.default, sizes_of(like.shape), like=like)
    scores = call(node, aten.div.Tensor, p, call(node, aten.exponential.default, zeros))
    if count == 1:
        return call(node, aten.argmax.default, scores, -1, True)
    best = call(node, aten.topk.default, scores, count)
    with node.graph.inserting_before(node):
        index = node.graph.call_function(operator.getitem, (best, 1))
    index.meta.update(val=node.meta["val"], line=node.meta.get("line", ""))
    return index


_DRAWS: dict[Any, Callable[[fx.Node], fx.Node | None]] = {
    aten.rand_like.default: _like_another(aten.rand.default, 1),
    aten.randn_like.default: _like_another(aten.randn.default, 1),
    aten.randint_like.default: _like_another(aten.randint.default, 2),
    aten.randint_like.low_dtype: _like_another(aten.randint.low, 3),
    **dict.fromkeys([aten.bernoulli.p, aten.uniform.default, aten.normal_functional.default, aten.geometric.default,
                     aten.exponential.default, aten.cauchy.default, aten.log_normal.default], _written_over),
    aten.bernoulli.default: _bernoulli, aten.bernoulli.Tensor: _bernoulli, aten.multinomial.default: _multinomial,
    **dict.fromkeys([aten.normal.Tensor_float, aten.normal.float_Tensor, aten.normal.Tensor_Tensor], _normal),
}  # fmt: skip
