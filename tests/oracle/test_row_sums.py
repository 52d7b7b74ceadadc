"""Gradients of what is the same at every step: linear operations run on sums over the steps, not on every step."""

from __future__ import annotations

import pytest
import torch
from agree import agree, situations
from torch import nn
from torch.profiler import ProfilerActivity, profile

import steploop as sl

T, B, D, A = 7, 4, 5, 6
SIZES = (6, 3, 9)


class Projected(sl.Step):
    """Keys of a masked memory, which additive attention reads at every step."""

    def __init__(self):
        super().__init__()
        self.query, self.keys, self.energy = nn.Linear(A, A), nn.Linear(D, A), nn.Linear(A, 1, bias=False)
        self.mix, self.h = nn.Linear(D + 2, A), sl.State(A)

    def step(self, x, *, memory, valid):
        memory = torch.where(valid.unsqueeze(-1), memory, 0.0)
        hidden = torch.tanh(self.keys(memory) + self.query(self.h.prev).unsqueeze(1))
        weights = sl.nn.masked_softmax(self.energy(hidden).squeeze(-1), valid)
        context = (weights.unsqueeze(1) @ memory).squeeze(1)
        self.h.next = torch.tanh(self.mix(torch.cat([x, context], -1)))
        return self.h.next


class Scaled(Projected):
    """Constants on the way to the keys, and keys that are read in two ways, one of them not linear."""

    def step(self, x, *, memory, valid):
        scale = valid.to(memory.dtype).unsqueeze(-1)
        turned = torch.bmm(memory * scale * 2.0, torch.tanh(memory.transpose(1, 2) @ memory))
        keys = self.keys(turned)
        scores = (keys * self.query(self.h.prev).unsqueeze(1)).sum(-1) + keys.square().sum(-1)
        context = (scores.softmax(-1).unsqueeze(1) @ (keys @ self.keys.weight)).squeeze(1)
        self.h.next = torch.tanh(self.mix(torch.cat([x, context], -1)))
        return self.h.next, keys.sum(1)


def arguments(size):
    xs, memory = torch.randn(T, B, 2, dtype=torch.float64), torch.randn(B, size, D, dtype=torch.float64)
    return xs.requires_grad_(), dict(memory=memory.requires_grad_(), valid=torch.rand(B, size) < 0.7)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("kind", [Projected, Scaled])
def test_gradients_are_those_of_the_plain_loop(kind, backend):
    step = kind().double()
    how = situations(torch.tensor([7, 0, 3, 5]), torch.rand(T, B) < 0.7, torch.rand(T, B) < 0.3)
    for size, given in zip((*SIZES, 6, 9), how.values(), strict=True):
        xs, constants = arguments(size)
        agree(step, xs, backend=backend, save="states", **constants, **given)


def test_without_a_loop():
    class Batched(Projected):
        def step(self, x, *, memory, valid):
            keys = self.keys(torch.where(valid.unsqueeze(-1), memory, 0.0))
            return self.energy(torch.tanh(keys * x.sum(-1)[:, None, None])).squeeze(-1)

    step = Batched().double()
    for size in SIZES:
        xs, constants = arguments(size)
        agree(step, xs, backend="cpu", save="states", lengths=torch.tensor([7, 0, 3, 5]), **constants)


def test_no_product_is_larger_than_it_need_be():
    """The gradients of the projection are products of sums over the steps: as many rows as the memory has entries."""
    step = Projected().double()
    loop = sl.Loop(step)
    for size in SIZES:  # the last one with sizes that only a call knows
        xs, constants = arguments(size)
        outputs, _ = loop(xs, **constants)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            outputs.sum().backward()
        products = [e.input_shapes[:2] for e in recorded.events() if e.name == "aten::mm"]
        large = [p for p in products if max(p[0], default=0) >= T * B * size]
        # of the energies' weights only, (1, rows) times (rows, A), for which both sides differ from step to step
        assert [min(p[0]) for p in large] == [1], products
        assert any(B * size in p[0] for p in products)
