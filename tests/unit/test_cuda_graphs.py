"""The loop that is launched as CUDA graphs, with a recorder that runs again instead: what is copied in and out, which
steps are recorded, and that nothing of an earlier call is left in a later one. (GPUs run it in the oracle tests.)"""

from __future__ import annotations

import pytest
import torch
from agree import agree, agree_scan
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import steploop as sl
from steploop.backends import choose, cuda_graphs, eager
from steploop.compiler import recording, stream_step


class Again:
    """Records nothing: "launching" runs the function once more, on the inputs that stand where they stood."""

    made = 0

    def possible(self):
        return True

    def record(self, function):
        Again.made += 1
        function()
        return function

    def place(self):
        return None

    def finish(self):
        pass


@pytest.fixture
def runners(monkeypatch):
    """Every eager loop is recorded; gives the list of their runners."""
    made = []

    class Graphs(eager.Eager):
        def compile(self, loop):
            made.append(cuda_graphs.Runner(loop, Again()))
            return made[-1]

    choose.backend_of("eager")
    monkeypatch.setitem(choose._made, "eager", Graphs())
    Again.made = 0
    return made


class Cell(sl.Step):
    def __init__(self, size=5):
        super().__init__()
        self.h, self.n = sl.State(size), sl.State(dtype=torch.int64, init=0)
        self.w, self.u = nn.Linear(3, size).double(), nn.Linear(size, size).double()

    def step(self, x, *, bias=None):
        self.n.next = self.n.prev + 1
        h = torch.tanh(self.w(x) + self.u(self.h.prev))
        self.h.next = h if bias is None else h + bias
        return self.h.next, self.h.prev


def sequence(steps=25, batch=4):
    return torch.randn(steps, batch, 3, dtype=torch.float64, requires_grad=True)


CALLS = {
    "plain": {},
    "lengths": {"lengths": torch.tensor([25, 25, 25, 9])},
    "holes": {"mask": torch.rand(25, 4, generator=torch.Generator().manual_seed(0)) < 0.9},
    "resets": {"resets": torch.rand(25, 4, generator=torch.Generator().manual_seed(1)) < 0.05},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("reverse", [False, True])
def test_every_call_gives_what_the_plain_loop_gives(runners, call, reverse):
    step = Cell()
    for _ in range(3):  # eager, recorded, launched again
        bias = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        state = {"h": torch.randn(4, 5, dtype=torch.float64, requires_grad=True), "n": torch.arange(4)}
        agree(step, sequence(), loop={"reverse": reverse}, state=sl.States(state), bias=bias, save="all", **CALLS[call])
    assert Again.made > 0 and not any(r.failed for r in runners)


def test_sizes_one_after_the_other(runners):
    step = Cell()
    loop, plain = sl.Loop(step, backend="eager"), sl.Loop(step, backend="reference")
    for steps, batch in [(64, 2), (64, 2), (70, 2), (16, 1), (16, 1), (64, 2), (3, 2), (0, 2), (20, 0), (70, 2)]:
        with torch.no_grad():
            x = sequence(steps, batch)
            for a, b in zip(loop(x)[0], plain(x)[0], strict=True):
                torch.testing.assert_close(a, b)


def test_results_of_earlier_calls_and_weights_of_later_ones(runners):
    step = Cell()
    loop, plain = sl.Loop(step, backend="eager"), sl.Loop(step, backend="reference")
    xs, found, expected = [sequence() for _ in range(4)], [], []
    with torch.no_grad():
        for x in xs:
            found.append(loop(x))
            expected.append(plain(x))
            step.u.weight.mul_(0.9)
            step.w.weight = nn.Parameter(step.w.weight * 1.1)
    for (ys, state), (ys_, state_) in zip(found, expected, strict=True):
        for a, b in zip((*ys, *state.values()), (*ys_, *state_.values()), strict=True):
            torch.testing.assert_close(a, b)


def test_inference_mode_and_others_by_turns(runners):
    step, x = Cell(), sequence()
    expected = sl.Loop(step, backend="reference")(x)[0][0]
    loop = sl.Loop(step, backend="eager")
    for mode in (torch.inference_mode, torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            torch.testing.assert_close(loop(x)[0][0], expected)


def test_streams():
    step = Cell()
    x, plain = sequence(12), sl.Loop(step, backend="reference")
    with torch.no_grad():
        stream = sl.Loop(step, backend="eager").stream(4)
        for steps in (x[:6], x[6:]):
            expected, _ = plain(steps, state=stream.state)
            states, found = [], []
            for t, one in enumerate(steps):
                found.append(stream(one))
                states.append(stream.state["h"])
                if stream._fast is not None and isinstance(stream._fast._run, stream_step._Straight):
                    stream._fast._run = stream_step._Recorded(stream._fast, stream._fast._run, Again())
                elif t == 4:  # where the weights are is found out anew
                    step.u.weight.data = step.u.weight.data.clone()
            torch.testing.assert_close(torch.stack([y for y, _ in found]), expected[0])
            torch.testing.assert_close(torch.stack([y for _, y in found]), expected[1])
            torch.testing.assert_close(torch.stack(states), expected[0])
        assert stream._fast._run.left < stream_step._Recorded.MOST


def test_only_so_many_are_kept(runners, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "KEPT", 2)
    step = Cell()
    loop, plain = sl.Loop(step, backend="eager"), sl.Loop(step, backend="reference")
    with torch.no_grad():
        for batch in (1, 2, 3, 1, 2, 3, 1, 2, 3):
            x = sequence(16, batch)
            torch.testing.assert_close(loop(x)[0][0], plain(x)[0][0])
    assert Again.made >= 3 and all(len(r.recordings) <= 2 for r in runners)


def test_what_can_not_be_recorded_runs(runners, monkeypatch):
    def record(self, function):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Again, "record", record)
    step = Cell()
    for _ in range(3):
        agree(step, sequence(), save="all")
    assert any("not permitted" in r.failed for r in runners)


def test_scans(runners):
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        init = (torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.int64))
        agree_scan(lambda c, x: ((torch.tanh(c[0] @ w + x), c[1] + 1), (c[0], x)), init, sequence(16))
    assert Again.made > 0


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda h, x: torch.where(h > 0, h, x).masked_fill(h > 1, 0.5)[:, [0, 2]], ""),
        (lambda h, x: h + torch.rand_like(h), "random"),
        (lambda h, x: torch.linalg.solve_ex(h, x)[0], "wait"),
        (lambda h, x: h + x[h > 0.5].sum(), "mask"),
        (lambda h, x: h + x.nonzero().sum(), "wait"),
        (lambda h, x: torch.ops.steploop.loop([h, x], 0, 1, 1)[0], "on the CPU"),
    ],
)
def test_what_waits_for_the_device_is_not_recorded(function, reason, monkeypatch):
    monkeypatch.setattr(recording, "_on_cpu", lambda value: False)
    graph = torch.fx.symbolic_trace(function).graph if reason == "on the CPU" else None
    if graph is None:
        graph = make_fx(function)(torch.eye(3), torch.ones(3, 3)).graph
    found = recording.reasons_against([n for n in graph.nodes if n.op == "call_function"])
    assert bool(reason) == bool(found) and any(reason in text for text, _ in found or [("", "")]), found


def test_a_tensor_of_the_cpu_is_not_recorded():
    graph = make_fx(lambda h: h + 1)(torch.ones(3)).graph
    (found,) = recording.reasons_against([n for n in graph.nodes if n.op == "call_function"])
    assert "on the CPU" in found[0]
