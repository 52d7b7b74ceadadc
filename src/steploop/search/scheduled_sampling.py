"""Scheduled sampling: training on labels of which some are the model's own (Bengio et al. 2015)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import InputError, StepError, describe, message
from ..loop import Loop
from ..nn._constants import check_constants_used, constants_for
from ..state import State
from ..step import Step
from .copies import picked

CHOICES = ("argmax", "sample")


class ScheduledSampling(Step):
    """A model whose input label is the given one or, with probability p, its own last choice.

        training = sl.search.ScheduledSampling(decoder, lambda i: min(0.5, i / 10_000))
        scores, state = training(labels, memory=memory)         # labels (T, B), as for decoder itself
        ...
        training.advance()                                      # after each update of the weights

    Each row throws its own coin at each step (Bengio et al. 2015, arXiv:1506.03099; their epsilon is 1 - p). The
    first step has no choice before it and takes the given label, as does a row's first step after a reset. p = 1
    feeds back everything but that. p holds in eval mode too: to validate on given labels, run the model itself.

    model:  a Step (or a Loop of one) whose first argument is the label before this step, (B,) int64, and whose
            output is scores (B, V).  scores: where they are in an output that is a tree: a key, an index, or a
            function of the output. Further sequences and constants are the model's.
    p:      a number; a tensor of one element, which may be written into at any time; or a schedule, a function from
            the number of updates so far (an int) to a number.
    choose: "argmax", or "sample": drawn from softmax(scores).
    straight_through: the model gets label vectors (B, V) instead of labels, one-hot for given ones. For its own they
            are one-hot in value, and in the gradient softmax(scores): later losses reach earlier scores.
            labels: V, needed for that. DecoderWithAttention takes such vectors; `vector @ embedding.weight` does it.

    Buffers: `probability`, p as it is now (where p is no tensor); `updates`, how often `advance` was called.
    States: `own` (B,) int64, the last choice, -1 where there is none; `vector` (B, V) with straight_through; the
    model's under "model.".
    Raises InputError for a p outside [0, 1] and unknown choices, StepError for a model that is no Step.
    """

    updates: Tensor
    probability: Tensor

    def __init__(
        self,
        model: Step | Loop[Any],
        p: float | Tensor | Callable[[int], float],
        choose: str = "argmax",
        *,
        scores: Any = None,
        straight_through: bool = False,
        labels: int | None = None,
    ) -> None:
        super().__init__()
        model = model.step if isinstance(model, Loop) else model
        if not isinstance(model, Step):
            raise StepError(message("ScheduledSampling wraps a Step.", expected="a model", found=describe(model)))
        if choose not in CHOICES:
            raise InputError(
                message(f"ScheduledSampling: there is no choose={choose!r}.", expected='"argmax" or "sample"')
            )
        if straight_through and labels is None:
            raise InputError(
                message(
                    "ScheduledSampling: straight_through needs to know how many labels there are.",
                    expected="labels=V",
                    fix="ScheduledSampling(model, p, straight_through=True, labels=V)",
                )
            )
        self.model, self.choose, self.scores = model, choose, scores
        self.labels = labels if straight_through else None
        self.schedule = p if callable(p) and not isinstance(p, Tensor) else None
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        probability = _as_probability(self.schedule(0) if self.schedule else p)
        if isinstance(p, Tensor):
            self.probability = probability  # no buffer, which `.to()` would replace: the caller writes into this one
        else:
            self.register_buffer("probability", probability)
        self.own = State(init=-1, dtype=torch.int64)
        if straight_through:
            self.vector = State(cast(int, labels))

    @property
    def p(self) -> float:
        """The probability of the model's own choice, as it is now; may be assigned."""
        return float(self.probability)

    @p.setter
    def p(self, value: float) -> None:
        with torch.no_grad():
            self.probability.copy_(_as_probability(value))

    def advance(self, updates: int = 1) -> None:
        """Count `updates` more updates of the weights; a schedule then says what p is."""
        self.updates += updates
        if self.schedule is not None:
            self.p = self.schedule(int(self.updates))

    def _hands_constants_to(self) -> list[Step]:
        return [self.model]

    def step(self, label: Tensor, *xs: Any, **constants: Any) -> Any:
        check_constants_used(self, [self.model], constants)
        own = self.own.prev
        feeds_back = (torch.rand(own.shape, device=own.device) < self.probability) & (own >= 0)
        if self.labels is None:
            given = torch.where(feeds_back, own, label)
        else:
            given = torch.where(feeds_back.unsqueeze(1), self.vector.prev, self._one_hot(label))
        output = self.model(given, *xs, **constants_for(self.model, constants))
        scores = picked(output, self.scores)
        choice = self._chosen(scores.detach())
        self.own.next = choice
        if self.labels is not None:
            soft = torch.softmax(scores, -1)
            self.vector.next = self._one_hot(choice).to(soft.dtype) + soft - soft.detach()
        return output

    def _one_hot(self, label: Tensor) -> Tensor:
        places = torch.arange(cast(int, self.labels), device=label.device)
        return (label.unsqueeze(-1) == places).to(self.vector.prev.dtype)

    def _chosen(self, scores: Tensor) -> Tensor:
        if self.choose == "argmax":
            return scores.argmax(-1)
        return torch.multinomial(torch.softmax(scores, -1), 1).squeeze(-1)

    def extra_repr(self) -> str:
        return f"p={self.p:g}, choose={self.choose!r}" + (", straight_through=True" if self.labels else "")


def _as_probability(p: Any) -> Tensor:
    """A 0-d tensor; that of the caller where it is one, so that what is written into it later is seen."""
    tensor = p.detach() if isinstance(p, Tensor) else None
    if isinstance(p, (int, float)) and not isinstance(p, bool):
        tensor = torch.tensor(float(p), device="cpu")
    if tensor is None or tensor.numel() != 1 or not tensor.is_floating_point() or not 0 <= float(tensor) <= 1:
        raise InputError(
            message(
                "ScheduledSampling: p is the probability of the model's own choice.",
                expected="a number in [0, 1], a floating tensor of one element, or a function from updates to a number",
                found=describe(p) if not isinstance(p, Tensor) or p.numel() != 1 else repr(float(p)),
            )
        )
    return tensor.reshape(())
