"""Stream: the same as the Loop, one step at a time."""

import pytest
import torch
from torch import nn

import steploop as sl


class Cell(sl.Step):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 3)
        self.h = sl.State(3)

    def step(self, x, *, bias=0.0):
        self.h.next = torch.tanh(self.a(torch.cat([x, self.h.prev], -1))) + bias
        return {"h": self.h.next}


def test_a_stream_gives_what_the_loop_gives():
    loop = sl.Loop(Cell(), backend="reference")
    xs, mask, resets = torch.randn(6, 4, 2), torch.rand(6, 4) < 0.6, torch.rand(6, 4) < 0.3
    bias = torch.randn(4, 3)
    for on_masked in ("zero", "repeat"):
        wanted, final = loop(xs, mask=mask, resets=resets, bias=bias, on_masked=on_masked)
        stream = loop.stream(4, bias=bias, on_masked=on_masked)
        ys = [stream(x, mask=m, resets=r)["h"] for x, m, r in zip(xs, mask, resets, strict=True)]
        torch.testing.assert_close(torch.stack(ys), wanted["h"])
        torch.testing.assert_close(stream.state["h"], final["h"])


def test_the_state_can_be_read_and_set():
    loop = sl.Loop(Cell(), backend="reference")
    stream = loop.stream(2, state={"h": torch.ones(2, 3)})
    assert torch.equal(stream.state["h"], torch.ones(2, 3))
    x = torch.randn(2, 2)
    first = stream(x)
    stream.state = {"h": torch.ones(2, 3)}
    torch.testing.assert_close(stream(x), first)
    stream.state = stream.state.reset_([1])
    assert (stream.state["h"][1] == 0).all() and (stream.state["h"][0] != 0).any()


def test_a_stream_runs_under_the_callers_grad_mode():
    stream = sl.Loop(Cell(), backend="reference").stream(2)
    assert stream(torch.randn(2, 2))["h"].requires_grad
    stream.state = stream.state.detach()
    with torch.no_grad():
        assert not stream(torch.randn(2, 2))["h"].requires_grad


def test_without_parameters_the_first_input_tells_the_dtype():
    class Sum(sl.Step):
        def __init__(self):
            super().__init__()
            self.h = sl.State(2)

        def step(self, x):
            self.h.next = self.h.prev + x
            return self.h.next

    stream = sl.Loop(Sum(), backend="reference").stream(1)
    assert stream(torch.ones(1, 2, dtype=torch.float64)).dtype == torch.float64


def test_two_streams_of_one_module_are_independent():
    loop = sl.Loop(Cell(), backend="reference")
    a, b = loop.stream(1), loop.stream(1)
    a(torch.randn(1, 2))
    assert (b.state["h"] == 0).all() and (a.state["h"] != 0).any()


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_the_short_way_of_a_stream_sees_every_change(backend):
    """Without gradients a stream keeps a prepared step; nothing it depends on may grow stale."""

    class Scaled(sl.Step):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)
            self.scale = 2.0
            self.h = sl.State(3)

        def step(self, x):
            h = torch.tanh(self.linear(x) * self.scale + self.h.prev)
            self.h.next = h
            return h, x.sum(1)

    step = Scaled()
    stream, plain = (sl.Loop(step, backend=b).stream(2) for b in (backend, "reference"))

    def agree(*args, **kwargs):
        for a, b in zip(stream(*args, **kwargs), plain(*args, **kwargs)):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(dict(stream.state), dict(plain.state))

    with torch.no_grad():
        x = torch.randn(4, 2, 3)
        for _ in range(3):
            agree(x[0])
        step.linear.weight.mul_(0.5)
        agree(x[1])
        step.linear.bias = torch.nn.Parameter(torch.ones(3))
        agree(x[1])
        step.scale = 0.3
        agree(x[2])
        agree(x[2], mask=torch.tensor([True, False]), resets=torch.tensor([True, False]))
        agree(x[3].t().contiguous().t())
        stream.state = plain.state = {"h": torch.ones(2, 3)}
        agree(x[0])
    agree(x[1])
    with torch.no_grad():
        stream.state, plain.state = stream.state.detach(), plain.state.detach()
        for _ in range(3):
            agree(x[1])


@pytest.mark.filterwarnings("ignore:steploop runs loops without native code")
@pytest.mark.parametrize("how", ["no compiler", "a compiler that fails"])
def test_streams_where_nothing_can_be_compiled(how, monkeypatch, tmp_path):
    fails = tmp_path / "c++"
    fails.write_text('#!/bin/sh\ntest "$1" = --version && echo "one 1.0" || exit 1\n')
    fails.chmod(0o755)
    monkeypatch.setenv("STEPLOOP_CXX", str(fails) if how == "a compiler that fails" else "no-compiler-for-streams")
    monkeypatch.setenv("STEPLOOP_CACHE", str(tmp_path / "cache"))
    step, xs = sl.nn.GRUCell(3, 5), torch.randn(4, 2, 3)
    with torch.no_grad():
        expected, _ = sl.Loop(step, backend="reference")(xs)
        stream = sl.Loop(step).stream(2)
        for x, y in zip(xs, expected, strict=True):
            torch.testing.assert_close(stream(x), y)
