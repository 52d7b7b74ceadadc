"""How a hypothesis' log-probability becomes its score: penalties on its length and on what it left unread.

`length` is the number of labels without the end. A penalty that is monotone (its score does not fall as the
log-probability rises, and goes one way with the length) gives a bound on all that a hypothesis can still become: the
larger of its scores at the lengths it may have, its log-probability being what it is now, which never rises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, describe, message


@dataclass(frozen=True)
class LengthPenalty:
    """score(log_prob, length) for tensors of one shape. monotone: whether it gives a bound."""

    score: Callable[[Tensor, Tensor], Tensor]
    monotone: bool = True

    def candidates(self, log_prob: Tensor, length: Tensor) -> Tensor:
        """What a hypothesis competes with."""
        return self.score(log_prob, length)

    def carried(self, score: Tensor, step: Tensor) -> Tensor:
        """The score after one step more of a hypothesis that had ended. step: those before this one."""
        return score

    def comparable(self, score: Tensor, steps: Tensor) -> Tensor:
        """Scores after `steps` steps, so that those of different steps can be compared."""
        return score

    def final(self, score: Tensor, steps: Tensor, cut: Tensor) -> tuple[Tensor, Tensor | float]:
        """(scores (B, K) as they are given back, what a comparable score is multiplied with to be one of them).

        steps (B,) that each row took; cut (B,): whether some of its hypotheses had to stop before their end.
        """
        return score, 1.0

    def bound(self, log_prob: Tensor, length: Tensor, limit: Tensor) -> Tensor:
        """No score of what grows from a hypothesis of `length` labels within `limit` labels is higher."""
        if not self.monotone:
            return torch.where(log_prob == float("-inf"), log_prob, float("inf"))
        ends = self.score(log_prob, length), self.score(log_prob, limit.expand_as(length))
        return torch.maximum(*ends)


class Returnn(LengthPenalty):
    """RETURNN's ChoiceLayer with length_normalization: the score of a hypothesis that has ended grows by (t+1)/t with
    every further step; when all is done, every score is divided by the longest length, the end included."""

    def __init__(self) -> None:
        super().__init__(lambda log_prob, length: log_prob)

    def carried(self, score: Tensor, step: Tensor) -> Tensor:
        step = step.to(score.dtype)
        return torch.where(step > 0, score * ((step + 1) / step.clamp(min=1)), score)

    def comparable(self, score: Tensor, steps: Tensor) -> Tensor:
        return score / steps.clamp(min=1).to(score.dtype)

    def final(self, score: Tensor, steps: Tensor, cut: Tensor) -> tuple[Tensor, Tensor | float]:
        # There all rows of a batch go on until the last hypothesis has ended, and are divided by one longest length
        # with the end. Of hypotheses that were cut the end is counted too, though they have none.
        longest = (torch.where(cut, steps, 0).amax() if len(steps) else steps.sum()).to(score.dtype)
        factor = torch.where(longest > 0, longest / (longest + 1), 1.0)
        return self.comparable(score, steps.unsqueeze(1)) * factor, factor

    def bound(self, log_prob: Tensor, length: Tensor, limit: Tensor) -> Tensor:
        return log_prob / limit.clamp(min=1).to(log_prob.dtype)


def _gnmt(alpha: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Wu et al. 2016, arXiv:1609.08144, equation 14: log_prob / ((5 + length) / 6) ** alpha."""
    return lambda log_prob, length: log_prob / ((5 + length.to(log_prob.dtype)) / 6) ** alpha


def _average(log_prob: Tensor, length: Tensor) -> Tensor:
    return log_prob / length.clamp(min=1).to(log_prob.dtype)


def _per_label(reward: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda log_prob, length: log_prob + reward * length.to(log_prob.dtype)


def _sum(log_prob: Tensor, length: Tensor) -> Tensor:
    return log_prob


def length_penalty(choice: Any) -> LengthPenalty:
    """The penalty that `length_penalty=` names. InputError for an unknown one."""
    if choice is None:
        return LengthPenalty(_sum)
    if choice == "returnn":
        return Returnn()
    if callable(choice):
        return LengthPenalty(choice, bool(getattr(choice, "monotone", False)))
    name, *numbers = choice if isinstance(choice, (tuple, list)) and choice else (choice,)
    known = all(isinstance(n, (int, float)) for n in numbers)
    if name == "gnmt" and len(numbers) == 1 and known:
        return LengthPenalty(_gnmt(float(numbers[0])))
    if name == "average" and not numbers:
        return LengthPenalty(_average)
    if name == "per_label" and len(numbers) == 1 and known:
        return LengthPenalty(_per_label(float(numbers[0])))
    raise InputError(
        message(
            "There is no such length penalty.",
            expected='None, ("gnmt", alpha), ("average",), ("per_label", reward), "returnn", or a function '
            "(log_prob, length) -> score, with .monotone = True where it is",
            found=repr(choice) if isinstance(choice, (str, tuple, list)) else describe(choice),
            fix='length_penalty=("gnmt", 0.6)',
        )
    )


def coverage_options(choice: Any) -> tuple[float, Any] | None:
    """(beta, where the model's output has the weights (B, S)) of `coverage=("gnmt", beta, weights)`."""
    if choice is None:
        return None
    right = isinstance(choice, (tuple, list)) and len(choice) == 3 and choice[0] == "gnmt"
    if not right or not isinstance(choice[1], (int, float)):
        raise InputError(
            message(
                "There is no such coverage penalty.",
                expected='None or ("gnmt", beta, weights): a key, an index or a function of the model\'s output',
                found=repr(choice),
                fix='coverage=("gnmt", 0.2, "weights")',
            )
        )
    return float(choice[1]), choice[2]


def coverage_score(covered: Tensor, beta: float) -> Tensor:
    """Wu et al. 2016, equation 14: beta * sum_s log(min(covered_s, 1)). covered (..., S): sums of attention weights.

    A place that was never looked at counts as 1e-6, so that the score stays finite.
    """
    return beta * covered.clamp(1e-6, 1.0).log().sum(-1)
