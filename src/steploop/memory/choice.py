"""Choice: the label of each step, given or chosen."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..errors import InputError, describe, message
from ..state import State
from .base import Memory, check_mask, check_step_input, final, one_of

METHODS = ("greedy", "sample")


class Choice(Memory):
    """The target where there is one, else the model's own choice; the next step may read it. RETURNN's
    ChoiceLayer.

        previous = self.choice.previous()                 # (B,) the label before this step, `start` at first
        label = self.choice(scores, target)               # training: the target
        label = self.choice(scores)                       # on its own: argmax, or drawn from softmax(scores)
        label = self.choice(scores, target, where=mask)   # row by row: the target where True, else its own

    Given targets do not depend on the model's outputs, so with them nothing of a decoder has to wait for its
    own labels. To choose in another way, override `choose(scores) -> (B,) int64`.

    start:  the label before the first.  method: "greedy" or "sample".  temperature: scores are divided by it.
    choice(scores, target=None, where=None): scores (B, V), target (B,) integers, where (B,) bool -> (B,) int64.
        Alone, over a whole sequence, each has T in front.
    State: `last` (B,) int64, the label of the latest step.

    Raises InputError for an unknown method, a temperature that is not positive, targets that are no labels, and
    `where` without targets.
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

    def impose(self, label: Tensor) -> None:
        """Put `label` (B,) integers in the place of this step's label, whether or not one was chosen before.

        For what runs the model from outside and knows better (a search, a prefix that was given): the next step's
        `previous()` is this label. What the step itself made of its own choice stays as it is.
        """
        check_step_input("Choice", "label", label, integer=True)
        self.last.rewrite(label.to(torch.int64))

    def choose(self, scores: Tensor) -> Tensor:
        """(..., V) -> (...) int64."""
        if self.method == "sample":
            # argmax of scores with Gumbel noise: a draw from the softmax
            noise = -torch.log(
                -torch.log(torch.rand(scores.shape, device=scores.device).clamp(1e-20, 1 - 1e-7))
            )
            scores = scores / self.temperature + noise
        return scores.argmax(-1)

    def sequences_of(self, xs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A whole sequence's `where=` has a slice per step: it becomes the last sequence."""
        if named.get("where") is None or len(xs) != 2:
            return xs, named
        return (*xs, named["where"]), {name: value for name, value in named.items() if name != "where"}

    def check(self, scores: Tensor | None = None, target: Tensor | None = None, where: Tensor | None = None) -> None:
        if target is None or where is not None:
            check_step_input("Choice", "scores", scores)
        if target is not None or where is not None:
            check_step_input("Choice", "target", target, integer=True)
        if where is not None:
            check_mask("Choice", "where", where)

    def step(self, scores: Tensor | None = None, target: Tensor | None = None, where: Tensor | None = None) -> Tensor:
        self.check(scores, target, where)
        label = self._label(scores, target, where)
        self.last.next = label
        return label.clone()

    def _label(self, scores: Tensor | None, target: Tensor | None, where: Tensor | None) -> Tensor:
        if target is None:
            return self.choose(cast(Tensor, scores))
        given = target.to(torch.int64)
        return given if where is None else torch.where(where, given, self.choose(cast(Tensor, scores)))

    def sequence(
        self, xs: tuple[Any, ...], constants: dict[str, Any], state: dict[str, Tensor], reset_to: dict[str, Tensor],
        lengths: Tensor | None, resets: Tensor | None,
    ) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
        labels = self._label(*xs, *[None] * (3 - len(xs)))
        return labels, {"last": final(labels, state["last"], lengths)}

    def extra_repr(self) -> str:
        return f"method={self.method!r}"
