"""What really runs: operations are counted under a TorchDispatchMode, for several T and against the plan."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import devices
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import steploop as sl
from steploop.compiler import capture_store, operators

B, INPUT, HIDDEN = 3, 4, 6
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class Counts(TorchDispatchMode):
    """Counts operations, those inside a Loop's one operator too."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if function.namespace == "steploop":
            inside = operators._run_backward if name.endswith("_backward") else operators._run
            with self:
                return inside(*args, **(kwargs or {}))
        self.found[name] += 1
        return function(*args, **(kwargs or {}))


def counted(function):
    with Counts() as counts:
        function()
    return counts.found


class GRU(sl.Step):
    def __init__(self, size=INPUT):
        super().__init__()
        self.h = sl.State(HIDDEN)
        self.x_gates, self.h_gates = nn.Linear(size, 3 * HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN)

    def step(self, x):
        r, z, n = self.x_gates(x).chunk(3, -1)
        hr, hz, hn = self.h_gates(self.h.prev).chunk(3, -1)
        r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
        self.h.next = (1 - z) * torch.tanh(n + r * hn) + z * self.h.prev
        return self.h.next


class Stack(sl.Step):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = GRU(), GRU(HIDDEN), nn.Linear(HIDDEN, 7)

    def step(self, x):
        return self.out(self.b(self.a(x)))


class Decoder(sl.Step):
    def __init__(self):
        super().__init__()
        self.cell, self.context = GRU(INPUT + HIDDEN), sl.State(HIDDEN)
        self.query, self.out = nn.Linear(HIDDEN, HIDDEN), nn.Linear(2 * HIDDEN, 7)

    def step(self, x, *, memory):
        h = self.cell(torch.cat([x, self.context.prev], -1))
        weights = torch.softmax(torch.einsum("bd,bsd->bs", self.query(h), memory), -1)
        self.context.next = torch.einsum("bs,bsd->bd", weights, memory)
        return self.out(torch.cat([h, self.context.next], -1))


class NothingFedBack(sl.Step):
    def __init__(self):
        super().__init__()
        self.before = sl.State(INPUT)
        self.w = nn.Linear(2 * INPUT, HIDDEN)

    def step(self, x):
        self.before.next = x
        return torch.tanh(self.w(torch.cat([x, self.before.prev], -1)))


CASES = {"gru": GRU, "stack": Stack, "decoder": Decoder, "nothing fed back": NothingFedBack}


def constants(step):
    return {"memory": torch.randn(B, 5, HIDDEN)} if isinstance(step, Decoder) else {}


@contextmanager
def one_span():
    """The count of spans grows with T where memory is short; here all of T is one."""
    from steploop.compiler import execute

    held, execute.MEMORY_PER_SPAN = execute.MEMORY_PER_SPAN, 1 << 40
    try:
        yield
    finally:
        execute.MEMORY_PER_SPAN = held


def run_counts(loop, steps, given):
    xs = torch.randn(steps, B, INPUT, requires_grad=True)
    held = {}

    def forward():
        held["y"] = loop(xs, **given)[0]

    forward(), held["y"].sum().backward()  # everything is captured and compiled before anything is counted
    cotangent = torch.ones_like(held["y"])
    return counted(forward), counted(lambda: torch.autograd.grad(held["y"], xs, cotangent, retain_graph=True))


@pytest.mark.parametrize("save", ["states", "all"])
@pytest.mark.parametrize("name", CASES)
def test_operations_outside_loops_do_not_grow_with_the_number_of_steps(name, save):
    step = CASES[name]()
    loop, given = sl.Loop(step, backend="eager", save=save), constants(step)
    with one_span():
        few, more, most = (run_counts(loop, steps, given) for steps in (10, 20, 40))
    for a, b, c in zip(few, more, most, strict=True):
        # What grows does so by the same number at every step: that is the loop, and outside it nothing grows.
        per_step = {op: (b[op] - a[op]) / 10 for op in {*a, *b, *c}}
        assert all(n == int(n) for n in per_step.values())
        assert {op: (c[op] - b[op]) / 20 for op in per_step} == per_step
        if name == "nothing fed back":
            assert not any(per_step.values())


@pytest.mark.parametrize("save", ["states", "all"])
@pytest.mark.parametrize("name", CASES)
def test_the_plan_counts_the_products_that_really_run(name, save):
    step = CASES[name]()
    loop, given, steps = sl.Loop(step, backend="eager", save=save), constants(step), 10
    xs = torch.randn(steps, B, INPUT, requires_grad=True)
    plan = loop.plan(xs, **given)
    for part, found in zip((plan, plan.backward), run_counts(loop, steps, given), strict=True):
        outside = sum(op.name in PRODUCTS for op in (*part.before, *part.after))
        inside = sum(op.name in PRODUCTS for one in part.loops for op in one.ops)
        assert sum(found[p] for p in PRODUCTS) == outside + steps * inside


def test_ten_thousand_steps_are_captured_as_ten_are():
    loop = sl.Loop(Stack(), backend="eager")

    def nodes(steps):
        plan = loop.plan(torch.randn(steps, 1, INPUT, requires_grad=True))
        parts = (plan, plan.backward)
        return [len(p.before) + len(p.after) + sum(len(one.ops) for one in p.loops) for p in parts]

    before = capture_store.captured
    assert nodes(10) == nodes(10_000)
    assert capture_store.captured == before + 1


