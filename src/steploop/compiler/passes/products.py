"""Products and sums: parts of them that do not depend on a loop leave it."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import fx

from ..ir.edit import argument, call, calls, remove_dead, replace
from ..ir.graph import StepGraph, shape_of

aten = torch.ops.aten


def expose_products(step: StepGraph) -> None:
    """addmm and baddbmm as a product and a sum, so that each can go its own way."""
    for node in calls(step, aten.addmm.default, aten.baddbmm.default):
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1 or len(node.args) > 3:
            continue
        bias, a, b = node.args
        kind = aten.mm.default if node.target is aten.addmm.default else aten.bmm.default
        product = call(node, kind, a, b)
        replace(step, node, call(node, aten.add.Tensor, product, bias))
    for node in calls(step, aten.linear.default):
        if len(shape_of(node.args[0])) == 2:
            result = call(node, aten.mm.default, node.args[0], call(node, aten.t.default, node.args[1]))
            bias = argument(node, 2, "bias", None)
            replace(step, node, result if bias is None else call(node, aten.add.Tensor, result, bias))
    remove_dead(step)


def split_products(step: StepGraph, in_loop: set[fx.Node]) -> bool:
    """linear(cat(a, b)) = linear_a(a) + linear_b(b) where only b is in the loop, and the transpose of that: a
    product of which one slice is needed in the loop and another outside becomes two products."""
    changed = False
    for node in calls(step, aten.mm.default):
        if node not in in_loop or node.args[1] in in_loop:
            continue
        changed |= _split_sum(step, node, in_loop) or _split_result(step, node, in_loop)
    remove_dead(step)
    return changed


def _split_sum(step: StepGraph, node: fx.Node, in_loop: set[fx.Node]) -> bool:
    left, right = node.args
    parts = _columns(left)
    if parts is None or all(p in in_loop for p in parts):
        return False
    total: Any = None
    start = 0
    for _, group in groupby(parts, key=in_loop.__contains__):
        run = list(group)
        width = sum(shape_of(p)[1] for p in run)
        joined = run[0] if len(run) == 1 else call(node, aten.cat.default, run, 1)
        weight = call(node, aten.slice.Tensor, right, 0, start, start + width)
        product = call(node, aten.mm.default, joined, weight)
        total = product if total is None else call(node, aten.add.Tensor, total, product)
        start += width
    replace(step, node, total)
    return True


def _split_result(step: StepGraph, node: fx.Node, in_loop: set[fx.Node]) -> bool:
    users = list(node.users)
    if len(users) < 2 or node in step.results() or not all(_is_column_slice(u, node) for u in users):
        return False
    if len({u in in_loop for u in users}) < 2:
        return False
    for user in users:
        right = call(user, aten.slice.Tensor, node.args[1], 1, *user.args[2:4])
        replace(step, user, call(user, aten.mm.default, node.args[0], right))
    return True


def _columns(node: Any) -> list[fx.Node] | None:
    """The parts of a concatenation along axis 1 of matrices, all of known width."""
    if not isinstance(node, fx.Node) or node.target is not aten.cat.default:
        return None
    if argument(node, 1, "dim", 0) not in (1, -1) or len(shape_of(node)) != 2:
        return None
    parts = list(node.args[0])
    ok = all(len(shape_of(p)) == 2 and isinstance(shape_of(p)[1], int) for p in parts)
    # Weight gradients multiply a transposed cotangent from the left: there the concatenation stays whole.
    return parts if ok and len(parts) > 1 else None


def _is_column_slice(user: fx.Node, node: fx.Node) -> bool:
    if user.target is not aten.slice.Tensor or user.args[0] is not node or len(user.args) != 4:
        return False
    return user.args[1] in (1, -1) and all(isinstance(a, int) for a in user.args[2:4])


def narrow_products(step: StepGraph, in_loop: set[fx.Node]) -> bool:
    """Where only some columns of a product are read: the product with those columns of the weight.

    A step that multiplies cat([x, h]) by one weight has such a product in its gradient, where x needs none.
    """
    changed = False
    for node in reversed(calls(step, aten.slice.Tensor)):
        if not node.users or not _is_column_slice(node, node.args[0]) or shape_of(node) == shape_of(node.args[0]):
            continue
        if (narrow := _narrowed(step, node.args[0], node)) is not None:
            replace(step, node, narrow)
            changed = True
    remove_dead(step)
    return changed


def _narrowed(step: StepGraph, value: Any, part: fx.Node) -> fx.Node | None:
    """The columns of a value that `part` takes, made without the others; None where that saves no product."""
    if not isinstance(value, fx.Node) or len(value.users) > 1 or value in step.results():
        return None
    if value.target is aten.mm.default:
        left, right = value.args
        return call(part, aten.mm.default, left, call(part, aten.slice.Tensor, right, 1, *part.args[2:4]))
    if not _plain_sum(value) or any(shape_of(a) != shape_of(value) for a in value.args):
        return None
    terms = [_narrowed(step, a, part) for a in value.args]
    if all(t is None for t in terms):
        return None
    pairs = zip(terms, value.args)
    whole = [call(part, aten.slice.Tensor, a, *part.args[1:]) if t is None else t for t, a in pairs]
    return call(part, aten.add.Tensor, *whole)


def distribute(step: StepGraph, in_loop: set[fx.Node]) -> bool:
    """W(a + b) = W a + W b where only b is in the loop: the product of a leaves it."""
    changed = False
    for node in calls(step, aten.mm.default):
        left, right = node.args
        if node not in in_loop or right in in_loop or left not in in_loop or not _plain_sum(left):
            continue
        a, b = left.args
        if (a in in_loop) == (b in in_loop) or not shape_of(a) == shape_of(b) == shape_of(left):
            continue
        parts = [call(node, aten.mm.default, part, right) for part in (a, b)]
        replace(step, node, call(node, aten.add.Tensor, *parts))
        changed = True
    remove_dead(step)
    return changed


def gather_sums(step: StepGraph, in_loop: set[fx.Node]) -> bool:
    """In a sum of several terms, those from outside the loop are added up outside."""
    changed = False
    for node in reversed(calls(step, aten.add.Tensor)):
        if node not in in_loop or not _plain_sum(node) or _continues(node, in_loop):
            continue
        terms = _terms(node, in_loop)
        outside = [t for t in terms if t not in in_loop]
        inside = [t for t in terms if t in in_loop]
        if len(outside) < 2 or not inside:
            continue
        # Small terms (biases) first: the large array is then gone over once.
        first, *rest = sorted(outside, key=lambda t: len(shape_of(t)))
        total = first
        for term in rest:
            total = call(node, aten.add.Tensor, term, total)
        result = inside[0]
        for term in inside[1:]:
            result = call(node, aten.add.Tensor, result, term)
        result = call(node, aten.add.Tensor, result, total)
        if shape_of(result) == shape_of(node) and result.meta["val"].dtype == node.meta["val"].dtype:
            replace(step, node, result)
            changed = True
    remove_dead(step)
    return changed


def _plain_sum(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return False
    if not all(isinstance(a, fx.Node) for a in node.args):
        return False
    dtypes = {a.meta["val"].dtype for a in node.args}
    return len(dtypes) == 1 and node.meta["val"].dtype.is_floating_point


def _continues(node: fx.Node, in_loop: set[fx.Node]) -> bool:
    """Whether the only use of a sum is a larger sum."""
    users = list(node.users)
    return len(users) == 1 and _plain_sum(users[0]) and users[0] in in_loop


def _terms(node: fx.Node, in_loop: set[fx.Node]) -> list[fx.Node]:
    terms: list[fx.Node] = []
    for part in node.args:
        inner = _plain_sum(part) and len(part.users) == 1 and part.args[0] is not part.args[1]
        terms.extend(_terms(part, in_loop) if inner else [part])
    return terms
