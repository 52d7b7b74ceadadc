"""Which axes of one value are found in which axes of another that was made from it by changes of shape alone.

Every axis of the first value gets a `Label`. The axes of later values are lists of labels: none for an axis of size 1,
several for one that is some axes merged. Splitting an axis splits its label.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import fx

from ..ir.graph import shape_of

aten = torch.ops.aten


class Label:
    """An axis, or a part of one. whole: never split."""

    def __init__(self, size: Any, whole: bool = False):
        self.size, self.whole = size, whole
        self.parts: list[Label] | None = None

    def split(self, second: int) -> tuple[Label, Label]:
        self.parts = [Label(self.size // second), Label(second)]
        return self.parts[0], self.parts[1]


def flat(labels: list[Label]) -> list[Label]:
    """Labels with those that were split as their parts."""
    found: list[Label] = []
    for label in labels:
        found += [label] if label.parts is None else flat(label.parts)
    return found


def product_of(labels: list[Label]) -> Any:
    size: Any = 1
    for label in flat(labels):
        size = size * label.size
    return size


def regrouped(axes: list[list[Label]], shape: list[Any]) -> list[list[Label]] | None:
    """The axes of a view of this shape; None where that is not merging and splitting alone."""
    rest = deque(label for axis in axes for label in flat(axis))
    found = []
    for size in shape:
        group: list[Label] = []
        have: Any = 1
        while have != size:
            if not rest:
                return None
            label = rest.popleft()
            if _divides(have * label.size, size):
                group.append(label)
                have = have * label.size
                continue
            if label.whole or not all(isinstance(s, int) for s in (label.size, size, have)):
                return None
            if size % have or label.size % (size // have):
                return None
            first, second = label.split(label.size // (size // have))
            group.append(first)
            have = size
            rest.appendleft(second)
        found.append(group)
    return None if rest else found


def _divides(part: Any, size: Any) -> bool:
    if isinstance(part, int) and isinstance(size, int):
        return size % part == 0 if part else size == 0
    ratio = size / part
    return bool(getattr(ratio, "is_Integer", False)) and ratio >= 1


def forwards(node: fx.Node, axes: list[list[Label]]) -> list[list[Label]] | None:
    """The axes of what a change of shape makes of a value with these axes; None for any other call."""
    target, args, rank = node.target, node.args, len(axes)
    if target in _VIEWS:
        return regrouped(axes, list(shape_of(node)))
    if target in _SAME:
        return axes
    if target is aten.permute.default:
        return [axes[d % rank] for d in args[1]]
    if target in (aten.transpose.int, aten.t.default):
        return _swapped(axes, *(args[1:3] if target is aten.transpose.int else (0, 1)))
    if target is aten.unsqueeze.default:
        at = args[1] % (rank + 1)
        return [*axes[:at], [], *axes[at:]]
    if target in _SQUEEZES:
        gone = _squeezed(node)
        return [a for d, a in enumerate(axes) if d not in gone]
    if target is aten.expand.default and shape_of(args[0]) == shape_of(node):
        return axes
    return None


def backwards(node: fx.Node, axes: list[list[Label]]) -> list[list[Label]] | None:
    """The axes of what a change of shape was given, from those of what it made; None for any other call."""
    target, args, rank = node.target, node.args, len(axes)
    if target in _VIEWS:
        return regrouped(axes, list(shape_of(args[0])))
    if target in _SAME:
        return axes
    if target is aten.permute.default:
        found: list[list[Label]] = [[]] * rank
        for to, d in enumerate(args[1]):
            found[d % rank] = axes[to]
        return found
    if target in (aten.transpose.int, aten.t.default):
        return _swapped(axes, *(args[1:3] if target is aten.transpose.int else (0, 1)))
    if target is aten.unsqueeze.default:
        at = args[1] % rank
        return [*axes[:at], *axes[at + 1 :]]
    if target in _SQUEEZES:
        gone, rest = _squeezed(node), deque(axes)
        return [[] if d in gone else rest.popleft() for d in range(len(shape_of(args[0])))]
    if target is aten.expand.default and shape_of(args[0]) == shape_of(node):
        return axes
    return None


_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_SAME = {aten.clone.default, aten.detach.default, aten.alias.default}
_SQUEEZES = {aten.squeeze.dim, aten.squeeze.dims}


def _squeezed(node: fx.Node) -> set[int]:
    before = shape_of(node.args[0])
    dims = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    return {d % len(before) for d in dims if before[d % len(before)] == 1}


def _swapped(axes: list[list[Label]], a: int, b: int) -> list[list[Label]]:
    order = list(axes)
    order[a], order[b] = order[b], order[a]
    return order


def aligned(
    factor: fx.Node, axes: list[list[Label]], shape: tuple[Any, ...]
) -> tuple[fx.Node, list[list[Label]], list[list[Label]]]:
    """For a product of `factor` and a value with `axes`, broadcast to `shape`: the factor without expansions, its
    axes, and those of the product. Axes that only the factor has get labels of their own."""
    axes = [[] for _ in range(len(shape) - len(axes))] + list(axes)
    axes = [[Label(s, whole=True)] if not a and s != 1 else a for a, s in zip(axes, shape)]
    while factor.target is aten.expand.default:
        factor = factor.args[0]
    sizes = shape_of(factor)
    behind = axes[len(axes) - len(sizes) :]
    return factor, [[] if s == 1 else a for a, s in zip(behind, sizes)], axes
