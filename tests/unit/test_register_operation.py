"""Operations of torch.library that users register leave loops, by every name that they have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import steploop as sl


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
