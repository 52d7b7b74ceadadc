"""Exponential averages, s = a s + (1 - a) x, however written: equal to the plain loop, and named in the plan."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import steploop as sl

sys.path.insert(0, str(Path(__file__).parent.parent))

from agree import agree

STEPS, BATCH, SIZE = 7, 3, 4
HOLES = torch.rand(STEPS, BATCH, generator=torch.Generator().manual_seed(1)) < 0.6
RESETS = torch.rand(STEPS, BATCH, generator=torch.Generator().manual_seed(2)) < 0.3


class Average(sl.Step):
    def __init__(self):
        super().__init__()
        self.s = sl.State(SIZE)

    def step(self, x):
        self.s.next = self.mix(self.s.prev, x)
        return self.s.next


class Number(Average):
    def mix(self, s, x):
        return 0.9 * s + (1 - 0.9) * x


class Channels(Average):
    """A learned factor for every channel."""

    def __init__(self):
        super().__init__()
        self.raw = torch.nn.Parameter(torch.randn(SIZE))

    def mix(self, s, x):
        a = torch.sigmoid(self.raw)
        return a * s + (1 - a) * x


class Positive(Average):
    """Decays in other terms of parameters alone."""

    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.randn(SIZE))
        self.share = torch.nn.Parameter(torch.randn(SIZE))

    def mix(self, s, x):
        a = torch.exp(-torch.nn.functional.softplus(self.rate))
        return a * s + torch.softmax(self.share, -1) * torch.tanh(self.rate) * x


class Gated(Average):
    """The factor comes with x."""

    def mix(self, s, x):
        a = torch.sigmoid(x.flip(-1))
        return a * s + (1 - a) * x


class Lerp(Average):
    def mix(self, s, x):
        return torch.lerp(s, x, 0.1)


class LerpByTensor(Average):
    def mix(self, s, x):
        return torch.lerp(s, x, torch.sigmoid(x))


class Step(Average):
    def mix(self, s, x):
        return s + 0.1 * (x - s)


class InPlace(Average):
    def mix(self, s, x):
        return s.mul(0.9).add_(x, alpha=0.1)


KINDS = [Number, Channels, Positive, Gated, Lerp, LerpByTensor, Step, InPlace]


def set_up(kind):
    torch.manual_seed(0)
    return kind().double(), torch.randn(STEPS, BATCH, SIZE, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_names_it(kind):
    step, x = set_up(kind)
    plan = sl.Loop(step).plan(x)
    for part in (plan, plan.backward):
        assert [loop.kind for loop in part.loops] == ["linear recurrence"]
        assert len(part.loops[0].ops) <= 4  # and the rest is outside


class MixedByItself(Average):
    def mix(self, s, x):
        return torch.lerp(s, x, torch.sigmoid(s))


def test_a_factor_that_depends_on_the_state_is_none():
    step, x = set_up(MixedByItself)
    assert [loop.kind for loop in sl.Loop(step).plan(x).loops] == [""]


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_plain_loop(kind, backend):
    step, x = set_up(kind)
    for given in ({}, {"lengths": torch.tensor([7, 3, 0])}, {"mask": HOLES, "resets": RESETS}):
        agree(step, x, backend=backend, **given)
    state = sl.States({"s": torch.randn(BATCH, SIZE, dtype=torch.float64, requires_grad=True)})
    agree(step, x, backend=backend, loop={"reverse": True}, state=state, resets=RESETS)


class Window(sl.Step):
    """The last frames, the newest at the end."""

    def __init__(self, frames):
        super().__init__()
        self.w = sl.State(frames, 3, dtype=torch.float64)

    def step(self, x):
        self.w.next = torch.cat([self.w.prev[:, 1:], x[:, None]], 1)
        return self.w.next.cumsum(1)


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_a_window_of_frames(frames):
    x = torch.randn(6, 3, 3, dtype=torch.float64, requires_grad=True)
    lengths, resets = torch.tensor([6, 2, 0]), torch.rand(6, 3) < 0.3
    for call in ({}, {"lengths": lengths}, {"resets": resets}, {"mask": torch.rand(6, 3) < 0.6}):
        agree(Window(frames), x, backend="auto", **call)
    agree(Window(frames), x[:1], backend="auto", loop={"reverse": True})
    loops = sl.Loop(Window(frames)).plan(x).loops
    assert frames == 1 or [loop.backend for loop in loops] == ["window"]
