"""Products with a history, on the packed rows of a span, without the history of every step.

What `History` gives at a step is the beginning of one row of frames that grows: over T steps (T, B, C, ...), while
the frames themselves are (B, C, ...). Products are taken with the frames of all steps at once, and what a step must
not see is taken out of the result, or of the weights. `whole_histories` puts them into step graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .ir.graph import Rows, expression
from .ops.table import Operation, put


def history_scores(
    rowwise: Any, a: Tensor, frames: Tensor, lengths: Tensor, ends: Tensor, *layout: list[int]
) -> Tensor:
    """(N * inner, m, D) and the frames (B, C, ...) -> (N * inner, m, C), zero where a slot is not in use.

    lengths: (N,) slots in use after each step.  ends: (N,) frames written until then, by all steps and before.
    layout: the sizes of the frames' feature axes; which of them go with the rows; which are summed over (D).
    """
    keys, inner = _as_matrices(frames, *layout)
    result = rowwise.product_with_constant(a, keys.transpose(1, 2), inner)
    wide, used, place = _slots(rowwise, result, lengths, ends, inner)
    if place is not None:
        wide = wide.gather(3, place)
    return torch.where(used, wide, wide.new_zeros(())).view(result.shape)


def history_sums(
    rowwise: Any, a: Tensor, frames: Tensor, lengths: Tensor, ends: Tensor, *layout: list[int]
) -> Tensor:
    """(N * inner, m, C) and the frames (B, C, ...) -> (N * inner, m, D): sums over the slots in use."""
    values, inner = _as_matrices(frames, *layout)
    return rowwise.product_with_constant(_of_all_frames(rowwise, a, lengths, ends, inner), values, inner)


def history_cotangent(
    rowwise: Any, weights: Tensor, a: Tensor, lengths: Tensor, ends: Tensor, features: list[int],
    sizes: list[int], inner: list[int], rest: list[int],
) -> Tensor:  # fmt: skip
    """(N * inner, m, C) and (N * inner, m, D) -> (B, C, ...): the sum over all steps of their outer products.

    features: the frames' own feature axes, which `sizes` may split.
    """
    count = _count(sizes, inner)
    weights = _of_all_frames(rowwise, weights, lengths, ends, count)
    total = rowwise.summed_product(weights.transpose(1, 2), a, count)  # (B * inner, C, D)
    wide = total.view(-1, *[sizes[i] for i in inner], total.shape[1], *[sizes[i] for i in rest])
    axes = [0, *_behind(inner, 2), 1, *_behind(rest, 2)]
    wide = wide.permute([axes.index(i) for i in range(len(axes))])
    return wide.reshape(*wide.shape[:2], *features)


def _behind(features: Sequence[int], first: int) -> list[int]:
    return [first + i for i in features]


def _as_matrices(frames: Tensor, sizes: list[int], inner: list[int], rest: list[int]) -> tuple[Tensor, int]:
    """(B, C, ...) -> (B * inner, C, D), and how many inner ones there are."""
    batch, room = frames.shape[:2]
    wide = frames.reshape(batch, room, *sizes)
    wide = wide.permute(0, *_behind(inner, 2), 1, *_behind(rest, 2))
    count = _count(sizes, inner)
    return wide.reshape(batch * count, room, _count(sizes, rest)), count


def _count(sizes: list[int], which: list[int]) -> int:
    return math.prod(sizes[i] for i in which)


def _slots(
    rowwise: Any, value: Tensor, lengths: Tensor, ends: Tensor, inner: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """value (N * inner, m, C) as (N, inner, m, C); which slots are in use; where each is among all frames.

    After a reset slot 0 holds a later frame than the first; without one every slot is in its place (None).
    """
    room = value.shape[2]
    wide = value.reshape(rowwise.span.total, inner, *value.shape[1:])
    slots = torch.arange(room, device=value.device)
    used = slots < lengths.view(-1, 1, 1, 1)
    if rowwise.span.resets is None:
        return wide, used, None
    place = (slots + (ends - lengths).view(-1, 1, 1, 1)).clamp(max=room - 1)
    return wide, used, place.expand(wide.shape)


def _of_all_frames(rowwise: Any, weights: Tensor, lengths: Tensor, ends: Tensor, inner: int) -> Tensor:
    """Weights of the slots at each step as weights of all frames; zero for frames that the step does not see."""
    wide, used, place = _slots(rowwise, weights, lengths, ends, inner)
    wide = torch.where(used, wide, wide.new_zeros(()))
    if place is not None:
        wide = torch.zeros_like(wide).scatter_add(3, place, wide)
    return wide.view(weights.shape)


def _rows(node: fx.Node, batch: sympy.Symbol) -> Rows:
    """Rows stay apart in products with a history; axis 0 is the rows, and what goes with each."""
    return Rows(0, 1, int(expression(node.meta["val"].shape[0]) / batch))


PRODUCTS: set[Callable[..., Any]] = {history_scores, history_sums, history_cotangent}
for product in PRODUCTS:
    put(product, Operation(product.__name__, rows=_rows))
