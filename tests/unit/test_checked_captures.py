"""STEPLOOP_CHECK=1: kept captures are compared with new ones, and nothing that is right is taken for a difference."""

from __future__ import annotations

import pytest
import torch

import steploop as sl
from steploop.compiler import capture_store


@pytest.fixture(autouse=True)
def checked(monkeypatch):
    monkeypatch.setattr(capture_store, "_CHECK", True)


class Inner(sl.Step):
    def __init__(self):
        super().__init__()
        self.h = sl.State(3)

    def step(self, x):
        self.h.next = torch.tanh(x + self.h.prev)
        return self.h.next


class Outer(sl.Step):
    """A loop and a remembering operation inside a step."""

    def __init__(self):
        super().__init__()
        self.loop, self.sums, self.h = sl.Loop(Inner()), sl.memory.CumSum(), sl.State(3)
        self.scale = 2.0

    def step(self, x):
        inside, _ = self.loop(x.transpose(0, 1))  # (L, B, 3)
        self.h.next = torch.tanh(inside[-1] + self.h.prev) * self.scale
        return self.sums(self.h.next)


def calls(step):
    loop = sl.Loop(step)
    for size in (2, 2, 3, 3, 2, 2, 1, 1):
        x = torch.randn(4, size, 5, 3)
        yield loop(x)[0], sl.Loop(step, backend="reference")(x)[0]


def test_captures_that_hold_pass():
    for found, expected in calls(Outer()):
        torch.testing.assert_close(found, expected)


def test_a_stale_capture_is_seen():
    step = Outer()
    runs = calls(step)
    next(runs)
    kept = next(iter(step._kept["captures"].values()))[0]
    kept.forward.graph.nexts[0] = kept.forward.graph.prevs[0]  # as if the step had been another
    with pytest.raises(sl.MismatchError, match="a new one is another"):
        for _ in range(3):
            next(runs)


def test_streamed_steps_are_checked_too(monkeypatch):
    """Each capture at steps 1, 2, 4, ...; what the kernel reads at every step."""
    looked, before = [], capture_store.making.check_kept
    monkeypatch.setattr(capture_store.making, "check_kept", lambda *given: (looked.append(1), before(*given)))
    cell = sl.nn.GRUCell(3, 4)
    stream, plain = sl.Loop(cell).stream(2), sl.Loop(cell, backend="reference").stream(2)
    with torch.no_grad():
        for step in range(20):
            x = torch.randn(2, 3)
            torch.testing.assert_close(stream(x), plain(x))
            if step == 10:
                cell.weight_hh.data.mul_(2)
    assert len(looked) >= 4
    run = stream._fast._run
    if hasattr(run, "stepper"):  # natively: a copy that nobody made anew
        held = run.stepper.held
        place = next(i for i, h in enumerate(held) if h is not None)
        held[place] = held[place] + 1
        with pytest.raises(sl.MismatchError, match="an old copy"), torch.no_grad():
            stream(torch.randn(2, 3))
