"""Products of sequences with weights inside native loops: made for several steps at a time, rows read in place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agree import agree, situations
from cpu_loops import assert_same, make_case, run

import steploop as sl
from steploop.backends import cpu, eager
from steploop.backends.cpu import build
from steploop.backends.cpu import runner as native
from steploop.compiler import execute
from steploop.compiler.ir.graph import op_name
from steploop.compiler.schedule import make_schedule
from steploop.compiler.span import Span, Unpacked

pytestmark = pytest.mark.pairs


@pytest.fixture(autouse=True, params=["tiles", "team"])
def sharing(request, monkeypatch):
    """Every loop with a tile of rows for each thread, and with threads that share columns."""
    if request.param == "team":
        for name, value in (("CACHE", -1), ("WAIT", -1), ("PANEL", 1)):
            monkeypatch.setattr(native, name, value)
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)


def gated(batch: int, time: int, depth: int = 10, hidden: int = 21, dtype=torch.float32):
    """Two products of one sequence, one of a part of it, and one of another sequence."""
    weights = [torch.randn(hidden, d, dtype=dtype) * 0.3 for d in (depth, depth, depth - 4, 3, hidden)]

    def step(xs, constants, states):
        (x, y), (h,) = xs, states
        gate = (F.linear(x, weights[0]) + F.linear(h, weights[4])).sigmoid()
        h = gate * h + F.linear(x, weights[1]) * F.linear(x[:, 2:-2], weights[2]).tanh() + F.linear(y, weights[3])
        return [h.clone(), gate], [h]

    xs = [torch.randn(time, batch, depth, dtype=dtype), torch.randn(time, batch, 3, dtype=dtype)]
    return make_case(step, xs, [torch.randn(batch, hidden, dtype=dtype)])


def is_early(case) -> bool:
    return len(cpu.compile(case.loop).plan.early) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 5, 23, 24, 49, 130])
def test_rows_and_steps(dtype, down, ragged, batch):
    case = gated(batch, 11, dtype=dtype)
    lengths = torch.randint(0, 12, (batch,)) if ragged else None
    assert_same(case, lengths, torch.rand(11, batch) < 0.2, down, rtol=1e-4, atol=1e-4)
    assert is_early(case)


@pytest.mark.parametrize("time", [1, 2, 47, 48, 49, 97, 150])
@pytest.mark.parametrize("batch", [1, 7])
def test_chunks(time, batch):
    assert_same(gated(batch, time), torch.randint(1, time + 1, (batch,)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["lengths", "holes", "reverse", "reverse with lengths"])
@pytest.mark.parametrize("batch", [1, 6, 60])
@pytest.mark.parametrize("down", [False, True])
def test_rows_from_where_the_caller_has_them(kind, batch, down):
    time = 13
    case = gated(batch, time)
    lengths = torch.randint(0, time + 1, (batch,)) if "lengths" in kind else None
    mask = torch.rand(time, batch) < 0.6 if kind == "holes" else None
    schedule = make_schedule(time, batch, torch.device("cpu"), lengths, mask, reverse="reverse" in kind)
    wanted = run(eager.Runner(case.loop), case, schedule, down)
    runner = cpu.compile(case.loop)
    for cut in (0, schedule.steps // 3):
        spans = [Span(schedule, 0, cut), Span(schedule, cut, schedule.steps)]
        states, parts = [schedule.sort(s) for s in case.states], []
        for span in spans[::-1] if down else spans:
            inputs = [*(Unpacked(schedule.flat(x)) for x in case.steps), *case.onces]
            states, kept = runner(inputs, states, None, span, down, case.sizes)
            parts.append(kept)
        kept = [torch.cat(p[::-1] if down else p) for p in zip(*parts)]
        for a, b in zip([*wanted[0], *wanted[1]], [*states, *kept]):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 13, 64])
def test_threads_change_no_bit(batch):
    case = gated(batch, 20, depth=70, hidden=150)
    schedule = make_schedule(20, batch, torch.device("cpu"), torch.randint(0, 21, (batch,)))
    runner = cpu.compile(case.loop)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        states, kept = run(runner, case, schedule)
        found.append([*states, *kept])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


class Parts(sl.Step):
    """Reads parts of a product and of its input; `shows`: gives one of them back, so that it is wanted outside too."""

    def __init__(self, shows: bool):
        super().__init__()
        self.w, self.shows = torch.nn.Linear(6, 8), shows
        self.h = sl.State(4)

    def step(self, x):
        a, b = self.w(x).chunk(2, -1)
        self.h.next = (self.h.prev * a + b).tanh() + x[:, 1:5]
        return (self.h.next, a) if self.shows else self.h.next


class Chained(sl.Step):
    """A product of a product, which can't be early; and one of a sequence that is read by two loops."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(6, 6) for _ in range(3))
        self.h, self.g = sl.State(6), sl.State(6)

    def step(self, x):
        both = self.c(x)
        self.h.next = (self.h.prev * self.b(self.a(x)) + both).tanh()
        self.g.next = (self.g.prev * self.h.next + both).tanh()
        return self.g.next


