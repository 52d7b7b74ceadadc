"""Choice: the label of each step, given or chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, describe, message
from ..state import State
from .base import Memory, check_step_input, final, one_of

METHODS = ("greedy", "sample")


class Choice(Memory):
    """The target where there is one, else the model's own choice; the next step may read it. RETURNN's
    ChoiceLayer.

        previous = self.choice.previous()                 # (B,) the label before this step, `start` at first
        label = self.choice(scores, target)               # training: the target
        label = self.choice(scores)                       # on its own: argmax, or drawn from softmax(scores)

    Given targets do not depend on the model's outputs, so with them nothing of a decoder has to wait for its
    own labels. To choose in another way, override `choose(scores) -> (B,) int64`.

    start:  the label before the first.  method: "greedy" or "sample".  temperature: scores are divided by it.
    choice(scores, target=None): scores (B, V), target (B,) integers -> (B,) int64.

    Raises InputError for an unknown method, a temperature that is not positive, and targets that are no
    labels.
    """

    inlined = True  # with a target, what comes before does not depend on the scores

    def __init__(self, start: int = 0, method: str = "greedy", temperature: float = 1.0) -> None:
        super().__init__()
        self.method = one_of("Choice", "method", method, METHODS)
        if not temperature > 0:
            raise InputError(
                message("Choice: temperature is positive.", expected="> 0", found=describe(temperature))
            )
        self.temperature = temperature
        self.last = State(init=start, dtype=torch.int64)

    def previous(self) -> Tensor:
        """(B,) the label of the step before; inside a step only."""
        return self.last.prev

    def choose(self, scores: Tensor) -> Tensor:
        """(..., V) -> (...) int64."""
        if self.method == "sample":
            # argmax of scores with Gumbel noise: a draw from the softmax
            noise = -torch.log(
                -torch.log(torch.rand(scores.shape, device=scores.device).clamp(1e-20, 1 - 1e-7))
            )
            scores = scores / self.temperature + noise
        return scores.argmax(-1)

    def check(self, scores: Tensor | None = None, target: Tensor | None = None) -> None:
        if target is None:
            check_step_input("Choice", "scores", scores)
        else:
            check_step_input("Choice", "target", target, integer=True)

    def step(self, scores: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        self.check(scores, target)
        label = self.choose(scores) if target is None else target.to(torch.int64)
        self.last.next = label
        return label.clone()

    def sequence(self, xs, constants, state, reset_to, lengths, resets) -> tuple[Any, dict[str, Tensor]]:
        target = xs[1] if len(xs) > 1 else None
        labels = self.choose(xs[0]) if target is None else target.to(torch.int64)
        return labels, {"last": final(labels, state["last"], lengths)}

    def extra_repr(self) -> str:
        return f"method={self.method!r}"
