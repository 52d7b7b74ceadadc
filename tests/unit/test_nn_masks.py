"""length_mask and the reductions over marked entries: values, gradients, empty rows, and use in native loops."""

from __future__ import annotations

import math

import pytest
import torch
from agree import agree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import steploop as sl

REDUCTIONS = {
    "softmax": lambda x, m, dim: sl.nn.masked_softmax(x, m, dim),
    "sum": lambda x, m, dim: sl.nn.masked_sum(x, m, dim),
    "mean": lambda x, m, dim: sl.nn.masked_mean(x, m, dim),
    "max": lambda x, m, dim: sl.nn.masked_max(x, m, dim, empty=-3.0),
}
PLAIN = {
    "softmax": lambda v: v.softmax(0),
    "sum": lambda v: v.sum(),
    "mean": lambda v: v.mean(),
    "max": lambda v: v.max(),
}
every = pytest.mark.parametrize("name", REDUCTIONS)


def by_hand(name, x, mask):
    """x, mask (N, S): a row at a time, of the marked entries alone."""
    rows = []
    for values, marked in zip(x, mask, strict=True):
        some = values[marked]
        if name == "softmax":
            row = torch.zeros_like(values)
            rows.append(row.index_put((marked.nonzero()[:, 0],), PLAIN[name](some)) if len(some) else row)
        else:
            empty = -3.0 if name == "max" else 0.0
            rows.append(PLAIN[name](some) if len(some) else torch.full((), empty, dtype=x.dtype))
    return torch.stack(rows) if rows else x if name == "softmax" else x.new_zeros(0)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@every
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(0, 5), st.floats(0, 1), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_is_the_reduction_of_the_marked_entries(name, rows, size, share, junk):
    mask = torch.rand(rows, size) < share
    x = torch.randn(rows, size, dtype=torch.float64) * 10
    x[~mask] = junk
    x.requires_grad_()
    clean = torch.where(mask, x.detach(), 0.0).requires_grad_()
    found, expected = REDUCTIONS[name](x, mask, 1), by_hand(name, clean, mask)
    close(found, expected)
    if expected.requires_grad:
        cotangent = torch.randn_like(found)
        got, wanted = (torch.autograd.grad(y, v, cotangent)[0] for y, v in ((found, x), (expected, clean)))
        close(got, wanted)
        assert (got[~mask] == 0).all()


@every
def test_any_axis_and_any_mask_that_fits(name):
    reduce = REDUCTIONS[name]
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    mask = torch.rand(3, 4) < 0.6
    expected = reduce(x, mask.unsqueeze(-1).expand(3, 4, 5), 1)
    close(reduce(x, mask, 1), expected)  # the first axes of x
    close(reduce(x, mask, -2), expected)
    close(reduce(x, mask.unsqueeze(-1), 1), expected)
    last = torch.rand(3, 1, 5) < 0.6
    close(reduce(x, last, -1), reduce(x, last.expand(3, 4, 5), -1))
    row = torch.tensor([True, False, True])[:, None, None]
    close(reduce(x, row, 2), reduce(x, row.expand(3, 4, 5), 2))
    flat = x.transpose(1, 2).reshape(15, 4)
    by_rows = by_hand(name, flat, mask.unsqueeze(1).expand(3, 5, 4).reshape(15, 4))
    close(expected, by_rows.view(3, 5, 4).transpose(1, 2) if name == "softmax" else by_rows.view(3, 5))


@pytest.mark.parametrize("name", ["sum", "mean", "max"])
def test_several_axes_and_keepdim(name):
    function = getattr(sl.nn, f"masked_{name}")
    x, mask = torch.randn(3, 4, 5, dtype=torch.float64), torch.rand(3, 4, 5) < 0.5
    mask[1] = False
    both = function(x, mask, (1, 2))
    close(both, function(x.flatten(1), mask.flatten(1), 1))
    assert both[1] == 0
    assert function(x, mask, (1, 2), keepdim=True).shape == (3, 1, 1)
    assert function(x, mask, 1, keepdim=True).shape == (3, 1, 5)
    assert function(x, None, 1).shape == (3, 5)
    close(function(x, None, 1), function(x, torch.ones_like(mask), 1))


def test_dtypes():
    mask = torch.tensor([[True, False, True], [False] * 3])
    whole = torch.tensor([[2**60 + 1, 2**62, 3], [1, 2, 3]])
    assert sl.nn.masked_sum(whole, mask, 1).tolist() == [2**60 + 4, 0]
    assert sl.nn.masked_max(whole, mask, 1).tolist() == [2**60 + 1, 0]
    assert sl.nn.masked_max(-whole.abs(), mask, 1, empty=7).tolist() == [-3, 7]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x = torch.randn(2, 3, dtype=dtype)
        for reduce in REDUCTIONS.values():
            assert reduce(x, mask, 1).dtype == dtype