class Gated(sl.Step):
    """Gates and a norm that no state is needed for, of which the backward wants parts; `shown`: the caller too."""

    def __init__(self, width: int, shown: bool = False):
        super().__init__()
        self.gates, self.norm, self.shown = torch.nn.Linear(6, 2 * width), torch.nn.LayerNorm(2 * width), shown
        self.h = sl.State(width)

    def step(self, x):
        z, n = self.norm(self.gates(x)).chunk(2, -1)
        z = z.sigmoid()
        self.h.next = z * self.h.prev.sin() + (1 - z) * n.tanh()
        return (self.h.next, z) if self.shown else self.h.next


class Selective(sl.Step):
    """A state space whose coefficients depend on the input (Gu & Dao 2023): wide values from narrow ones."""

    def __init__(self, width: int = 6, order: int = 5):
        super().__init__()
        self.delta, self.both = torch.nn.Linear(width, width), torch.nn.Linear(width, 2 * order)
        self.decay = torch.nn.Parameter(-torch.rand(width, order))
        self.h = sl.State((width, order))

    def step(self, x):
        delta = F.softplus(self.delta(x))
        b, c = self.both(x).chunk(2, -1)
        kept = torch.exp(delta.unsqueeze(-1) * self.decay)
        self.h.next = kept * self.h.prev + (delta * x).unsqueeze(-1) * b.unsqueeze(1)
        return (self.h.next * c.unsqueeze(1)).sum(-1)


class Heads(sl.Step):
    """What comes of the state: wanted, read by a product, both, or beside something of the input."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.x, self.y, self.z = (torch.nn.Linear(n, width) for n in (6, width, 6))
        self.h, self.late = sl.State(width), sl.State(width)

    def step(self, x):
        self.h.next = (self.x(x) + self.h.prev).cos()
        a, b, side = self.h.next.exp(), self.h.next.sigmoid() * self.late.prev, self.z(x)
        self.late.next = b.tanh()
        return {"a": a, "product": self.y(b), "sum": (a * side).sum(-1), "side": side, "parts": a[:, 3:9], "same": a}


class Chosen(sl.Step):
    """Of wide values that the loop makes, in halves with rows of their own, only some numbers are wanted."""

    def __init__(self, inputs: int = 6, width: int = 16):
        super().__init__()
        self.x, self.h = torch.nn.Linear(inputs, 2 * width), sl.State(2 * width)

    def step(self, x):
        self.h.next = (self.x(x) + self.h.prev).cos()
        halves = self.h.next.unflatten(1, (2, -1)).flatten(0, 1)  # (2 * B, width)
        place = halves.argmin(1, keepdim=True)
        after = halves.exp().gather(1, (place + 3).clamp(max=6))
        low = (halves < -0.5).any(1)
        return {"place": place.view(-1, 2), "after": after.view(-1, 2), "low": low.view(-1, 2)}


def absorbed(monkeypatch, step, x) -> list[list[str]]:
    """The operations that were taken into each executable's loops."""
    found = []
    plain = execute.Executable.__post_init__

    def watched(self):
        plain(self)
        found.append(sorted(map(op_name, self.absorbed)))

    monkeypatch.setattr(execute.Executable, "__post_init__", watched)
    with torch.no_grad():
        sl.Loop(step)(x)
    return found


