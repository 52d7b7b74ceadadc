"""Indices outside their axis: where torch raises, native loops raise, and rows that do not run are never looked at."""

import pytest
import torch
import torch.nn.functional as F
from cpu_loops import assert_same, make_case, run

import steploop as sl
from steploop.backends import cpu, eager
from steploop.compiler.schedule import make_schedule

pytestmark = pytest.mark.pairs

T, B, H, N = 4, 3, 4, 6
TABLE = torch.randn(N, H, generator=torch.Generator().manual_seed(0))

# (x (B, N), k (B, K) of indices into N entries) -> (B, ...)
NON_NEGATIVE = {
    "gather": lambda x, k: x.gather(1, k),
    "gather of one": lambda x, k: x.gather(1, k[:, :1]).squeeze(1),
    "gather twice": lambda x, k: x.gather(1, k) + x.exp().gather(1, k),
    "embedding": lambda x, k: F.embedding(k, TABLE),
    "embedding of one": lambda x, k: F.embedding(k[:, 0], TABLE),
    "index_select": lambda x, k: TABLE.index_select(0, k[:, 0]),
    "scatter": lambda x, k: x.scatter(1, k, x[:, : k.shape[1]]),
    "scatter a value": lambda x, k: x.scatter(1, k, 2.0),
    "scatter_add": lambda x, k: x.scatter_add(1, k, x[:, :1].expand(-1, k.shape[1])),
    "one_hot": lambda x, k: F.one_hot(k, N),
    "index of int32": lambda x, k: F.embedding(k.int(), TABLE),
}
FROM_END = {
    "x[index]": lambda x, k: TABLE[k],
    "x[index] of one": lambda x, k: TABLE[k[:, 0]],
    "x[:, index]": lambda x, k: TABLE.t()[:, k[:, 0]].t(),
}
LOOKUPS = {**NON_NEGATIVE, **FROM_END}


def case_of(lookup, k):
    """A loop of one look-up that depends on a state: k is (T, B, K)."""

    def step(xs, constants, states):
        (x, index), (h,) = xs, states
        index = index + (h[:, :1] > 1e6).to(index.dtype)
        return [lookup(x * 2, index).clone()], [h + x]

    x = torch.randn(*k.shape[:2], N, generator=torch.Generator().manual_seed(1))
    return make_case(step, [x, k], [torch.zeros(k.shape[1], N)], names=["h"])


