"""A loop computes no columns of a product that nobody reads, however the step is spelled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agree import agree
from torch import nn

import steploop as sl

I, H = 6, 4


def concatenated(step, x, h):
    return step.linear(torch.cat([x, h], 1))


def the_other_way_round(step, x, h):
    return F.linear(torch.cat([h, x], 1), step.linear.weight, step.linear.bias)


def chunked_weight(step, x, h):
    wx, wh = step.linear.weight.split([I, H], 1)
    return F.linear(x, wx) + F.linear(h, wh, step.linear.bias)


def by_einsum(step, x, h):
    return torch.einsum("bi,oi->bo", torch.cat([x, h], 1), step.linear.weight) + step.linear.bias


def two_products(step, x, h):
    both = torch.cat([x, h], 1)
    return step.linear(both) + F.linear(both, step.linear.weight.flip(0))


SPELLINGS = [concatenated, the_other_way_round, chunked_weight, by_einsum, two_products]


class Cell(sl.Step):
    def __init__(self, spelling):
        super().__init__()
        self.linear, self.spelling = nn.Linear(I + H, 4 * H).double(), spelling
        self.h, self.c = sl.State(H), sl.State(H)

    def step(self, x):
        i, f, g, o = self.spelling(self, x, self.h.prev).chunk(4, 1)
        self.c.next = torch.sigmoid(f) * self.c.prev + torch.sigmoid(i) * torch.tanh(g)
        self.h.next = torch.sigmoid(o) * torch.tanh(self.c.next)
        return self.h.next


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s is not by_einsum])  # torch makes it a bmm of one matrix
def test_inputs_without_gradients_cost_nothing(spelling):
    plan = sl.Loop(Cell(spelling)).plan(torch.randn(5, 3, I, dtype=torch.float64))
    for loop in (*plan.loops, *plan.backward.loops):
        assert {op.shape for op in loop.ops if op.name == "mm"} <= {f"(B, {H})", f"(B, {4 * H})"}
    assert any(op.name == "mm" and op.shape == f"(B, {H})" for loop in plan.backward.loops for op in loop.ops)


@pytest.mark.parametrize("gradient", [False, True], ids=["inputs without", "inputs with"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_the_numbers_are_those_of_the_plain_loop(backend, spelling, gradient):
    step = Cell(spelling)
    for size in ((5, 3), (5, 1), (2, 4)):
        x = torch.randn(*size, I, dtype=torch.float64, requires_grad=gradient)
        agree(step, x, backend=backend, lengths=torch.arange(size[1]).clamp(max=size[0]))
