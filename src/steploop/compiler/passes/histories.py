"""Finds histories that a step only multiplies and sums, and takes those products with all frames at once.

Where a step does nothing with a `History` but scores of a query with all frames so far, or a weighted sum of them,
written as matrix products, einsum, or a product and a sum, the (T, B, C, ...) of all steps is never made: see
`history_products`. In a graph with gradients the backward half holds the same products once more, and the cotangent
of a history is a sum of outer products. A history that anything else reads, or that is read in a loop, stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from ..history_products import history_cotangent, history_scores, history_sums
from ..ir.edit import call, remove_dead, replace
from ..ir.graph import Rows, Size, StepGraph, expression, shape_of
from ..memory_operator import MemoryCall, call_of
from ..partition import needed_nodes, recurrent_components
from ..problem import joint_problem_of
from ..stages import stage
from .axes import Label, aligned, backwards, flat, forwards, product_of
from .identities import remove_identities
from .manager import find_mixing

aten = torch.ops.aten

class _Elsewhere(Exception):
    """The history is used in a way that needs it as it is."""


@dataclass(eq=False)
class _Read:
    """A product with a history: `node` is to be replaced by build(frames, lengths, ends, layout)."""

    node: fx.Node
    inner: list[Label]
    rest: list[Label]
    build: Callable[..., fx.Node]


@dataclass(eq=False)
class _Found:
    """A history that only products read. views: its nodes; factors: what it is multiplied with."""

    memory: fx.Node
    backward: fx.Node | None
    axes: list[list[Label]]
    reads: list[_Read] = field(default_factory=list)
    terms: list[_Read] = field(default_factory=list)
    views: set[fx.Node] = field(default_factory=set)
    factors: set[fx.Node] = field(default_factory=set)


def use_whole_histories(step: StepGraph) -> list[MemoryCall]:
    """Rewrites products with histories in place; returns the calls that the graph refers to from then on."""
    candidates = [n for n in step.graph.nodes if n.target is torch.ops.steploop.memory.default and call_of(n).frames]
    if not candidates or step.batch is None or find_mixing(step, [*step.outputs, *step.nexts]):
        return []
    looped = _in_loops(step)
    made: list[MemoryCall] = []
    for memory in candidates:
        try:
            found = _search(step, memory, looped)
        except _Elsewhere:
            continue
        made.append(_rewrite(step, found))
    if made:
        remove_dead(step)
        remove_identities(step)
        step.edited()
        stage("use_whole_histories", step)
    return made


def _in_loops(step: StepGraph) -> set[fx.Node]:
    """Every node in a loop, but for operations that are one by themselves."""
    problem = joint_problem_of(step)
    return {n for c in recurrent_components(problem, needed_nodes(problem)) for n in c}


def _search(step: StepGraph, memory: fx.Node, looped: set[fx.Node]) -> _Found:
    values = [u for u in memory.users if u.target is operator.getitem and u.args[1] == 0]
    handle = memory.args[1]
    backward = [n for n in step.graph.nodes
                if n.target is torch.ops.steploop.memory_backward.default and n.args[2] == handle]  # fmt: skip
    if len(backward) > 1:
        raise _Elsewhere
    shape = list(map(expression, memory.meta["val"][0].shape))
    if shape[1] == 1 or not all(isinstance(s, int) for s in shape[2:]):
        raise _Elsewhere
    features = [[Label(s)] if s != 1 else [] for s in shape[2:]]
    axes = [[Label(shape[0], whole=True)], [Label(shape[1], whole=True)], *features]
    found = _Found(memory, backward[0] if backward else None, axes)
    for value in values:
        _Reader(step, found, looped).read(value, axes)
    if found.views & found.factors:
        raise _Elsewhere  # squared
    if found.backward is not None:
        _Writer(found, looped).write(found.backward.args[0][0], axes)
    return found


class _Reader:
    """Follows a history through changes of its shape to the products that read it."""

    def __init__(self, step: StepGraph, found: _Found, looped: set[fx.Node]):
        self.found, self.looped = found, looped
        self.results = set(step.results())

    def read(self, node: fx.Node, axes: list[list[Label]]) -> None:
        if node in self.results:
            raise _Elsewhere
        self.found.views.add(node)
        for user in list(node.users):
            if user.target is aten.bmm.default:
                self._matrix_product(user, node, axes)
            elif user.target is aten.mul.Tensor:
                self._product(user, node, axes)
            else:
                after = forwards(user, axes)
                if after is None:
                    raise _Elsewhere
                self.read(user, after)

    def _matrix_product(self, node: fx.Node, history: fx.Node, axes: list[list[Label]]) -> None:
        left = node.args[0] is history
        other = node.args[1 if left else 0]
        self.found.factors.add(other)
        if node in self.looped:
            raise _Elsewhere
        inner, rest, across = _matrices(self.found, axes)
        _check_rows(other, inner)
        # Scores sum over the features, sums over the slots: whichever axis the other factor shares.
        kind = history_scores if across != left else history_sums

        def build(before: fx.Node, *frames: Any) -> fx.Node:
            a = call(before, aten.transpose.int, other, 1, 2) if left else other
            shape = _transposed(node) if left else shape_of(node)
            result = _product_call(before, kind, node, shape, a, *frames)
            return call(before, aten.transpose.int, result, 1, 2) if left else result

        self.found.reads.append(_Read(node, inner, rest, build))

    def _product(self, node: fx.Node, history: fx.Node, axes: list[list[Label]]) -> None:
        other = node.args[1] if node.args[0] is history else node.args[0]
        if not isinstance(other, fx.Node) or node in self.looped or node in self.results:
            raise _Elsewhere
        self.found.factors.add(other)
        other, factor, axes = aligned(other, axes, shape_of(node))
        for user in list(node.users):
            if user.target is not aten.sum.dim_IntList or user.kwargs or user in self.looped:
                raise _Elsewhere
            self._sum(user, other, factor, axes)

    def _sum(self, node: fx.Node, other: fx.Node, factor: list[list[Label]], axes: list[list[Label]]) -> None:
        """sum(other * history): factor and axes say which axes of the product each of both has."""
        rows, slots = self.found.axes[0][0], self.found.axes[1][0]
        dims = {d % len(axes) for d in node.args[1]}
        keep = len(node.args) > 2 and node.args[2]
        summed = {x for d in dims for x in flat(axes[d])}
        features = _features(self.found)
        more = [x for x in _all(axes) if x not in features and x not in (rows, slots)]
        has = set(_all(factor))
        if rows not in has or rows in summed or any(x in summed for x in more):
            raise _Elsewhere
        scores = slots not in summed
        if scores and slots in has or not scores and any(x in summed for x in features):
            raise _Elsewhere
        rest = [x for x in features if (x in summed if scores else x not in has)]
        inner = [x for x in features if x not in rest]
        out = [[] if d in dims else flat(axes[d]) for d in range(len(axes)) if keep or d not in dims]

        def build(before: fx.Node, *frames: Any) -> fx.Node:
            last, kept = (rest, [slots]) if scores else ([slots], rest)
            a = arranged(before, other, factor, [[rows, *inner], more, last])
            groups = [[rows, *inner], more, kept]
            shape = [product_of(g) for g in groups]
            kind = history_scores if scores else history_sums
            result = _product_call(before, kind, node, shape, a, *frames)
            return arranged(before, result, groups, out)

        self.found.reads.append(_Read(node, inner, rest, build))


class _Writer:
    """Follows the cotangent of a history back to the products that it is the sum of."""

    def __init__(self, found: _Found, looped: set[fx.Node]):
        self.found, self.looped = found, looped

    def write(self, node: fx.Node, axes: list[list[Label]]) -> None:
        if node in self.looped:
            raise _Elsewhere
        if node.target in (aten.zeros.default, aten.zeros_like.default):
            return
        if node.target is aten.add.Tensor and not node.kwargs:
            if any(not isinstance(a, fx.Node) or shape_of(a) != shape_of(node) for a in node.args):
                raise _Elsewhere
            for part in node.args:
                self.write(part, axes)
        elif node.target is aten.bmm.default:
            self._matrix_product(node, axes)
        elif node.target is aten.mul.Tensor:
            self._product(node, axes)
        else:
            before = backwards(node, axes)
            if before is None:
                raise _Elsewhere
            self.write(node.args[0], before)

    def _matrix_product(self, node: fx.Node, axes: list[list[Label]]) -> None:
        inner, rest, across = _matrices(self.found, axes)
        for factor in node.args:
            _check_rows(factor, inner)

        def build(before: fx.Node, *places: Any) -> fx.Node:
            left, right = node.args
            turned = call(before, aten.transpose.int, left, 1, 2)
            weights, a = (right, turned) if across else (turned, right)
            return _cotangent_call(before, node, self.found, weights, a, *places)

        self.found.terms.append(_Read(node, inner, rest, build))

    def _product(self, node: fx.Node, axes: list[list[Label]]) -> None:
        """An outer product: one factor is the same for all slots, the other for some features."""
        if any(not isinstance(a, fx.Node) for a in node.args):
            raise _Elsewhere
        rows, slots = self.found.axes[0][0], self.found.axes[1][0]
        factors = [aligned(a, axes, shape_of(node))[:2] for a in node.args]
        weights = [i for i in (0, 1) if slots in _all(factors[i][1])]
        if len(weights) != 1 or any(rows not in _all(f) for _, f in factors):
            raise _Elsewhere
        (weight, has), (a, a_has) = factors[weights[0]], factors[1 - weights[0]]

        def build(before: fx.Node, *places: Any) -> fx.Node:
            inner, rest = read.inner, read.rest
            p = arranged(before, weight, has, [[rows, *inner], [], [slots]])
            q = arranged(before, a, a_has, [[rows, *inner], [], rest])
            return _cotangent_call(before, node, self.found, p, q, *places)

        features, own = _features(self.found), set(_all(has))
        read = _Read(node, [x for x in features if x in own], [x for x in features if x not in own], build)
        self.found.terms.append(read)


def _all(axes: list[list[Label]]) -> list[Label]:
    return [x for group in axes for x in flat(group)]


def _features(found: _Found) -> list[Label]:
    return _all(found.axes[2:])


def _matrices(found: _Found, axes: list[list[Label]]) -> tuple[list[Label], list[Label], bool]:
    """A history as (B * inner, C, rest) or (B * inner, rest, C): inner, rest, and whether it is the latter."""
    rows, slots = found.axes[0][0], found.axes[1][0]
    if len(axes) != 3:
        raise _Elsewhere
    first, second, third = map(flat, axes)
    if not first or first[0] is not rows or slots in first:
        raise _Elsewhere
    if second == [slots]:
        return first[1:], third, False
    if third == [slots]:
        return first[1:], second, True
    raise _Elsewhere


def _check_rows(node: fx.Node, inner: list[Label]) -> None:
    if node.meta["rows"] != Rows(0, 1, product_of(inner)):
        raise _Elsewhere


# -- rewriting -------------------------------------------------------------------------------------------------


def arranged(before: fx.Node, node: fx.Node, axes: list[list[Label]], groups: list[list[Label]]) -> fx.Node:
    """A value with its axes (each some labels, or none for size 1) in another order and grouping.

    Labels that it lacks are axes along which it is repeated.
    """
    has, wanted = _all(axes), _all(groups)
    node = call(before, aten.reshape.default, node, [_size(x.size) for x in has])
    missing = [x for x in wanted if x not in has]
    for _ in missing:
        node = call(before, aten.unsqueeze.default, node, -1)
    order = [*has, *missing]
    if missing:
        node = call(before, aten.expand.default, node, [_size(x.size) for x in order])
    node = call(before, aten.permute.default, node, [order.index(x) for x in wanted])
    return call(before, aten.reshape.default, node, [_size(product_of(g)) for g in groups])


def _size(size: Any) -> Any:
    return size if isinstance(size, int) else Size(size)


def _transposed(node: fx.Node) -> list[Any]:
    a, b, c = shape_of(node)
    return [a, c, b]


def _product_call(
    before: fx.Node, kind: Callable[..., Any], like: fx.Node, shape: Sequence[Any], *args: Any
) -> fx.Node:
    with before.graph.inserting_before(before):
        node = before.graph.call_function(kind, args)
    value = like.meta["val"]
    node.meta.update(val=_fake(value, shape), line=like.meta.get("line", ""))
    return node


def _fake(like: Any, shape: Sequence[Any]) -> Tensor:
    """A fake tensor of another shape."""
    mode = like.fake_mode
    sizes = [s if isinstance(s, int) else mode.shape_env.create_symintnode(s, hint=None) for s in shape]
    with _disable_current_modes(), mode:
        return torch.empty(sizes, dtype=like.dtype, device=like.device)


def _cotangent_call(
    before: fx.Node, like: fx.Node, found: _Found, weights: fx.Node, a: fx.Node, *places: Any
) -> fx.Node:
    lengths, ends, *layout = places
    shape = list(map(expression, found.memory.meta["val"][0].shape))
    return _product_call(before, history_cotangent, like, shape, weights, a, lengths, ends, shape[2:], *layout)


def _rewrite(step: StepGraph, found: _Found) -> MemoryCall:
    old = found.memory
    made = call_of(old).with_frames()
    with old.graph.inserting_after(old):
        memory = old.graph.call_function(old.target, (old.args[0], made.handle), old.kwargs)
    value, lengths, *rest = old.meta["val"]
    memory.meta.update(old.meta, val=[value, lengths, lengths, *rest])
    parts = {i: _part(memory, i) for i in range(3)}
    for user in list(old.users):
        index = user.args[1]
        if index == 0:
            continue
        replace(step, user, parts[index] if index < 2 else _part(memory, index + 1))
    features = _features(found)
    sizes = [x.size for x in features]

    def layout(read: _Read) -> tuple[list[int], list[int], list[int]]:
        inner, rest = flat(read.inner), flat(read.rest)
        return sizes, [features.index(x) for x in inner], [features.index(x) for x in rest]

    for read in found.reads:
        replace(step, read.node, read.build(read.node, parts[0], parts[1], parts[2], *layout(read)))
    if found.backward is not None:
        _rewrite_backward(step, found, made, parts, layout)
    return made


def _rewrite_backward(
    step: StepGraph, found: _Found, made: MemoryCall, parts: dict[int, fx.Node], layout: Callable[..., Any]
) -> None:
    old: Any = found.backward
    total = None
    for term in found.terms:
        part = term.build(old, parts[1], parts[2], *layout(term))
        total = part if total is None else call(old, aten.add.Tensor, total, part)
    cotangents, tensors, _, needs = old.args
    first = cotangents[0] if total is None else total
    with old.graph.inserting_before(old):
        new = old.graph.call_function(
            old.target, ([first, cotangents[1], cotangents[1], *cotangents[2:]], tensors, made.handle, needs)
        )
    new.meta.update(old.meta)
    old.replace_all_uses_with(new)


def _part(memory: fx.Node, index: int) -> fx.Node:
    last = memory
    while last.next.target is operator.getitem and last.next.args[0] is memory:
        last = last.next
    with memory.graph.inserting_after(last):
        node = memory.graph.call_function(operator.getitem, (memory, index))
    node.meta.update(val=memory.meta["val"][index], line=memory.meta.get("line", ""))
    return node