def test_softmax_of_huge_scores():
    x = torch.tensor([[-1e30, -2e30, 5.0], [1e30, 1e30, 1e38], [-1e38, -1e38, math.nan]], requires_grad=True)
    mask = torch.tensor([[True, True, False]] * 3)
    weights = sl.nn.masked_softmax(x, mask, 1)
    assert weights.tolist() == [[1, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0]]
    weights.square().sum().backward()
    assert x.grad.isfinite().all()
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        nothing = torch.zeros(1, 3, requires_grad=True)
        sl.nn.masked_softmax(nothing, torch.zeros(1, 3).bool(), 1).sum().backward()
    assert (nothing.grad == 0).all()


def test_length_mask():
    lengths = torch.tensor([0, 2, 9, -1])
    assert sl.length_mask(lengths, 3).tolist() == [[False] * 3, [True, True, False], [True] * 3, [False] * 3]
    assert sl.length_mask(lengths, 0).shape == (4, 0)
    assert sl.length_mask(lengths.view(2, 2).int(), 3).shape == (2, 2, 3)
    assert sl.length_mask([1, 2], 2).tolist() == [[True, False], [True, True]]
    with pytest.raises(sl.InputError, match="integers"):
        sl.length_mask(torch.rand(3), 3)


@pytest.mark.parametrize("name", [f"masked_{name}" for name in REDUCTIONS])
def test_masks_that_do_not_fit_are_named(name):
    function, x = getattr(sl.nn, name), torch.randn(3, 4, 4)
    for mask, dim, words in (
        (torch.ones(3, 4), 1, "boolean"),
        (torch.ones(3, 4).bool(), -1, "its first ones, with dim=-1"),  # (B, S) for x (B, heads, S): which 4?
        (torch.ones(4, 4).bool(), 1, r"\(3, 4, 4\)"),
        (torch.ones(3, 1).bool(), 1, r"\(3, 4, 4\)"),
        (torch.ones(1, 3, 4, 4).bool(), 1, r"\(3, 4, 4\)"),
    ):
        with pytest.raises(sl.InputError, match=words) as caught:
            function(x, mask, dim)
        assert name in str(caught.value)


class Pools(sl.Step):
    """Every reduction, over a state's axis and over one whose size only a call knows."""

    def __init__(self):
        super().__init__()
        self.h, self.mix = sl.State(4, 3), nn.Linear(3 + 5, 12).double()

    def step(self, x, where, *, memory, memory_lengths):
        h = self.h.prev
        mask = sl.length_mask(memory_lengths, memory.shape[1])
        clean = torch.where(mask.unsqueeze(-1), memory, 0.0)
        scores = (clean * h.sum(1).unsqueeze(1)).sum(-1)
        looked = sl.nn.masked_sum(memory, mask, 1) + sl.nn.masked_sum(
            clean * sl.nn.masked_softmax(scores, mask, 1).unsqueeze(-1), mask, 1
        )
        pooled = [
            sl.nn.masked_mean(h, where, 1),
            sl.nn.masked_max(h, where, 1, empty=0.5),
            sl.nn.masked_max(scores, mask, 1, keepdim=True),
            sl.nn.masked_mean(h, where.unsqueeze(-1), (1, 2), keepdim=True).squeeze(1),
        ]
        self.h.next = torch.tanh(self.mix(torch.cat([x + looked, *pooled[1:]], -1))).view_as(h) + pooled[0].unsqueeze(1)
        return torch.cat([looked, *pooled], -1)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_inside_loops(backend):
    step = Pools()
    for size in (5, 3, 7):
        xs = torch.randn(6, 3, 3, dtype=torch.float64, requires_grad=True)
        where = torch.rand(6, 3, 4) < 0.4
        lengths = torch.tensor([size, 0, 2])
        memory = torch.randn(3, size, 3, dtype=torch.float64)
        memory[~sl.length_mask(lengths, size)] = math.nan
        agree(
            step, xs, where, memory=memory.requires_grad_(), memory_lengths=lengths, backend=backend,
            lengths=torch.tensor([6, 2, 4]), save="states",
        )  # fmt: skip
    plan = sl.Loop(step).plan(xs, where, memory=memory, memory_lengths=lengths)
    assert {loop.backend for loop in plan.loops} == {"cpu"}
