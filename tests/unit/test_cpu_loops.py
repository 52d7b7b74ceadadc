"""Whole loops on the native backend: schedules, products, attention, look-ups, threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from cpu_loops import assert_same, both, make_case, run

import steploop as sl
from steploop.backends import cpu, eager
from steploop.backends.cpu import build
from steploop.backends.cpu import runner as native
from steploop.backends.native import emit
from steploop.compiler.schedule import make_schedule
from steploop.compiler.span import Span

pytestmark = pytest.mark.pairs

T, B, H = 6, 9, 21


@pytest.fixture(autouse=True, params=["tiles", "team"])
def sharing(request, monkeypatch):
    """Every loop with a tile of rows for each thread, and with threads that share columns."""
    if request.param == "team":
        monkeypatch.setattr(native, "CACHE", -1)
        monkeypatch.setattr(native, "WAIT", -1)
        monkeypatch.setattr(native, "PANEL", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)


def lstm(hidden=H, dtype=torch.float32, batch=B, time=T):
    weight = torch.randn(4 * hidden, hidden, dtype=dtype) * 0.3

    def step(xs, constants, states):
        (x,), (h, c) = xs, states
        i, f, g, o = (x + F.linear(h, weight)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return [h.clone(), i.clone()], [h, c]

    states = [torch.randn(batch, hidden, dtype=dtype), torch.randn(batch, hidden, dtype=dtype)]
    return make_case(step, [torch.randn(time, batch, 4 * hidden, dtype=dtype)], states)


def lengths_of(batch=B, time=T):
    return torch.randint(0, time + 1, (batch,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("resetting", [False, True])
def test_schedules(dtype, down, ragged, resetting):
    lengths = lengths_of() if ragged else None
    resets = torch.rand(T, B) < 0.2 if resetting else None
    assert_same(lstm(dtype=dtype), lengths, resets, down, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 5, 6, 7, 12, 13, 33, 70])
@pytest.mark.parametrize("hidden", [1, 16, 33])
def test_sizes_need_no_new_kernel(batch, hidden):
    assert_same(lstm(hidden, batch=batch), lengths_of(batch), rtol=1e-5, atol=1e-5)


def test_deep_and_wide_product():
    assert_same(lstm(200, batch=8), rtol=1e-4, atol=1e-5)


def test_a_span_of_the_steps():
    case = lstm()
    schedule = make_schedule(T, B, torch.device("cpu"), lengths_of())
    runner = cpu.compile(case.loop)
    whole_states, whole = run(runner, case, schedule)
    cut = schedule.steps // 2
    middle, first = run(runner, case, schedule, span=Span(schedule, 0, cut))
    case.states = [schedule.unsort(s) for s in middle]
    states, second = run(runner, case, schedule, span=Span(schedule, cut, schedule.steps))
    for a, b, c in zip(whole, first, second):
        assert torch.equal(a, torch.cat([b, c]))
    for a, b in zip(whole_states, states):
        assert torch.equal(a, b)


@pytest.mark.parametrize("batch", [2, 13, 64])
def test_threads_change_no_bit(batch):
    case = lstm(40, batch=batch, time=20)
    schedule = make_schedule(20, batch, torch.device("cpu"), lengths_of(batch, 20))
    runner = cpu.compile(case.loop)
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            states, kept = run(runner, case, schedule)
            found.append([*states, *kept])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_team_changes_no_bit(monkeypatch):
    case = lstm(150, batch=21, time=20)
    schedule = make_schedule(20, 21, torch.device("cpu"), lengths_of(21, 20), None, torch.rand(20, 21) < 0.1)
    back = [torch.full_like(s, 0.5) for s in case.states]
    found = []
    for least in (1 << 40, -1):
        monkeypatch.setattr(native, "CACHE", least)
        states, kept = run(cpu.compile(case.loop), case, schedule, False, back)
        found.append([*states, *kept])
    assert all(map(torch.equal, *found))


def test_two_rows_alone_give_the_same_bits():
    """(One row is multiplied with the weight as it is, which sums in another order.)"""
    case = lstm(40, batch=13)
    schedule = make_schedule(T, 13, torch.device("cpu"))
    runner = cpu.compile(case.loop)
    _, (together, _) = run(runner, case, schedule)
    steps, states = case.steps[0], case.states
    for count in (2, 1):
        case.steps, case.states = [steps[:, 4 : 4 + count]], [s[4 : 4 + count] for s in states]
        _, (alone, _) = run(runner, case, make_schedule(T, count, torch.device("cpu")))
        expected = together.view(T, 13, -1)[:, 4 : 4 + count].flatten(0, 1)
        assert torch.equal(expected, alone) if count == 2 else torch.allclose(expected, alone, atol=1e-6)


def test_a_broken_kernel_is_noticed(monkeypatch):
    monkeypatch.setenv("STEPLOOP_TEST_BREAK", "cpu")
    with pytest.raises(AssertionError):
        assert_same(lstm(), rtol=1e-5, atol=1e-5)


def test_products_of_every_layout():
    w, v, u = torch.randn(H, 5), torch.randn(7, H), torch.randn(2, H, 4)

    def step(xs, constants, states):
        (x,), (h,), (k,) = xs, states, constants
        heads = h[:, :20].reshape(-1, 4, 5)
        results = [
            h @ w, F.linear(h, v), h[:, 1:] @ w[1:], h @ w[:, 1:4], h @ v.t()[:, ::2], (h + x) @ w, h @ u[1],
            heads @ w[:5], torch.einsum("bhd,de->bhe", heads, w[:5]), torch.einsum("bh,he->be", x, w),
            h @ (v[0]), torch.einsum("bhd,bhd->bh", heads, heads), torch.bmm(heads, heads.transpose(1, 2)),
            torch.addmm(x[:, :5], h, w, beta=2, alpha=0.5), torch.einsum("bi,bij->bj", h, k), k @ w[:4],
            F.linear(h, v, v[:, 0]), torch.cat([h, x], -1) @ torch.cat([w, w]),
        ]  # fmt: skip
        return [r.clone() for r in results], [h * 0.5 + x]

    case = make_case(step, [torch.randn(T, B, H)], [torch.randn(B, H)], [torch.randn(B, H, 4)])
    assert_same(case, lengths_of(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_attention(dynamic):
    projected, scale = torch.randn(H, 8), torch.randn(8)

    def step(xs, constants, states):
        (x,), (h,), (memory, mask) = xs, states, constants
        query = h @ projected
        additive = (torch.tanh(query[:, None] + memory) * scale).sum(-1)
        weights = additive.masked_fill(~mask, -torch.inf).softmax(-1)
        context = torch.bmm(weights[:, None], memory)[:, 0]
        dots = torch.einsum("bd,bsd->bs", query, memory).softmax(-1)
        other = torch.einsum("bs,bsd->bd", dots, memory)
        heads = torch.einsum("bhd,bshd->bhs", query.view(-1, 2, 4), memory.unflatten(2, (2, 4))).softmax(-1)
        third = torch.einsum("bhs,bshd->bhd", heads, memory.unflatten(2, (2, 4))).flatten(1)
        new = torch.tanh(x + torch.cat([context, other, third[:, :5]], -1))
        return [weights.clone(), context.clone(), heads.clone()], [new]

    size = 11
    lengths = torch.randint(1, size + 1, (B,))
    mask = torch.arange(size) < lengths[:, None]
    axes = [("constant", 0, 1), ("constant", 1, 1)] if dynamic else []
    steps, states = [torch.randn(T, B, H)], [torch.randn(B, H)]
    case = make_case(step, steps, states, [torch.randn(B, size, 8), mask], axes)
    assert_same(case, lengths_of(), rtol=1e-5, atol=1e-5)


def test_look_ups():
    table = torch.randn(10, 6)

    def step(xs, constants, states):
        (token,), (last, h), (memory,) = xs, states, constants
        embedded = F.embedding(last, table) + F.embedding(token, table)
        h = torch.tanh(h + embedded)
        chosen = (h @ table.t()).argmax(-1)
        picked = memory.gather(1, (chosen % 4)[:, None, None].expand(-1, 1, 6))[:, 0]
        counts = torch.zeros_like(h).scatter(1, (chosen % 6)[:, None], 1.0)
        return [picked.clone(), counts.clone(), table.index_select(0, chosen), table[token].clone()], [
            chosen,
            h,
        ]

    tokens = torch.randint(0, 10, (T, B))
    states = [torch.randint(0, 10, (B,)), torch.randn(B, 6)]
    case = make_case(step, [tokens], states, [torch.randn(B, 4, 6)])
    assert_same(case, lengths_of(), rtol=1e-5, atol=1e-5)


def test_states_of_other_kinds():
    def step(xs, constants, states):
        (x,), (matrix, count, flag, fixed) = xs, states
        matrix = matrix * 0.9 + x[:, :, None] * x[:, None, :3]
        count = torch.where(flag, count + 1, count // 2)
        return [matrix.sum(-1), flag.clone()], [matrix, count, x.sum(-1) > 0, fixed]

    states = [torch.randn(B, H, 3), torch.arange(B), torch.rand(B) > 0.5, torch.randn(B, 2)]
    case = make_case(step, [torch.randn(T, B, H)], states)
    assert_same(case, lengths_of(), torch.rand(T, B) < 0.2, rtol=1e-5, atol=1e-5)
    assert_same(case, lengths_of(), down=True, rtol=1e-5, atol=1e-5)


def test_normalised_lstm():
    weight, gain = torch.randn(4 * H, H) * 0.3, torch.randn(4 * H)

    def step(xs, constants, states):
        (x,), (h, c) = xs, states
        gates = F.layer_norm(x + F.linear(h, weight), (4 * H,), gain)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return [c.clone()], [o.sigmoid() * F.layer_norm(c, (H,)).tanh(), c]

    case = make_case(step, [torch.randn(T, B, 4 * H)], [torch.randn(B, H), torch.randn(B, H)])
    assert_same(case, lengths_of(), rtol=1e-4, atol=1e-4)


def test_reductions_of_single_elements():
    def step(xs, constants, states):
        (x,), (h,) = xs, states
        column, wide = h[:, :6].view(-1, 2, 3, 1), x[:, :8].view(-1, 2, 1, 4)
        results = [
            column @ wide, column.sum(-1), column.argmax(-1), column.softmax(-1), column.cumsum(-1), h[:, :1].sum(-1),
            h[:, :1].argmax(-1), torch.bmm(h[:, :3, None], x[:, None, :4]), (column > 0).any(-1),
        ]  # fmt: skip
        return [r.clone() for r in results], [h * 0.5 + x]

    assert_same(make_case(step, [torch.randn(T, B, H)], [torch.randn(B, H)]), lengths_of())


def test_an_index_that_is_overwritten_in_its_own_nest():
    jump, value = torch.tensor([3, 0, 1, 2]), torch.randn(4)

    def step(xs, constants, states):
        (x,), (place,) = xs, states
        return [value[place].clone()], [jump[place] + 0 * x]

    case = make_case(step, [torch.zeros(T, B, dtype=torch.long)], [torch.arange(B) % 4])
    assert_same(case)


def test_several_python_threads_at_once():
    case = lstm(40, batch=12, time=30)
    schedule = make_schedule(30, 12, torch.device("cpu"))
    runner = cpu.compile(case.loop)
    _, (wanted, *_) = run(runner, case, schedule)
    with ThreadPoolExecutor(4) as pool:
        for _, (found, *_) in pool.map(lambda _: run(runner, case, schedule), range(16)):
            assert torch.equal(wanted, found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_fork():
    case = lstm(40, batch=12, time=30)
    schedule = make_schedule(30, 12, torch.device("cpu"))
    runner = cpu.compile(case.loop)
    _, (wanted, *_) = run(runner, case, schedule)
    child = os.fork()
    if child == 0:
        _, (found, *_) = run(runner, case, schedule)
        os._exit(0 if torch.equal(wanted, found) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_weights_changed_in_place_are_seen():
    weight = torch.randn(H, H)
    case = make_case(
        lambda xs, constants, states: ([], [torch.tanh(states[0] @ weight + xs[0])]),
        [torch.randn(T, B, H)], [torch.zeros(B, H)],
    )  # fmt: skip
    schedule = make_schedule(T, B, torch.device("cpu"))
    runner = cpu.compile(case.loop)
    (before,), _ = run(runner, case, schedule)
    weight.data.mul_(0.5)
    (after,), _ = run(runner, case, schedule)
    (wanted,), _ = run(eager.Runner(case.loop), case, schedule)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, wanted, rtol=1e-5, atol=1e-6)


def test_what_it_declines():
    def step(xs, constants, states):
        return [], [torch.linalg.qr(states[0].view(-1, 3, 3)).Q.flatten(1) + xs[0]]

    case = make_case(step, [torch.randn(T, B, 9)], [torch.randn(B, 9)])
    ((reason, line), *_) = cpu.reasons_against(case.loop)
    assert "linalg_qr" in reason and line.startswith("test_cpu_loops.py:")


def test_zero_rows_and_steps():
    case = lstm()
    for time, batch in ((0, 4), (3, 0)):
        case.steps, case.states = [torch.randn(time, batch, 4 * H)], [torch.randn(batch, H)] * 2
        states, kept = run(cpu.compile(case.loop), case, make_schedule(time, batch, torch.device("cpu")))
        assert [s.shape for s in states] == [(batch, H)] * 2
        assert kept[0].shape == (time * batch, H)
        assert torch.equal(states[0], case.states[0])


def test_both_is_not_vacuous():
    (_, wanted), (_, found) = both(lstm())
    assert wanted[0].abs().sum() > 0 and found[0].data_ptr() != wanted[0].data_ptr()


@pytest.mark.parametrize("size", [16, 21, 128])  # rows of a tile lie together; with gaps; and would be 4 KB apart
@pytest.mark.parametrize("batch", [1, 2, 13])
@pytest.mark.parametrize("ragged", [False, True])
def test_products_of_several_rows_in_each_row(size, batch, ragged):
    """They are one product where the rows lie together. The state and its next value change places at every step."""
    weight = torch.randn(size, size) * 0.1

    def step(xs, constants, states):
        (x,), (h,) = xs, states
        h = torch.tanh(h @ weight + x.unsqueeze(1) + h.flip(1) * 0.3 + h.flip(2) * 0.1)
        return [h.sum(2)], [h]

    case = make_case(step, [torch.randn(7, batch, size)], [torch.randn(batch, 8, size)])
    text = cpu.compile(case.loop).text
    assert "multiply_each" in text and "auto old = s0_tile" in text
    assert_same(case, torch.randint(1, 8, (batch,)) if ragged else None, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("together", [1, 3])
def test_nests_of_a_long_phase_stand_in_functions_of_their_own(together, monkeypatch):
    monkeypatch.setattr(emit, "MANY", 2)
    monkeypatch.setattr(emit, "TOGETHER", together)
    loop = sl.Loop(sl.nn.LayerNormLSTMCell(5, 4), backend="cpu")
    for steps, batch in ((4, 3), (2, 1)):
        sl.verify(loop, torch.randn(steps, batch, 5))
    texts = [part.kernel for part in loop.plan(torch.randn(4, 3, 5)).loops]
    assert texts and all(text.count("APART") == text.count("}();") > 0 for text in texts)


def test_long_kernels_are_built_by_less_optimisation():
    assert build.level("x" * build.LONG) == build.QUICKER and build.level("x") == build.FASTEST
