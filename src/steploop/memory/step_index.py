"""StepIndex: how many steps came before."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..state import State
from .base import Memory, counts_of, latest_reset


class StepIndex(Memory):
    """i_t = the number of valid steps of this row before this one, since the start or the latest reset.

    RETURNN's `:i`. index(): (B,) int64, 0 at the first step; a tensor given to it is not looked at. The count
    is the state "count", so a carried state goes on counting, and any offset may be put there.
    """

    takes_steps = True

    def __init__(self) -> None:
        super().__init__()
        self.count = State(init=0, dtype=torch.int64)

    def step(self, *like: Tensor) -> Tensor:
        index = self.count.prev
        self.count.next = index + 1
        return index.clone()

    def sequence(
        self, xs: tuple[Any, ...], constants: dict[str, Any], state: dict[str, Tensor], reset_to: dict[str, Tensor],
        lengths: Tensor | None, resets: Tensor | None, steps: int | None = None,
    ) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
        index, after = counting(
            state["count"], reset_to["count"], xs[0].shape[0] if xs else cast(int, steps), lengths, resets
        )
        return index, {"count": after}


def counting(
    start: Tensor, fresh: Tensor, steps: int, lengths: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """((T, B) int64 counts from `start`, or from `fresh` since a reset; (B,) the count after all steps)."""
    time = torch.arange(steps + 1, device=start.device)[:, None]
    index = start + time
    if resets is not None:
        latest = latest_reset(resets, lengths)
        index = torch.where(latest >= 0, fresh + time - latest, index)
    end = counts_of(lengths, steps, start.shape[0], start.device)
    if resets is not None:
        last = latest[-1]
        after = torch.where(last >= 0, fresh + end - last, start + end)
    else:
        after = start + end
    return index[:-1], after
