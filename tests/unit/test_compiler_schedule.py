"""Schedules: packing is undone by unpacking, and states are found where they are."""

from __future__ import annotations

import pytest
import torch

from steploop.compiler.schedule import make_schedule
from steploop.compiler.span import Span

T, B = 5, 4
CPU = torch.device("cpu")
LENGTHS = torch.tensor([3, 0, 5, 1])
MASK = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1], [1, 0, 1, 0], [1, 0, 1, 1]]).bool()
CASES = {
    "full": {}, "lengths": {"lengths": LENGTHS}, "holes": {"mask": MASK},
    "both": {"lengths": LENGTHS, "mask": MASK}, "nothing": {"lengths": torch.zeros(B, dtype=torch.long)},
}  # fmt: skip


def valid_of(case):
    valid = torch.ones(T, B, dtype=torch.bool)
    if "lengths" in case:
        valid &= torch.arange(T)[:, None] < case["lengths"]
    return valid & case.get("mask", valid)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=[False, True], ids=["up", "reversed"])
def reverse(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["compact", "real time"])
def mixes(request):
    return request.param


def test_unpack_undoes_pack_and_masked_steps_are_zero(case, reverse, mixes):
    schedule = make_schedule(T, B, CPU, **case, reverse=reverse, mixes_rows=mixes)
    xs, valid = torch.randn(T, B, 2), valid_of(case)
    packed = schedule.pack(xs)
    assert len(packed) == schedule.total == int(valid.sum()) == sum(schedule.sizes)
    assert torch.equal(schedule.unpack(packed), torch.where(valid[..., None], xs, 0))


def test_cotangents_are_the_transpose(case, reverse, mixes):
    for repeat in (False, True):
        schedule = make_schedule(T, B, CPU, **case, reverse=reverse, repeat=repeat, mixes_rows=mixes)
        packed, xs = torch.randn(schedule.total, 2), torch.randn(T, B, 2)
        left = (schedule.unpack(packed) * xs).sum()
        assert torch.allclose(left, (packed * schedule.pack_cotangent(xs)).sum(), atol=1e-5)
        left = (schedule.pack(xs) * packed).sum()
        assert torch.allclose(left, (xs * schedule.unpack_cotangent(packed)).sum(), atol=1e-5)


@pytest.mark.parametrize("spans", [1, 2])
@pytest.mark.parametrize("resets", [None, torch.rand(T, B, generator=torch.Generator().manual_seed(1)) > 0.5])
def test_delays_and_finals(case, reverse, mixes, spans, resets):
    schedule = make_schedule(T, B, CPU, **case, resets=resets, reverse=reverse, mixes_rows=mixes)
    values, initial, back = torch.randn(T, B, 2), torch.randn(B, 2), torch.randn(B, 2)
    expected, state = torch.zeros(T, B, 2), initial.clone()
    valid = valid_of(case)
    for t in reversed(range(T)) if reverse else range(T):
        for b in range(B):
            if valid[t, b]:
                expected[t, b] = back[b] if resets is not None and resets[t, b] else state[b]
                state[b] = values[t, b]
    packed, edge, reset_to = schedule.pack(values), schedule.sort(initial), schedule.sort(back)
    parts = []
    middle = schedule.steps // 2
    bounds = [(0, schedule.steps)] if spans == 1 else [(0, middle), (middle, schedule.steps)]
    for start, stop in bounds:
        span = Span(schedule, start, stop)
        part = packed[span.first : span.first + span.total]
        parts.append(span.delay(part, edge, reset_to if resets is not None else None, down=False))
        edge = span.finish(part, edge, None, down=False)
    assert torch.equal(schedule.unpack(torch.cat(parts)), expected)
    assert torch.equal(schedule.unsort(edge), state)


def test_rows_run_from_the_longest_to_the_shortest():
    schedule = make_schedule(T, B, CPU, lengths=LENGTHS)
    assert schedule.sizes == [3, 2, 2, 1, 1] and schedule.order.tolist() == [2, 0, 3, 1]
    assert make_schedule(T, B, CPU, lengths=LENGTHS, mixes_rows=True).members[1].tolist() == [0, 2]
    assert make_schedule(T, B, CPU, lengths=torch.full((B,), T)).full
