"""Sizes other than T and B that change from call to call: one capture serves them all, as well as the first."""

from __future__ import annotations

import pytest
import torch
from agree import agree, situations
from torch import nn

import steploop as sl
from steploop import sizing

T = 6
SIZES = ((3, 2, 4), (1, 4, 4), (5, 3, 4), (7, 5, 5), (1, 1, 4), (4, 1, 3))  # of the memory, the vectors, and B


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
    for memory, vectors, batch in SIZES:
        kinds = situations(torch.randint(0, T + 1, (batch,)), torch.rand(T, batch) < 0.7, torch.rand(T, batch) < 0.2)
        *xs, frames = arguments(memory, vectors, batch)
        agree(step, *xs, memory=frames, backend=backend, **kinds[how])


class Heads(sl.Step):
    """Two heads over a memory (B, S, 8), whose axes are taken apart inside the step."""

    def __init__(self):
        super().__init__()
        self.v, self.h = nn.Parameter(torch.randn(2, 4)), sl.State(4)

    def step(self, x, *, memory):
        query = torch.cat([x, self.h.prev], -1).unflatten(-1, (2, 4)).unsqueeze(1)
        scores = (self.v * torch.tanh(memory.unflatten(-1, (2, 4)) + query)).sum(-1)
        self.h.next = torch.tanh(scores.sum(1).sum(1, keepdim=True) + x)
        return self.h.next


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("sizes", [(5, 1, 2, 5), (1, 5, 1, 7), (5, 7, 1, 1, 3)], ids=str)
def test_a_size_of_one_between_others(backend, sizes):
    """Every length of a memory after every other; one that is 1 has a capture of its own."""
    step = Heads()
    for memory in sizes:
        for batch in (3, 1):
            x, frames = torch.randn(T, batch, 4), torch.randn(batch, memory, 8, requires_grad=True)
            agree(step, x, memory=frames, backend=backend)


def test_other_sizes_leave_the_plan_as_it_is():
    loop = sl.Loop(Attends())
    plans = []
    for memory, vectors in ((3, 2), (5, 4), (7, 5)):
        *xs, frames = arguments(memory, vectors, 4)
        plans.append(loop.plan(*xs, memory=frames))
    for plan in plans:
        assert len(plan.loops) == len(plan.backward.loops) == 1
    assert "(B, n, 4)" in plans[-1].text(full=True) and "(B, 3, 4)" in plans[0].text(full=True)


class Remembers(sl.Step):
    """States of which only the memory tells how large they are, one of them in a way of its own."""

    def __init__(self):
        super().__init__()
        self.seen, self.pairs, self.mix = sl.State(..., init=0.5), sl.State(...), nn.Linear(5, 6)

    def step(self, x, *, memory):
        size = memory.shape[1]
        seen = self.seen.sized(size, like=x)
        pairs = self.pairs.sized(size // 2 + 1 if size > 4 else 3, 2, like=x)
        weights = ((memory @ self.mix(x).unsqueeze(-1)).squeeze(-1) + seen).softmax(-1)
        self.seen.next = seen * 0.5 + weights
        self.pairs.next = torch.tanh(pairs + weights[:, :1, None])
        return pairs.sum((1, 2)), seen


def test_states_as_large_as_a_constant(monkeypatch):
    """The shapes are found once for a size, once for another, and then known; a decision on the size is found out."""
    step, runs, find = Remembers(), [], sizing.find_sizes

    def counted(*arguments):
        runs.append(arguments[2].constants[0].shape[1])
        return find(*arguments)

    monkeypatch.setattr(sizing, "find_sizes", counted)
    for memory in (7, 9, 6, 12, 30, 9, 1, 3, 2, 4, 1, 7, 5):
        xs = torch.randn(T, 3, 5, requires_grad=True)
        frames = torch.randn(3, memory, 6, requires_grad=True)
        (_, seen), state = sl.Loop(step, backend="reference")(xs, memory=frames)
        assert state["seen"].shape == (3, memory) and seen.shape == (T, 3, memory)
        assert state["pairs"].shape == (3, memory // 2 + 1 if memory > 4 else 3, 2)
        if memory in (7, 9, 12, 1, 4):
            agree(step, xs, memory=frames, backend="cpu", save="states")
    assert runs == [7, 9, 1, 3]


def test_the_state_of_an_earlier_call_may_be_given_when_sizes_change():
    loop = sl.Loop(Remembers())
    for memory in (7, 9, 5, 11):
        xs, frames = torch.randn(T, 3, 5), torch.randn(3, memory, 6)
        (whole, _), last = loop(xs, memory=frames)
        (first, _), state = loop(xs[:2], memory=frames)
        (rest, _), after = loop(xs[2:], memory=frames, state=state)
        torch.testing.assert_close(torch.cat([first, rest]), whole)
        torch.testing.assert_close(after["pairs"], last["pairs"])
