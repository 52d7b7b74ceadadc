"""The places of the largest numbers: torch's stable sort, in every backend, at ties, infinities and NaN."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import steploop as sl
from steploop.compiler.largest import largest_places


def values_of(kind, size, batch=4):
    torch.manual_seed(size)
    values = torch.randn(batch, size, dtype=torch.float64)
    if kind == "ties":
        values = values.mul(2).round()
    if kind == "endless":
        values = torch.where(values > 0.5, values, -torch.inf)
    if kind == "nan":
        values = torch.where(values > 1, torch.nan, values)
    return -values.sort(-1).values if kind == "falling" else values.sort(-1).values if kind == "rising" else values


KINDS = ["random", "ties", "endless", "nan", "rising", "falling"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "count"), [(1, 1), (5, 5), (16, 1), (40, 8), (300, 3), (300, 64)])
def test_the_operator_is_a_stable_sort(kind, size, count):
    values = values_of(kind, size)
    expected = values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(largest_places(values, count), expected)
    assert torch.equal(torch.func.vmap(lambda v: largest_places(v, count))(values), expected)


class Router(sl.Step):
    """A mixture of experts: the best two of them see each row."""

    def __init__(self, experts, count, size=6):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, size, size) / 3)
        self.router = nn.Linear(2 * size, experts)
        self.h, self.count = sl.State(size), count

    def step(self, x):
        scores = self.router(torch.cat([x, self.h.prev], -1)).mul(4).round().div(4)  # ties
        places = largest_places(scores, self.count)
        shares = scores.gather(1, places).softmax(-1)
        each = torch.einsum("bi,eij->bej", self.h.prev + x, self.weight)
        chosen = each.gather(1, places.unsqueeze(2).expand(-1, -1, each.shape[2]))
        self.h.next = torch.tanh((shares.unsqueeze(2) * chosen).sum(1))
        return self.h.next, places


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize(("experts", "count"), [(3, 1), (9, 2), (40, 33)])
def test_in_a_step(backend, experts, count):
    loop = sl.Loop(Router(experts, count).double(), backend=backend)
    for steps, batch in ((4, 3), (2, 1), (5, 2)):
        x, lengths = torch.randn(steps, batch, 6, dtype=torch.float64), torch.randint(0, steps + 1, (batch,))
        sl.verify(loop, x)
        sl.verify(loop, x, lengths=lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int32])
@pytest.mark.parametrize("kind", KINDS)
def test_native_loops_at_every_kind_of_numbers(kind, dtype):
    class Places(sl.Step):
        def __init__(self, count):
            super().__init__()
            self.count, self.before = count, sl.State(count, init=0, dtype=torch.int64)

        def step(self, x):
            self.before.next = largest_places(x + self.before.prev[:, :1].to(x.dtype), self.count)
            return self.before.next

    for size, count in ((5, 5), (37, 3), (100, 20)):
        x = values_of(kind, size)
        x = x.to(dtype) if dtype.is_floating_point else (3 * x).nan_to_num(9, 9, -9).to(dtype)
        loop = sl.Loop(Places(count), backend="cpu")
        found, _ = loop(x.unsqueeze(0).expand(3, *x.shape))
        expected, _ = sl.Loop(Places(count), backend="reference")(x.unsqueeze(0).expand(3, *x.shape))
        assert torch.equal(found, expected)
