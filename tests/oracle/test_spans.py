"""The executor cuts long sequences into spans of time; here into very short ones, so that everything crosses edges."""

import pytest
import torch
from compiled_backends import COMPILED
from spans import cut_time

import steploop as sl

STEPS, BATCH = 23, 4


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
    cut_time(monkeypatch, 3)


class Delays(sl.Step):
    """States of every kind that never loop, beside one that does."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        self.late, self.later, self.h = sl.State(3, init="learned"), sl.State(3), sl.State(3)
        self.count, self.same = sl.State(dtype=torch.long, init=0), sl.State(2, init=2.0)

    def step(self, x):
        self.late.next, self.later.next = self.linear(x), self.late.prev * x
        self.h.next = torch.tanh(self.h.prev + self.later.prev)
        self.count.next = self.count.prev + 1
        return self.h.next * self.count.prev[:, None], self.same.prev


def calls():
    generator = torch.Generator().manual_seed(0)
    holes = torch.rand(STEPS, BATCH, generator=generator) > 0.3
    resets = torch.rand(STEPS, BATCH, generator=generator) > 0.8
    return {"full": {}, "ragged": {"lengths": torch.tensor([23, 1, 0, 17])}, "holes": {"mask": holes, "resets": resets}}


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("save", ["states", "all"])
@pytest.mark.parametrize("call", calls())
def test_spans_give_what_one_span_gives(backend, save, call):
    torch.manual_seed(0)
    xs = torch.randn(STEPS, BATCH, 3, dtype=torch.float64, requires_grad=True)
    for step in (sl.nn.LSTMCell(3, 5), sl.nn.GRUCell(3, 5), sl.nn.LayerNormLSTMCell(3, 5), Delays()):
        for reverse in (False, True):
            loop = sl.Loop(step.double(), backend=backend, save=save, reverse=reverse)
            sl.verify(loop, xs, **calls()[call])