def indices(count: int) -> torch.Tensor:
    return torch.randint(0, N, (T, B, count), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("name", LOOKUPS)
def test_indices_inside_give_what_torch_gives(name, count):
    k = indices(count)
    k[0, 0, 0], k[1, 0, -1] = 0, N - 1
    if name in FROM_END:
        k[2, 1, 0], k[3, 2, 0] = -1, -N
    assert_same(case_of(LOOKUPS[name], k))


@pytest.mark.parametrize("down", [False, True], ids=["forward", "backward in time"])
@pytest.mark.parametrize("bad", [N, -1, -N - 1, 2**40, -(2**40)])
@pytest.mark.parametrize("name", LOOKUPS)
def test_an_index_outside_is_an_error(name, bad, down):
    if name == "index of int32" and abs(bad) > 2**31:
        pytest.skip("not an int32")
    if name in FROM_END and bad == -1:
        pytest.skip("the last entry")
    k = indices(1)
    k[2, 1, 0] = bad
    case = case_of(LOOKUPS[name], k)
    schedule = make_schedule(T, B, torch.device("cpu"), None, None, None)
    for runner in (eager.Runner(case.loop), cpu.compile(case.loop)):
        with pytest.raises((IndexError, RuntimeError)):
            run(runner, case, schedule, down)


@pytest.mark.parametrize("place", [0, 7, 8, 15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("name", ["gather", "embedding", "scatter", "one_hot", "x[index]"])
def test_every_lane_is_looked_at(name, place):
    k = torch.randint(0, N, (T, B, 34))
    wide = LOOKUPS[name] if name != "scatter" else lambda x, k: x.repeat(1, 6).scatter(1, k, x.repeat(1, 6)[:, :34])
    good = case_of(wide, k)
    bad = k.clone()
    bad[3, 2, place] = 6 * N
    schedule = make_schedule(T, B, torch.device("cpu"), None, None, None)
    runner = cpu.compile(good.loop)
    run(runner, good, schedule)
    with pytest.raises(IndexError, match="out of range"):
        run(runner, case_of(wide, bad), schedule)
    run(runner, good, schedule)


@pytest.mark.parametrize("name", LOOKUPS)
def test_rows_that_do_not_run_are_not_looked_at(name):
    k = indices(2)
    lengths = torch.tensor([4, 1, 2])
    for row, length in enumerate(lengths):
        k[length:, row] = -100
    assert_same(case_of(LOOKUPS[name], k), lengths=lengths)


class Reader(sl.Step):
    """Reads its memory at a place that depends on the state."""

    def __init__(self, lookup):
        super().__init__()
        self.lookup = lookup
        self.h = sl.State(N)

    def step(self, x, k):
        h = self.h.prev
        found = self.lookup(h + x, k + (h[:, :1] > 1e6).long())
        self.h.next = torch.tanh(h + x + found.reshape(x.shape[0], -1).sum(1, keepdim=True))
        return self.h.next


@pytest.mark.parametrize("backend", ["reference", "eager", "cpu"])
@pytest.mark.parametrize("name", LOOKUPS)
def test_loops_raise(name, backend):
    x, k = torch.randn(T, B, N, requires_grad=True), indices(1)
    loop = sl.Loop(Reader(LOOKUPS[name]), backend=backend)
    loop(x, k)[0].sum().backward()
    k[2, 1, 0] = N
    with pytest.raises((IndexError, RuntimeError)):
        loop(x, k)


@pytest.mark.parametrize("name", LOOKUPS)
def test_streams_raise_and_go_on(name):
    x, k = torch.randn(T, B, N), indices(1)
    step = Reader(LOOKUPS[name])
    with torch.no_grad():
        wanted, _ = sl.Loop(step, backend="reference")(x, k)
        stream = sl.Loop(step).stream(B)
        for t in range(T):
            if t:
                with pytest.raises(IndexError, match="out of range"):
                    stream(x[t], torch.full_like(k[t], N))
            torch.testing.assert_close(stream(x[t], k[t]), wanted[t])


class _Backwards(torch.autograd.Function):
    """Looks up in its gradient alone."""

    @staticmethod
    def forward(ctx, x, k):
        ctx.save_for_backward(k)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        (k,) = ctx.saved_tensors
        return gradient + gradient.gather(1, k), None


@pytest.mark.parametrize("backend", ["reference", "eager", "cpu"])
def test_the_backward_pass_raises(backend):
    x, k = torch.randn(T, B, N, requires_grad=True), indices(N)
    loop = sl.Loop(Reader(lambda x, k: _Backwards.apply(x, k)), backend=backend)
    loop(x, k)[0].sum().backward()
    k[2, 1, 0] = N
    result = loop(x, k)[0].sum()
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        result.backward()


def test_the_message_says_where_and_what():
    x, k = torch.randn(T, B, N), indices(1)
    k[1, 0, 0] = -1
    with pytest.raises(IndexError) as caught:
        sl.Loop(Reader(NON_NEGATIVE["gather"]), backend="cpu")(x, k)
    text = str(caught.value)
    assert "index out of range in gather: the axis has size 6" in text
    assert "indices from 0 to 5" in text and "test_cpu_indices.py:" in text
    assert isinstance(caught.value, (sl.SteploopError, RuntimeError))
    k[1, 0, 0] = -N - 1
    with pytest.raises(IndexError, match="indices from -6 to 5"):
        sl.Loop(Reader(FROM_END["x[index]"]), backend="cpu")(x, k)


def test_an_axis_without_entries_has_no_right_index():
    def step(xs, constants, states):
        (index,), (memory,), (h,) = xs, constants, states
        return [h.clone()], [h + memory.gather(1, index)]

    k = torch.zeros(T, B, 1, dtype=torch.long)
    axes = [("constant", 0, 1)]
    full = make_case(step, [k], [torch.zeros(B, 1)], [torch.randn(B, 2)], axes, names=["h"])
    runner = cpu.compile(full.loop)
    schedule = make_schedule(T, B, torch.device("cpu"), None, None, None)
    run(runner, full, schedule)
    full.constants = [torch.zeros(B, 0)]
    full.sizes = {name: 0 for name in full.sizes}
    with pytest.raises(RuntimeError, match="out of bounds"):
        run(runner, full, schedule)
