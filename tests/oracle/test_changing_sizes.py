"""Sizes other than T and B that change from call to call: one capture serves them all, as well as the first."""

from __future__ import annotations

import threading

import pytest
import torch
from agree import agree, situations
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import steploop as sl
from steploop import sizing
from steploop.compiler.sizes_by_value import sizes_by_value

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


class Computes(sl.Step):
    """Uses numbers that it makes of the sizes of its memory (B, S, 4), in every way that Python has."""

    def __init__(self):
        super().__init__()
        self.h = sl.State(4)

    def step(self, x, *, memory):
        size, width = memory.shape[1:]
        mean = memory.sum(1) / (size / 3 + 1)
        mean = mean * (size**2 - width) + size % 3 - (size // 2) * 0.25 + max(size, 3) - min(size, 2) / width**0.5
        longer = torch.cat([memory, memory.new_full((len(memory), size % 2 + 1, width), float(size))], 1)
        rolled = longer.narrow(1, size // 2, 1 + size % 2).sum(1) + memory.numel() // len(memory)
        h = self.h.prev.expand(size + 1, -1, -1).reshape((size + 1) * len(x), width)
        self.h.next = torch.tanh(h.view(size + 1, -1, width).mean(0) + x + 0.01 * (mean + rolled))
        return self.h.next * (1 if size == 3 else size), torch.arange(size * 2, device=x.device).sum().expand(len(x))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_numbers_made_of_sizes(backend):
    step = Computes()
    for size, batch in ((4, 3), (7, 3), (3, 2), (1, 2), (2, 1), (8, 4)):
        given = [torch.randn(T, batch, 4).requires_grad_(), torch.randn(batch, size, 4).requires_grad_()]
        agree(step, given[0], memory=given[1], backend=backend)


def test_other_traces_of_torch_are_left_alone():
    """Steps are traced without nodes for sizes; what another thread traces meanwhile, and later traces, have them."""

    def flat(x):
        return x.view(x.shape[0] * x.shape[1]) * (x.shape[0] + 1)

    found = []

    def traces():
        found.append(make_fx(flat, tracing_mode="symbolic")(torch.randn(3, 4)))

    *xs, frames = arguments(3, 2, 2)
    with sizes_by_value():
        thread = threading.Thread(target=traces)
        thread.start()
        thread.join()
    sl.Loop(Attends(), backend="eager")(*xs, memory=frames)
    traces()
    assert len(found) == 2
    for graph in found:
        for shape in ((3, 4), (5, 2)):
            x = torch.randn(shape)
            torch.testing.assert_close(graph(x), flat(x))