wide_vectors = pytest.mark.skipif(not build.wide_vectors(), reason="torch's products are as good on this CPU")


@wide_vectors
def test_what_is_absorbed(monkeypatch):
    x = torch.randn(5, 3, 6)
    assert absorbed(monkeypatch, Parts(shows=False), x) == [
        ["add", "getitem", "getitem", "mm", "slice", "split"],
    ]
    assert absorbed(monkeypatch, Parts(shows=True), x) == [["getitem", "slice"]]  # views may stand outside as well
    assert absorbed(monkeypatch, Chained(), x) == [["add", "mm"]]


@wide_vectors
def test_operations_that_are_absorbed(monkeypatch):
    x = torch.randn(5, 3, 6)
    (found,) = absorbed(monkeypatch, Gated(16), x)
    assert {"mm", "native_layer_norm", "split", "sigmoid", "tanh"} <= set(found)
    assert absorbed(monkeypatch, Gated(16, shown=True), x) == [found]  # the loop keeps what is wanted
    assert not {"sigmoid", "tanh", "native_layer_norm"} & set(absorbed(monkeypatch, Gated(4), x)[0])
    assert {"exp", "sum"} <= set(absorbed(monkeypatch, Selective(), x)[0])
    (found,) = absorbed(monkeypatch, Chosen(), x)
    assert {"argmin", "exp", "add", "clamp", "gather", "lt", "any"} <= set(found)  # nothing wide is kept
    assert "any" not in absorbed(monkeypatch, Chosen(width=7), x)[0]


def test_views_without_products(monkeypatch):
    monkeypatch.setattr(cpu, "wide_vectors", lambda: False)
    assert absorbed(monkeypatch, Parts(shows=False), torch.randn(5, 3, 6)) == [["getitem", "getitem", "slice", "split"]]


STEPS = {
    "parts": Parts(False), "shown": Parts(True), "chained": Chained(),
    "gated": Gated(17), "gate shown": Gated(17, True), "selective": Selective(),
    "heads": Heads(), "chosen": Chosen(),
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("how", ["plain", "lengths", "holes", "resets", "all"])
@pytest.mark.parametrize("reverse", [False, True])
def test_absorbing_changes_nothing(step, how, reverse):
    x = torch.randn(9, 7, 6).requires_grad_()
    lengths = torch.tensor([9, 0, 4, 5, 1, 9, 7])
    kinds = situations(lengths, torch.rand(9, 7) < 0.7, torch.rand(9, 7) < 0.2)
    agree(step, x, backend="cpu", loop={"reverse": reverse}, **kinds[how])


class Remembered(sl.Step):
    """What a loop gives to the caller is also the next value of a state that no loop has."""

    def __init__(self, inputs: int = 6):
        super().__init__()
        self.w, self.u = torch.nn.Linear(inputs, 4), torch.nn.Linear(4, 4)
        self.h, self.last = sl.State(4), sl.State(4, init=0.5)

    def step(self, x):
        self.h.next = (self.w(x) + self.u(self.h.prev)).tanh()
        self.last.next = self.h.next
        return self.h.next


@pytest.mark.parametrize("how", ["plain", "lengths", "holes", "resets", "all"])
@pytest.mark.parametrize("reverse", [False, True])
def test_states_that_are_outputs(how, reverse):
    kinds = situations(torch.tensor([9, 0, 4]), torch.rand(9, 3) < 0.7, torch.rand(9, 3) < 0.2)
    agree(Remembered(), torch.randn(9, 3, 6), backend="cpu", loop={"reverse": reverse}, **kinds[how])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 40])
def test_no_columns(dtype, batch):
    """A product over nothing is zero, and is written."""
    agree(Remembered(0).to(dtype), torch.randn(5, batch, 0, dtype=dtype), backend="cpu")