def test_a_loop_is_one_operator_under_a_tracer():
    loop = sl.Loop(GRU(), backend="eager")
    xs = torch.randn(5, B, INPUT)

    def forward(x):
        return loop(x)[0] * 2

    def with_gradient(x):
        y = loop(x)[0]
        return y, *torch.autograd.grad(y.sum(), [x])

    for mode in ("fake", "symbolic"):
        graph = make_fx(forward, tracing_mode=mode, _allow_non_fake_inputs=True)(xs)
        assert [str(n.target) for n in graph.graph.nodes].count("steploop.loop.default") == 1
        torch.testing.assert_close(graph(xs), forward(xs))
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            graph = make_fx(forward, pre_dispatch=True)(xs)
            assert "steploop.loop.default" in [str(n.target) for n in graph.graph.nodes]
            torch.testing.assert_close(graph(xs + 1), forward(xs + 1))
    xs.requires_grad_()
    graph = make_fx(with_gradient)(xs)
    targets = [str(n.target) for n in graph.graph.nodes]
    assert targets.count("steploop.loop.default") == targets.count("steploop.loop_backward.default") == 1
    for found, expected in zip(graph(xs), with_gradient(xs), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_broken_piece_is_caught(monkeypatch):
    """The oracle must be able to fail: delays that are off by nothing, or sums that lose a step."""
    from agree import agree

    from steploop.compiler.span import Span

    step, xs = NothingFedBack().double(), torch.randn(5, B, INPUT, dtype=torch.float64, requires_grad=True)
    agree(step, xs)
    with monkeypatch.context() as patch:
        patch.setattr(Span, "delay", lambda self, values, edge, reset_to, down: values)
        with pytest.raises(AssertionError, match="off by"):
            agree(step, xs)
        with pytest.raises(sl.MismatchError):
            sl.verify(sl.Loop(step, backend="eager"), xs)
    agree(step, xs)


def test_activation_checkpointing():
    """The first call captures, the recomputation does not: checkpointing must see the same of both."""
    from torch.utils.checkpoint import checkpoint

    loop, xs = sl.Loop(GRU(), backend="eager"), torch.randn(5, B, INPUT, requires_grad=True)
    outputs = checkpoint(lambda x: loop(x)[0], xs, use_reentrant=False)
    found = torch.autograd.grad(outputs.sum(), xs)
    torch.testing.assert_close(found, torch.autograd.grad(loop(xs)[0].sum(), xs))


def test_export():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.loop = sl.Loop(GRU(), backend="eager")

        def forward(self, xs):
            return self.loop(xs)[0]

    model, xs = Model(), torch.randn(5, B, INPUT)
    exported = torch.export.export(model, (xs,), strict=False)
    assert [str(n.target) for n in exported.graph.nodes].count("steploop.loop.default") == 1
    torch.testing.assert_close(exported.module()(xs), model(xs))


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_several_gradients_at_once_are_refused(backend):
    loop, xs = sl.Loop(GRU(), backend=backend), torch.randn(5, B, INPUT, requires_grad=True)
    outputs, _ = loop(xs)
    with pytest.raises(sl.UnsupportedError, match="several gradients"):
        torch.autograd.grad(outputs, xs, torch.randn(2, *outputs.shape), is_grads_batched=True)


class Doubled(sl.Step):
    """Its output is not kept for the backward."""

    def __init__(self):
        super().__init__()
        self.w, self.h = nn.Linear(INPUT + HIDDEN, HIDDEN), sl.State(HIDDEN)

    def step(self, x):
        self.h.next = torch.tanh(self.w(torch.cat([x, self.h.prev], -1)))
        return self.h.next * 2, self.h.next + 1


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 2, 0])])
def test_outputs_may_be_changed_in_place(backend, lengths):
    step, xs, found = Doubled(), torch.randn(5, B, INPUT, requires_grad=True), []
    for loop in (sl.Loop(step, backend="reference"), sl.Loop(step, backend=backend)):
        (one, two), state = loop(xs, lengths=lengths)
        one.mul_(3), two.add_(xs.sum())
        found.append(torch.autograd.grad((one * two).sum() + state["h"].sum(), xs))
    torch.testing.assert_close(*found)


def test_second_derivatives_and_changed_weights_are_refused():
    loop, xs = sl.Loop(GRU(), backend="eager"), torch.randn(5, B, INPUT, requires_grad=True)
    (gradient,) = torch.autograd.grad(loop(xs)[0].sum(), xs, create_graph=True)
    with pytest.raises(sl.UnsupportedError, match="second derivatives"):
        gradient.sum().backward()
    outputs, _ = loop(xs)
    with torch.no_grad():
        loop.step.h_gates.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()


def test_a_loop_inside_torch_compile_runs_as_it_is():
    """dynamo leaves a Loop alone: it is compiled already."""
    devices.skip_on("cuda", "pretended", why="dynamo does not follow the mode by which a test's tensors are made there")
    loop, xs = sl.Loop(sl.nn.GRUCell(3, 4), backend="eager"), torch.randn(5, 2, 3, requires_grad=True)

    def model(x):
        return loop(x * 2)[0].sin()

    found, expected = torch.compile(model, backend="eager")(xs), model(xs)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found.sum(), xs), torch.autograd.grad(expected.sum(), xs)):
        torch.testing.assert_close(a, b)
