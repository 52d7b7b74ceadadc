"""A Python float that differs from call to call.

It is an input of the graph where the step only computes with it. Else the step is captured anew, and a warning says so.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import steploop as sl
from steploop.compiler import capture_store

# What a step computes of its state and of the float.
INPUTS = {
    "mul": lambda h, t: h * t, "one less": lambda h, t: (1 - t) * h + t, "lerp": lambda h, t: torch.lerp(h, h * 2, t),
    "base": lambda h, t: t**h, "power": lambda h, t: h.abs() ** t, "power of another": lambda h, t: h.abs() ** (1 + t),
    "round": lambda h, t: h * round(t, 1), "floor": lambda h, t: h * math.floor(t) + int(t),
    "max": lambda h, t: h * max(t, 0.5),
    "clamp": lambda h, t: h.clamp(-t, t), "where": lambda h, t: torch.where(h > t, h, h * t),
    "softmax": lambda h, t: (h / t).softmax(-1), "full": lambda h, t: h + torch.full_like(h, t),
}  # fmt: skip
NUMBERS = {
    "math": lambda h, t: h * math.exp(-t), "sqrt": lambda h, t: h * math.sqrt(t),
    "text": lambda h, t: h * float(str(t)),
    "a tensor": lambda h, t: h * torch.tensor(t), "softplus": lambda h, t: F.softplus(h, beta=t),
    "elu": lambda h, t: F.elu(h, t), "addcmul": lambda h, t: torch.addcmul(h, h, h, value=t),
    "layer norm": lambda h, t: F.layer_norm(h, (4,), eps=t),
    "quantile": lambda h, t: h.quantile(t, 1, keepdim=True) + h,
}  # fmt: skip
VALUES = (1.0, 0.98, 0.96, 0.94, 0.92)


class Cell(sl.Step):
    def __init__(self, function):
        super().__init__()
        self.function, self.temperature = function, 1.0
        self.h = sl.State(4)

    def step(self, x):
        self.h.next = torch.tanh(self.function(self.h.prev + x, self.temperature))
        return self.h.next


def captures_of(function, training):
    """How many captures each call takes, with the numbers of one call after the other, and what was warned of."""
    loop, counts = sl.Loop(Cell(function), backend="eager"), []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for value in VALUES:
            loop.step.temperature = value
            before = capture_store.captured
            sl.verify(loop, torch.randn(3, 2, 4, requires_grad=training))
            counts.append(capture_store.captured - before)
    return counts, [str(t.message) for t in told if "captured again" in str(t.message)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", list(INPUTS))
def test_what_is_only_computed_with_becomes_an_input(name, training):
    counts, told = captures_of(INPUTS[name], training)
    assert counts == [1, 1, 0, 0, 0] and not told


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", list(NUMBERS))
def test_what_is_not_is_told(name, training):
    counts, told = captures_of(NUMBERS[name], training)
    assert counts[2:] == [1, 1, 1]
    assert len(told) == 3 and all("temperature (" in t and "as a tensor" in t for t in told)


def test_a_gradient_that_needs_the_number_keeps_what_needs_none():
    """Without gradients the number is an input; the gradient takes captures of its own, and says so."""
    loop = sl.Loop(Cell(lambda h, t: F.elu(h, 1.0) * t + h.clamp(-t, t)), backend="eager")
    for training in (False, True, False, True):
        for value in VALUES[:3]:
            loop.step.temperature = value
            sl.verify(loop, torch.randn(3, 2, 4, requires_grad=training))


@pytest.mark.parametrize("name", list(INPUTS))
def test_the_loop_stays_where_it_ran(name):
    """What runs natively with one number does so with those after it, forward and backward."""
    loop, x = sl.Loop(Cell(INPUTS[name])), torch.randn(3, 2, 4, requires_grad=True)
    ran = []
    for value in VALUES[:3]:
        loop.step.temperature = value
        sl.verify(loop, x)
        plan = loop.plan(x)
        ran.append([piece.backend for piece in (*plan.loops, *plan.backward.loops)])
    assert ran[1] == ran[0] and ran[2] == ran[0]
