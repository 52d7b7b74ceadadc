"""Two traces of a step must do the same: otherwise the step changed something, or drew a number, in Python."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..errors import StepError
from .trace import Trace


class SideEffect(StepError):
    """The step changed something in Python."""


_DRAW = (
    "A number from Python's or numpy's random generator, or from the clock, is drawn once when the step is captured. "
    "Draw it with torch (torch.rand) inside the step, or pass it in as a sequence."
)


def check_same(forward: Trace, joint: Trace) -> None:
    """A second run of the step must do what the first did; otherwise Python decided differently."""
    for (one, first), (two, second) in zip(forward.numbers, joint.numbers):
        if one is not two:
            return  # with gradients some operations take another form; nothing can be said of what follows
        if repr(first) != repr(second):
            raise SideEffect(
                f"two runs of the step computed with different numbers ({one}): {first} and {second}. {_DRAW}"
            )


def check_same_constants(first: Trace, again: Trace) -> None:
    """The same for tensors that the step made of Python's numbers, and for what it calls."""
    calls = [[target for target, _ in t.numbers] for t in (first, again)]
    pairs = list(zip(first.tensors, again.tensors))
    same = calls[0] == calls[1] and len(first.tensors) == len(again.tensors)
    if not same or any(a is not b and isinstance(a, Tensor) and not torch.equal(a, cast(Tensor, b)) for a, b in pairs):
        raise SideEffect(f"two runs of the step did different things. {_DRAW}")
