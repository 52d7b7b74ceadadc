"""Sizes other than T and B that change from call to call: one capture serves them all, as well as the first."""

from __future__ import annotations

import pytest
import torch
from agree import agree, situations
from torch import nn

import steploop as sl

T = 6


class Attends(sl.Step):
    """Projects its memory, (B, S, 6), and a set of vectors, (B, R, 3) at every step, inside the step."""

    def __init__(self):
        super().__init__()
        self.keys, self.query, self.parts = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(3, 4)
        self.mix, self.h = nn.Linear(6 + 5, 4), sl.State(4)

    def step(self, x, vectors, *, memory):
        scores = (self.keys(memory).tanh() * self.query(self.h.prev).unsqueeze(1)).sum(-1)
        context = (scores.softmax(-1).unsqueeze(-1) * memory).sum(1)
        parts = self.parts(vectors)
        self.h.next = torch.tanh(self.mix(torch.cat([x, context], -1)) + parts.relu().sum(1))
        return self.h.next, parts


def arguments(memory, vectors, batch):
    given = [torch.randn(T, batch, 5), torch.randn(T, batch, vectors, 3), torch.randn(batch, memory, 6)]
    return [g.requires_grad_() for g in given]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("how", ["plain", "lengths", "holes", "resets", "all"])
def test_other_sizes_agree(backend, how):
    step = Attends()
    for memory, vectors, batch in ((3, 2, 4), (5, 4, 4), (7, 5, 5), (1, 6, 4), (4, 1, 3)):
        kinds = situations(torch.randint(0, T + 1, (batch,)), torch.rand(T, batch) < 0.7, torch.rand(T, batch) < 0.2)
        *xs, frames = arguments(memory, vectors, batch)
        agree(step, *xs, memory=frames, backend=backend, **kinds[how])


def test_other_sizes_leave_the_plan_as_it_is():
    loop = sl.Loop(Attends())
    plans = []
    for memory, vectors in ((3, 2), (5, 4), (7, 5)):
        *xs, frames = arguments(memory, vectors, 4)
        plans.append(loop.plan(*xs, memory=frames))
    for plan in plans:
        assert len(plan.loops) == len(plan.backward.loops) == 1
    assert "(B, n, 4)" in str(plans[-1]) and "(B, 3, 4)" in str(plans[0])
