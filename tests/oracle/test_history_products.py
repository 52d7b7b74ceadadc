"""Steps that only multiply and sum a History: equal to the plain loop, and the history of every step is never made."""

from __future__ import annotations

import sys
from pathlib import Path

import devices
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import steploop as sl

sys.path.insert(0, str(Path(__file__).parent.parent))

from agree import agree, situations

STEPS, BATCH, SIZE = 9, 4, 6
HOLES = torch.rand(STEPS, BATCH, generator=torch.Generator().manual_seed(3)) < 0.6
RESETS = torch.rand(STEPS, BATCH, generator=torch.Generator().manual_seed(4)) < 0.3
LENGTHS = torch.tensor([9, 4, 0, 7])
SITUATIONS = situations(LENGTHS, HOLES, RESETS)


class SelfAttention(sl.Step):
    """Written by hand; subclasses write the two products in other ways."""

    def __init__(self, size=SIZE):
        super().__init__()
        self.qkv = nn.Linear(size, 3 * size)
        self.keys = sl.memory.History()
        self.values = sl.memory.History()

    def step(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.attend(q, self.keys(k), self.values(v).values)


class Einsum(SelfAttention):
    def attend(self, q, k, v):
        scores = torch.einsum("bf,bcf->bc", q, k.values)
        weights = torch.softmax(torch.where(k.mask, scores, float("-inf")), -1)
        return torch.einsum("bc,bcf->bf", weights, v)


class Heads(SelfAttention):
    def attend(self, q, k, v):
        q, past, v = q.unflatten(-1, (2, -1)), k.values.unflatten(-1, (2, -1)), v.unflatten(-1, (2, -1))
        scores = torch.einsum("bhf,bchf->bhc", q, past)
        weights = torch.softmax(scores.masked_fill(~k.mask.unsqueeze(1), float("-inf")), -1)
        return torch.einsum("bhc,bchf->bhf", weights, v).flatten(1)


class HeadsLast(SelfAttention):
    """One more axis of the frames goes with the rows, behind the features that are summed over."""

    def attend(self, q, k, v):
        q, past, v = q.unflatten(-1, (-1, 2)), k.values.unflatten(-1, (-1, 2)), v.unflatten(-1, (-1, 2))
        weights = torch.sigmoid(torch.einsum("bfh,bcfh->bhc", q, past))
        return torch.einsum("bhc,bcfh->bfh", weights, v).flatten(1)


class Matmul(SelfAttention):
    def attend(self, q, k, v):
        q = q.view(-1, 2, 1, 3)
        past, v = k.values.view(q.shape[0], -1, 2, 3), v.unflatten(2, (2, 3)).transpose(1, 2)
        scores = torch.matmul(q, past.permute(0, 2, 3, 1)).squeeze(2)
        weights = torch.softmax(scores.masked_fill(~k.mask.unsqueeze(1), float("-inf")), -1)
        return torch.matmul(weights.unsqueeze(2), v).flatten(1)


class SeveralQueries(SelfAttention):
    def attend(self, q, k, v):
        scores = torch.bmm(torch.stack([q, 2 - q], 1), k.values.transpose(1, 2))
        return torch.bmm(torch.sigmoid(scores), v).flatten(1)


class ProductAndSum(SelfAttention):
    def attend(self, q, k, v):
        q, past, v = q.view(-1, 2, 3), k.values.unflatten(-1, (2, 3)), v.unflatten(-1, (2, 3))
        scores = (q.unsqueeze(1) * past).sum(-1)
        weights = torch.softmax(scores.masked_fill(~k.mask.unsqueeze(-1), float("-inf")), 1)
        return (weights.unsqueeze(-1) * v).sum(1).flatten(1)


class SeveralInASum(SelfAttention):
    """Two queries in one product: an axis that the history does not have."""

    def attend(self, q, k, v):
        queries = torch.stack([q, q.cos()], 1)
        scores = (queries.unsqueeze(2) * k.values.unsqueeze(1)).sum(-1)
        return torch.bmm(torch.tanh(scores), v).flatten(1)


class HistoryLeft(SelfAttention):
    """One history read again and again, from the left, without a mask: slots not in use are zeros."""

    def attend(self, q, k, v):
        past = k.values
        weights = torch.sigmoid(torch.bmm(past, q.unsqueeze(2)) + 0.5)
        total = torch.bmm(past.transpose(1, 2), weights).squeeze(2) + (past * weights).sum(1)
        return total + (past * q.unsqueeze(1)).sum(2).sum(1, keepdim=True) + v.mul(weights).sum(1)


class OneFeature(SelfAttention):
    """Axes of size 1."""

    def attend(self, q, k, v):
        past = k.values.unsqueeze(2)  # (B, C, 1, F)
        scores = torch.einsum("bhf,bchf->bhc", q.unsqueeze(1), past)
        return torch.einsum("bhc,bchf->bhf", torch.tanh(scores), v.unsqueeze(2)).squeeze(1)


class QueryFromARecurrence(SelfAttention):
    """The query comes out of a loop; the products stay behind it."""

    def __init__(self):
        super().__init__()
        self.cell = sl.nn.GRUCell(SIZE, SIZE)

    def attend(self, q, k, v):
        q = self.cell(q)
        weights = torch.softmax(torch.einsum("bf,bcf->bc", q, k.values).masked_fill(~k.mask, float("-inf")), -1)
        return torch.einsum("bc,bcf->bf", weights, v)


PRODUCTS = [
    Einsum, Heads, HeadsLast, Matmul, SeveralQueries, ProductAndSum, SeveralInASum, HistoryLeft, OneFeature,
    QueryFromARecurrence,
]  # fmt: skip


class Activated(SelfAttention):
    def attend(self, q, k, v):
        return (torch.relu(k.values) * q.unsqueeze(1)).sum(1) + v.sum(1)


class Returned(SelfAttention):
    def attend(self, q, k, v):
        return torch.einsum("bf,bcf->bc", q, k.values)[:, 0:1] + q, v[:, 0]


class AfterALinear(SelfAttention):
    def attend(self, q, k, v):
        mixed = k.values @ self.qkv.weight[:SIZE]
        return torch.einsum("bf,bcf->bc", q, mixed).sum(1, keepdim=True) * q + torch.einsum("bcf,bcf->bf", v, v)


class InALoop(SelfAttention):
    """The scores depend on what was read before: those products are part of the loop."""

    def __init__(self):
        super().__init__()
        self.read = sl.State(SIZE)

    def attend(self, q, k, v):
        scores = torch.einsum("bf,bcf->bc", q + self.read.prev, k.values)
        weights = torch.softmax(scores.masked_fill(~k.mask, float("-inf")), -1)
        self.read.next = torch.einsum("bc,bcf->bf", weights, v)
        return self.read.next


OTHERS = [Activated, Returned, AfterALinear, InALoop]


def set_up(kind, **options):
    torch.manual_seed(0)
    step = kind(**options).double()
    return step, torch.randn(STEPS, BATCH, SIZE, dtype=torch.float64, requires_grad=True)


def spoiled(x, lengths=None, mask=None, resets=None):
    """x with NaN where no step is valid."""
    lengths, mask = devices.moved((lengths, mask))
    valid = torch.ones(STEPS, BATCH, dtype=torch.bool) if mask is None else mask
    valid = valid if lengths is None else valid & (torch.arange(STEPS)[:, None] < lengths)
    return x.detach().masked_fill(~valid.unsqueeze(-1), float("nan")).requires_grad_()


def product_names(step, x):
    plan = sl.Loop(step).plan(x)
    return [o.name for p in (plan, plan.backward) for o in [*p.before, *p.after] if o.name.startswith("history_")]


@pytest.mark.parametrize("kind", [*PRODUCTS, *OTHERS])
def test_equals_the_plain_loop(kind):
    step, x = set_up(kind)
    arguments = SITUATIONS["all"]
    agree(step, spoiled(x, **arguments), backend="auto", loop={"reverse": True}, **arguments)


@pytest.mark.parametrize("situation", ["plain", "lengths", "holes", "resets"])
@pytest.mark.parametrize("kind", [Einsum, SeveralInASum])
def test_equals_the_plain_loop_in_every_situation(kind, situation):
    step, x = set_up(kind)
    agree(step, spoiled(x, **SITUATIONS[situation]), backend="auto", **SITUATIONS[situation])


@pytest.mark.parametrize("situation", ["plain", "all"])
@pytest.mark.parametrize("kind", [Heads, ProductAndSum])
def test_goes_on_from_a_state(kind, situation):
    step, x = set_up(kind)
    _, state = sl.Loop(step)(x.detach()[:5], lengths=torch.tensor([5, 0, 3, 1]))
    for name, value in state.items():
        if value.is_floating_point():
            state[name] = value.clone().requires_grad_()
    found = agree(step, x, backend="auto", state=state, **SITUATIONS[situation])
    assert sum(name.startswith("gradient of argument") for name in found) == 3  # x and both histories


@pytest.mark.parametrize("kind", [Matmul, ProductAndSum, OneFeature])
def test_other_sizes_and_no_gradients(kind):
    step, x = set_up(kind)
    loop, plain = sl.Loop(step), sl.Loop(step, backend="reference")
    for steps, batch in ((9, 4), (3, 4), (1, 2), (6, 1), (2, 3)):
        found, expected = loop(x[:steps, :batch]), plain(x[:steps, :batch])
        torch.testing.assert_close(found[0], expected[0])
        with torch.no_grad():
            torch.testing.assert_close(loop(x[:steps, :batch])[0], expected[0])
    for lengths in ([0, 0, 0, 0], [1, 0, 0, 1]):
        agree(step, x, backend="auto", lengths=torch.tensor(lengths))
    agree(step, x[:0].detach().requires_grad_(), backend="auto")


@pytest.mark.parametrize("kind", [Heads, HistoryLeft])
def test_a_stream_gives_the_same(kind):
    step, x = set_up(kind)
    stream = sl.Loop(step).stream(BATCH)
    with torch.no_grad():
        found = torch.stack([stream(frame) for frame in x])
    torch.testing.assert_close(found, sl.Loop(step)(x)[0].detach())


@pytest.mark.parametrize("kind", PRODUCTS)
def test_the_plan_shows_the_products(kind):
    names = product_names(*set_up(kind))
    assert {"history_scores", "history_sums", "history_cotangent"} <= set(names)


@pytest.mark.parametrize("kind", [Activated, AfterALinear, InALoop])
def test_other_readers_get_the_history_itself(kind):
    assert product_names(*set_up(kind)) == []


def largest_tensor(step, x, train):
    """Entries of the largest tensor that any call reads, inside the loop's operators too."""
    loop = sl.Loop(step)
    loop(x)[0].sum().backward()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as run, torch.set_grad_enabled(train):
        y, _ = loop(x)
        if train:
            y.sum().backward()
    shapes = [s for event in run.events() for s in event.input_shapes or () if all(isinstance(n, int) for n in s)]
    return max(torch.Size(s).numel() for s in shapes)


@pytest.mark.parametrize("train", [True, False], ids=["training", "no gradients"])
@pytest.mark.parametrize("kind", [Matmul, ProductAndSum, Activated])
def test_the_history_of_every_step_is_never_made(kind, train):
    torch.manual_seed(0)
    steps, batch = 24, 2
    every = steps * batch * steps * SIZE
    largest = largest_tensor(kind(), torch.randn(steps, batch, SIZE, requires_grad=True), train)
    if kind is Activated:  # so the measure does see it where it is made
        assert largest >= every
    else:
        assert largest <= every // 2
