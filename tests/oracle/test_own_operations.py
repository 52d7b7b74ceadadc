"""Operations of `torch.library` in a step: unknown to the compiler, and registered with it."""

from __future__ import annotations

import pytest
import torch
from agree import agree, situations
from torch import nn

import steploop as sl


@torch.library.custom_op("test_own::squash", mutates_args=())
def squash(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x / (scale + x.abs())


@torch.library.custom_op("test_own::squash_backward", mutates_args=())
def squash_backward(grad: torch.Tensor, x: torch.Tensor, scale: float) -> torch.Tensor:
    return grad * scale / (scale + x.abs()).square()


@torch.library.custom_op("test_own::row_sum", mutates_args=())
def row_sum(x: torch.Tensor) -> torch.Tensor:
    return x.sum(1, keepdim=True)


for operation in (squash, squash_backward):
    operation.register_fake(lambda x, *rest: torch.empty_like(x))
row_sum.register_fake(lambda x: x.new_empty(x.shape[0], 1))
squash.register_autograd(
    lambda ctx, grad: (squash_backward(grad, ctx.saved_tensors[0], ctx.scale), None),
    setup_context=lambda ctx, inputs, output: (ctx.save_for_backward(inputs[0]), setattr(ctx, "scale", inputs[1])),
)
row_sum.register_autograd(
    lambda ctx, grad: grad.expand(ctx.shape),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "shape", inputs[0].shape),
)


class Cell(sl.Step):
    """Squashes what is mixed with the state, and what is not."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 4).double()
        self.h = sl.State(4)

    def step(self, x):
        given = squash(self.a(x), 2.0)
        self.h.next = squash(given + self.b(self.h.prev) * row_sum(given), 1.5)
        return self.h.next


def x(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


SITUATIONS = situations(torch.tensor([6, 1, 4]), torch.rand(6, 3) < 0.7, torch.rand(6, 3) < 0.3)


@pytest.fixture
def known():
    """Registered while a test runs."""
    from steploop.compiler.ops.table import TABLE, _found

    before = dict(TABLE)
    sl.register_operation(squash, rows="pointwise", written_as=lambda x, scale: x / (scale + x.abs()))
    sl.register_operation(
        squash_backward,
        rows="pointwise",
        linear=[(0,)],
        written_as=lambda grad, x, scale: grad * scale / (scale + x.abs()).square(),
    )
    sl.register_operation(torch.ops.test_own.row_sum, rows="front", linear=[(0,)])
    yield
    TABLE.clear()
    TABLE.update(before)
    _found.clear()


@pytest.mark.parametrize("call", SITUATIONS.values(), ids=SITUATIONS)
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_unknown(backend, call):
    agree(Cell(), x(6, 3, 3), backend=backend, **call)


@pytest.mark.parametrize("call", SITUATIONS.values(), ids=SITUATIONS)
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_known(known, backend, call):
    step = Cell()
    for _ in range(2):
        agree(step, x(6, 3, 3), backend=backend, **call)


def test_it_leaves_the_loop_and_the_loop_is_native(known):
    plan = sl.Loop(Cell()).plan(x(6, 3, 3))
    before = [op.name for op in plan.before]
    inside = [op.name for loop in plan.loops for op in loop.ops]
    assert before.count("test_own::squash") == 1 and "test_own::row_sum" in before
    assert inside.count("test_own::squash") == 1 and "test_own::row_sum" not in inside
    assert [loop.backend for loop in plan.loops] == ["cpu"]


def test_it_stays_in_the_loop_while_it_is_unknown():
    plan = sl.Loop(Cell()).plan(x(6, 3, 3))
    assert "test_own::squash" not in [op.name for op in plan.before]
    assert "no rule for the batch axis" in str(plan.text(full=True))


@pytest.mark.parametrize(
    "operation, options, words",
    [
        (torch.ops.aten.add, {"rows": "pointwise"}, "Only operations of your own"),
        (torch.tanh, {"rows": "pointwise"}, "Only operations of your own"),
        (squash, {"rows": "all"}, "`rows` says what test_own::squash does"),
        (squash, {"rows": "front", "linear": [0]}, "`linear` names the arguments"),
        (squash, {"rows": "front", "linear": [(2,)]}, "positions from 0 to 1"),
    ],
)
def test_errors(operation, options, words):
    with pytest.raises(sl.InputError, match=words):
        sl.register_operation(operation, **options)


# -- by every name that they have ----------------------------------------------------------------------------


def made(name):
    """x / (1 + |x|) as an operation of its own, with its gradient."""

    @torch.library.custom_op(f"steploop_tests::{name}", mutates_args=())
    def operation(x: torch.Tensor) -> torch.Tensor:
        return x / (1 + x.abs())

    @torch.library.custom_op(f"steploop_tests::{name}_backward", mutates_args=())
    def backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return gradient / (1 + x.abs()) ** 2

    operation.register_fake(torch.empty_like)
    backward.register_fake(lambda gradient, x: torch.empty_like(x))
    operation.register_autograd(
        lambda ctx, gradient: backward(gradient, ctx.saved_tensors[0]),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return operation, backward


class Outside(sl.Step):
    """The operation stands behind the recurrence."""

    def __init__(self, operation):
        super().__init__()
        self.operation, self.into, self.h = operation, nn.Linear(3, 4), sl.State(4)

    def step(self, x):
        self.h.next = 0.5 * self.h.prev + self.into(x)
        return self.operation(self.h.next)


def looped(step, x):
    plan = sl.Loop(step).plan(x)
    return {op.name.split("::")[-1] for way in (plan, plan.backward) for loop in way.loops for op in loop.ops}


@pytest.mark.parametrize("as_packet", [False, True])
def test_it_leaves_the_loop(as_packet):
    name = f"leaves_{as_packet}".lower()
    both, x = made(name), torch.randn(5, 3, 3)
    assert {name, f"{name}_backward"} <= looped(Outside(both[0]), x)
    packets = [getattr(torch.ops.steploop_tests, n) for n in (name, f"{name}_backward")]
    for operation in packets if as_packet else both:
        sl.register_operation(operation, rows="pointwise")
    step = Outside(both[0])
    assert not {name, f"{name}_backward"} & looped(step, x)
    for size in ((5, 3), (1, 1), (4, 1), (0, 2), (7, 2)):
        assert sl.verify(step, torch.randn(*size, 3)).ok
    assert sl.verify(step, x, lengths=torch.tensor([5, 0, 2])).ok


@pytest.mark.parametrize("what", [torch.tanh, torch.ops.aten.tanh, "mylib::tanh", None])
def test_only_ones_own(what):
    with pytest.raises(sl.InputError, match="Only operations of your own") as caught:
        sl.register_operation(what, rows="pointwise")
    assert "custom_op" in str(caught.value)


def test_wrong_words():
    operation, _ = made("words")
    with pytest.raises(sl.InputError, match="`rows` says what steploop_tests::words does"):
        sl.register_operation(operation, rows="mixed")
    with pytest.raises(sl.InputError, match="`linear` names the arguments"):
        sl.register_operation(operation, rows="pointwise", linear=[(3,)])
