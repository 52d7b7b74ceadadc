"""Steps of one class that are equal share a capture, and those that differ in anything do not."""

import gc
import weakref

import pytest
import torch
from torch import nn

import steploop as sl
from steploop.compiler import capture_store

REGISTRY: dict[int, float] = {}


class Cell(sl.Step):
    """Reads what the tests change."""

    def __init__(self, scale=2, bias=True, activation=torch.tanh):
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=bias)
        self.scale, self.activation = scale, activation
        self.h = sl.State(4)

    def step(self, x):
        self.h.next = self.activation(self.linear(self.h.prev) * self.scale + x)
        return self.h.next


class Tied(sl.Step):
    def __init__(self, tied):
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 4) * 0.3)
        self.b = self.a if tied else nn.Parameter(torch.randn(4, 4) * 0.3)
        self.h = sl.State(4)

    def step(self, x):
        self.h.next = torch.tanh(self.h.prev @ self.a + x @ self.b)
        return self.h.next


class ByIdentity(Cell):
    """Looks itself up by what only it is."""

    def step(self, x):
        self.h.next = torch.tanh(self.linear(self.h.prev) * REGISTRY[id(self)] + x)
        return self.h.next


class Growing(Cell):
    """Its gradient reads more than its values."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope
        self.extra = nn.Parameter(torch.randn(4))
        self.register_buffer("shift", torch.randn(4))

    def step(self, x):
        self.h.next = Sloped.apply(self.linear(self.h.prev) + x + self.shift, self)
        return self.h.next


class Sloped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cell):
        ctx.cell = cell
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.cell.slope, None


def run(cell, gradients=True):
    """Loops of a step at several sizes, against the plain loop; how many captures that took."""
    before, loop = capture_store.captured, sl.Loop(cell)
    for batch in (3, 1, 5):
        x = torch.randn(6, batch, 4, requires_grad=gradients)
        results = []
        for backend in ("auto", "reference"):
            with torch.set_grad_enabled(gradients):
                outputs, _ = sl.Loop(cell, backend=backend)(x) if backend != "auto" else loop(x)
            wanted = [x, *(p for p in cell.parameters() if p.requires_grad)]
            grads = torch.autograd.grad(outputs.square().sum(), wanted, allow_unused=True) if gradients else ()
            results.append([outputs, *(g for g in grads if g is not None)])
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    return capture_store.captured - before


def test_equal_steps_share_one_capture():
    cells = [Cell() for _ in range(3)]
    assert [run(c) for c in cells] == [1, 0, 0]
    with torch.no_grad():
        cells[1].linear.weight.mul_(0.5)
    assert [run(c) for c in cells] == [0, 0, 0]


def _no_gradient(cell):
    cell.linear.weight.requires_grad_(False)


def _in_float64(cell):
    cell.linear.register_forward_hook(lambda module, args, out: out * 0.5)


@pytest.mark.parametrize(
    "make, change",
    [
        (lambda: Cell(scale=3), None), (lambda: Cell(bias=False), None), (lambda: Cell(activation=torch.sin), None),
        (Cell, _no_gradient), (Cell, _in_float64), (Cell, lambda cell: setattr(cell, "scale", True)),
    ],
    ids=["number", "bias", "function", "requires_grad", "hook", "bool for a number"],
)  # fmt: skip
def test_a_step_that_differs_has_its_own(make, change):
    first, other = Cell(), make()
    run(first)
    if change is not None:
        change(other)
    assert run(other) == 1
    assert run(first) == 0


def test_one_that_is_changed_afterwards_leaves_the_other_alone():
    first, other = Cell(), Cell()
    assert (run(first), run(other)) == (1, 0)
    other.scale = 5
    assert (run(other), run(first)) == (1, 0)
    other.scale = 2
    assert (run(other), run(first)) == (0, 0)


def test_floats_that_are_inputs():
    cells = [Cell(scale=s) for s in (0.5, 0.25)]
    run(cells[0])
    cells[0].scale = 0.75
    run(cells[0])
    cells[1].scale = 1.25
    run(cells[1])
    assert [run(c) for c in cells] == [0, 0]


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_tied_weights(order):
    cells = [Tied(tied) for tied in order]
    assert [run(c) for c in cells] == [1, 1]
    assert run(Tied(order[0])) == 0


def test_steps_that_ask_which_they_are_share_nothing():
    cells = [ByIdentity(), ByIdentity()]
    REGISTRY.update({id(c): 0.5 + i for i, c in enumerate(cells)})
    assert [run(c) for c in cells] == [1, 1]
    REGISTRY.clear()


def test_a_gradient_that_reads_more():
    """The gradient is captured by the second of two that share a capture, while the first has a stream open."""
    first, other, third = Growing(0.5), Growing(0.5), Growing(0.75)
    assert [run(c, gradients=False) for c in (first, other)] == [1, 0]
    x = torch.randn(3, 4)
    with torch.no_grad():
        stream, plain = sl.Loop(first).stream(3), sl.Loop(first, backend="reference").stream(3)
        stream(x), plain(x)
        with torch.enable_grad():
            run(other)
        torch.testing.assert_close(stream(x), plain(x))
    run(first), run(third), run(other), run(first)
    assert [run(c, gradients=False) for c in (first, other)] == [0, 0]
    run(third, gradients=False)


def test_a_capture_keeps_no_step_alive():
    first, other = Cell(), Cell()
    run(first), run(other)
    gone, weight = weakref.ref(first), weakref.ref(first.linear.weight)
    del first
    gc.collect()
    assert gone() is None and weight() is None
    assert run(other) == 0


def test_layers_of_a_bidirectional_stack():
    before = capture_store.captured
    layers = [sl.nn.Bidirectional(sl.nn.GRUCell(8, 4), sl.nn.GRUCell(8, 4)) for _ in range(3)]
    x = torch.randn(5, 3, 8)
    for layer in layers:
        x, _ = layer(x)
    x.sum().backward()
    assert capture_store.captured - before == 1


def test_a_step_takes_no_more_captures_than_are_kept(monkeypatch):
    monkeypatch.setattr(capture_store, "MOST", 2)
    first, other = Cell(), Cell()
    for cell in (first, other):
        for scale in (2, 3, 4, 5):
            cell.scale = scale
            run(cell, gradients=False)
            assert len(next(iter(other._kept.get("captures", {0: []}).values()))) <= 2
