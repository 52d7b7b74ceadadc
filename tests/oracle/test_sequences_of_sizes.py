"""One step called with many sizes one after the other: what was captured for one must be right for the next.

Sizes 0 and 1 are cases of their own for torch, so every sequence holds them, 2, and sizes that come back.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import attention_cases
import cell_cases
import memory_cases
from agree import agree, agree_scan, situations

import steploop as sl

SEEDS = range(2)


def sequence(draw: random.Random, axes: int, length: int = 8) -> list[tuple[int, ...]]:
    """Sizes of some axes for some calls: on every axis 0, 1 and 2 come up, and one size comes again."""
    columns = []
    for _ in range(axes):
        column = [0, 1, 2, *(draw.choice((1, 2, 3, 5, 7)) for _ in range(length - 4))]
        column.append(draw.choice(column))
        draw.shuffle(column)
        columns.append(column)
    return list(zip(*columns, strict=True))


def ways(draw: random.Random, steps: int, batch: int) -> dict:
    """How rows run: one of the situations of the oracle tests."""
    lengths = torch.tensor([draw.randint(0, steps) for _ in range(batch)], dtype=torch.int64)
    kinds = situations(lengths, torch.rand(steps, batch) < 0.7, torch.rand(steps, batch) < 0.3)
    return kinds[draw.choice([*kinds, "plain", "plain"])]


def backend_of(draw: random.Random) -> str:
    return draw.choice(["eager", "eager", "auto"])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", cell_cases.CASES, ids=lambda case: case.name)
def test_cells(case, seed):
    draw, cell = random.Random(seed), cell_cases.randomised(case.make(), torch.float64)
    backend = backend_of(draw)
    for steps, batch in sequence(draw, 2):
        xs = torch.randn(steps, batch, cell_cases.INPUT, dtype=torch.float64, requires_grad=draw.random() < 0.7)
        agree(cell, xs, backend=backend, save=draw.choice(["all", "states"]), **ways(draw, steps, batch))


@pytest.mark.parametrize("case", memory_cases.CASES, ids=lambda case: case.name)
def test_remembering_operations(case):
    draw = random.Random(case.name)
    operation = case.make().double()
    for steps, batch in sequence(draw, 2):
        xs = [make(steps, batch) for make in case.xs]
        agree(operation, *xs, **case.constants(batch), **ways(draw, steps, batch))


class Looks(sl.Step):
    """An attention asked by a recurrent query."""

    def __init__(self, case):
        super().__init__()
        self.attention = case.make()
        self.query, self.h = nn.Linear(4, case.query), sl.State(4)
        self.mix = nn.Linear(case.context + 3, 4)

    def step(self, x, *, memory, memory_lengths):
        context, weights = self.attention(self.query(self.h.prev), memory=memory, memory_lengths=memory_lengths)
        self.h.next = torch.tanh(self.mix(torch.cat([context, x], -1)) + 0.5 * self.h.prev)
        return self.h.next, weights


@pytest.mark.parametrize("case", attention_cases.CASES, ids=lambda case: case.name)
def test_attentions(case):
    draw, step = random.Random(case.name), cell_cases.randomised(Looks(case), torch.float64)
    backend = backend_of(draw)
    for steps, batch, size in sequence(draw, 3):
        memory = torch.randn(batch, size, attention_cases.MEMORY, dtype=torch.float64, requires_grad=True)
        valid = torch.tensor([draw.randint(0, size) for _ in range(batch)], dtype=torch.int64)
        xs = torch.randn(steps, batch, 3, dtype=torch.float64, requires_grad=draw.random() < 0.7)
        how = ways(draw, steps, batch)
        agree(step, xs, memory=memory, memory_lengths=valid, backend=backend, save="states", **how)


class Attends(sl.Step):
    """A memory (B, S, 6), a set of vectors (B, R, 3) at every step, and a table (N, 4) that all rows share."""

    def __init__(self):
        super().__init__()
        self.keys, self.query, self.parts = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(3, 4)
        self.mix, self.h = nn.Linear(6 + 5, 4), sl.State(4)

    def step(self, x, vectors, *, memory, table):
        scores = (self.keys(memory).tanh() * self.query(self.h.prev).unsqueeze(1)).sum(-1)
        context = (scores.softmax(-1).unsqueeze(-1) * memory).sum(1)
        shared = (self.h.prev @ table.t()).sigmoid().sum(-1, keepdim=True) / max(table.shape[0], 1)
        parts = self.parts(vectors)
        self.h.next = torch.tanh(self.mix(torch.cat([x, context], -1)) + parts.relu().sum(1) + shared)
        return self.h.next, parts


class Mean(sl.Step):
    def __init__(self):
        super().__init__()
        self.h = sl.State(6)

    def step(self, x, *, memory):
        self.h.next = torch.tanh(self.h.prev + memory.sum(1) / max(memory.shape[1], 1) + x.mean(-1, keepdim=True))
        return self.h.next, x * 2


class ByItsSize(sl.Step):
    """Python that looks at sizes."""

    def __init__(self):
        super().__init__()
        self.h = sl.State(3)

    def step(self, x, *, memory):
        scale = 2.0 if memory.shape[1] > 2 else 0.5
        scale = scale * (3.0 if x.shape[0] > 1 else 1.0) / max(x.shape[0], 2)
        read = memory.amax(1) if memory.shape[1] else torch.zeros(x.shape[0], 3, dtype=x.dtype)
        self.h.next = torch.tanh(self.h.prev * scale + x + read * memory.shape[1])
        return self.h.next


class MixesRows(sl.Step):
    def __init__(self):
        super().__init__()
        self.h, self.w = sl.State(3), nn.Linear(3, 3)

    def step(self, x):
        rows = x.shape[0]
        near = torch.cat([self.h.prev[1:], self.h.prev[:1]]) if rows > 1 else self.h.prev
        self.h.next = torch.tanh(self.w(x) + near + x.sum(0, keepdim=True) / max(rows - 1, 1))
        return self.h.next


@pytest.mark.parametrize("seed", range(4))
def test_several_axes(seed):
    draw, step = random.Random(seed), Attends().double()
    backend = backend_of(draw)
    for steps, batch, memory, vectors, entries in sequence(draw, 5):
        given = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (
            (steps, batch, 5), (steps, batch, vectors, 3), (batch, memory, 6), (entries, 4))]  # fmt: skip
        call = {"memory": given[2], "table": sl.unbatched(given[3])}
        agree(step, *given[:2], backend=backend, **call, **ways(draw, steps, batch))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [Mean, ByItsSize])
def test_a_memory(kind, seed):
    draw, step = random.Random(seed), kind().double()
    backend = backend_of(draw)
    for steps, batch, memory in sequence(draw, 3):
        width = 3 if kind is ByItsSize else draw.choice([1, 2, 4])
        xs = torch.randn(steps, batch, width, dtype=torch.float64, requires_grad=True)
        frames = torch.randn(batch, memory, 3 if kind is ByItsSize else 6, dtype=torch.float64, requires_grad=True)
        # The plain loop runs a step on its valid rows alone: a step that asks for the batch size sees their number.
        how = {} if kind is ByItsSize else ways(draw, steps, batch)
        agree(step, xs, memory=frames, backend=backend, **how)


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_mix(seed):
    draw, step = random.Random(seed), MixesRows().double()
    backend = backend_of(draw)
    for steps, batch in sequence(draw, 2):
        agree(step, torch.randn(steps, batch, 3, dtype=torch.float64, requires_grad=True), backend=backend)


def accumulates(carry, x):
    carry = carry * 0.5 + x.sum() / max(x.shape[0], 1)
    return carry, carry * x.mean(0, keepdim=True) if x.shape[0] > 1 else carry.reshape(1)


def attends(carry, x):
    scores = (x * carry).sum(-1).softmax(-1)
    carry = torch.tanh(carry + (scores.unsqueeze(-1) * x).sum(0))
    return carry, scores


@pytest.mark.parametrize("seed", range(4))
def test_scans(seed):
    draw = random.Random(seed)
    backend = backend_of(draw)
    for steps, size in sequence(draw, 2):
        agree_scan(accumulates, torch.zeros(()).double(), torch.randn(steps, size).double(), backend=backend)
        agree_scan(
            attends, torch.ones(3).double(), torch.randn(steps, size, 3).double().requires_grad_(), backend=backend
        )


@pytest.mark.parametrize("kind", [Mean, ByItsSize])
def test_streams(kind):
    draw, step = random.Random(1), kind().double()
    for _, batch, memory in sequence(draw, 3):
        frames = torch.randn(batch, memory, 3 if kind is ByItsSize else 6, dtype=torch.float64)
        with torch.no_grad():
            one, other = (sl.Loop(step, backend=b).stream(batch, memory=frames) for b in ("auto", "reference"))
            for _ in range(3):
                x = torch.randn(batch, 3, dtype=torch.float64)
                torch.testing.assert_close(one(x), other(x), equal_nan=True)
