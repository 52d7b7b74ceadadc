"""Hooks that come after the first call, objects as arguments, patched library functions: the next call sees them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import steploop as sl

BACKENDS = ("eager", "reference")


class Cell(sl.Step):
    def __init__(self):
        super().__init__()
        self.h, self.inner = sl.State(3), nn.Linear(3, 3)

    def step(self, x):
        self.h.next = torch.tanh(F.relu(self.inner(x + self.h.prev)))
        return self.h.next


def everything(step, xs, backend, **constants):
    xs = xs.detach().requires_grad_()
    out, _ = sl.Loop(step, backend=backend)(xs, **constants)
    parameters = list(step.parameters())
    return [out, *torch.autograd.grad(out.square().sum(), [xs, *parameters], allow_unused=True)]


def same(step, xs, **constants):
    found, expected = (everything(step, xs, b, **constants) for b in BACKENDS)
    torch.testing.assert_close(found, expected)
    return expected


def differs(a, b):
    return any(x is not None and not torch.allclose(x, y) for x, y in zip(a, b, strict=True))


def _scaled(by):
    return lambda module, *given: tuple(None if g is None else g * by for g in given[0])


HOOKS = {
    "forward pre": lambda m: m.register_forward_pre_hook(lambda _, given: (given[0] * 2,)),
    "forward": lambda m: m.register_forward_hook(lambda _, given, out: out * 2),
    "full backward": lambda m: m.register_full_backward_hook(_scaled(3.0)),
    "full backward pre": lambda m: m.register_full_backward_pre_hook(_scaled(3.0)),
    "global forward pre": lambda _: nn.modules.module.register_module_forward_pre_hook(
        lambda m, given: (given[0] * 2,) if isinstance(m, nn.Linear) else None
    ),
    "global forward": lambda _: nn.modules.module.register_module_forward_hook(
        lambda m, given, out: out * 2 if isinstance(m, nn.Linear) else None
    ),
    "global full backward": lambda _: nn.modules.module.register_module_full_backward_hook(
        lambda m, given, out: _scaled(3.0)(m, given) if isinstance(m, nn.Linear) else None
    ),
    "global full backward pre": lambda _: nn.modules.module.register_module_full_backward_pre_hook(
        lambda m, out: _scaled(3.0)(m, out) if isinstance(m, nn.Linear) else None
    ),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_that_comes_later_and_goes(kind):
    """A compiled loop does what the plain one does with it, or says that it can't: never what was before."""
    torch.manual_seed(0)
    step, xs = Cell(), torch.randn(4, 2, 3)
    before = same(step, xs)
    handle = HOOKS[kind](step.inner)
    try:
        expected = everything(step, xs, "reference")
        assert differs(before, expected)
        try:
            found = everything(step, xs, "eager")
        except sl.SteploopError as error:
            assert "hook" in str(error)
        else:
            torch.testing.assert_close(found, expected)
    finally:
        handle.remove()
    assert not differs(before, same(step, xs))


def test_library_functions_that_are_patched(monkeypatch):
    step, xs = Cell(), torch.randn(4, 2, 3)
    before = same(step, xs)
    with monkeypatch.context() as patch:
        patch.setattr(F, "relu", lambda x, inplace=False: x * 0.5)
        assert differs(before, same(step, xs))
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight)
        assert differs(before[:1], same(step, xs)[:1])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tanh", torch.sin)
        assert differs(before, same(step, xs))
    assert not differs(before, same(step, xs))


@dataclasses.dataclass
class Config:
    scale: float = 1.0


class Takes(sl.Step):
    def __init__(self):
        super().__init__()
        self.h = sl.State(3)

    def step(self, x, *, it):
        self.h.next = torch.tanh(worth(it, x) + self.h.prev)
        return self.h.next


def worth(it, x):
    if isinstance(it, (set, frozenset)):
        return x * len(it)
    return it(x) if callable(it) else x * it.scale


def _half(x):
    return x * 0.5


def _third(x):
    return x / 3


def arguments():
    """(kind, objects given one after the other; a function changes the one before in place)."""
    config, linear, members = Config(), nn.Linear(3, 3), {1}

    def replaced():
        linear.weight = nn.Parameter(torch.randn(3, 3))

    return {
        "config": [config, lambda: setattr(config, "scale", 3.0), Config(5.0)],
        "function": [_half, _third, lambda x: x * 4],
        "set": [members, lambda: members.add(2), {1, 2, 3}],
        "module": [linear, replaced, nn.Linear(3, 3)],
    }


def _is_change(it):
    return callable(it) and getattr(it, "__code__", None) is not None and it.__code__.co_argcount == 0


@pytest.mark.parametrize("kind", ["config", "function", "set", "module"])
def test_objects_as_constants_and_in_a_carry(kind):
    """Each is right, or refused in words; and a change of the object is seen."""
    torch.manual_seed(0)
    step, xs, current, outcomes = Takes(), torch.randn(4, 2, 3), None, []
    for it in arguments()[kind]:
        if _is_change(it):
            it()
        else:
            current = it

        def scanned(backend, it=current):
            return sl.scan(lambda c, x: (({"h": torch.tanh(worth(c["it"], x) + c["h"]), "it": c["it"]}), c["h"]),
                           {"h": torch.zeros(2, 3), "it": it}, xs, backend=backend)[0]["h"]  # fmt: skip

        for run in (lambda b, it=current: sl.Loop(step, backend=b)(xs, it=it)[0], scanned):
            try:
                found = run("eager")
            except (sl.SteploopError, TypeError) as error:
                assert str(error)
                outcomes.append("refused")
                continue
            torch.testing.assert_close(found, run("reference"))
            outcomes.append("right")
            parameters = list(current.parameters()) if isinstance(current, nn.Module) else []
            if parameters:
                pairs = [torch.autograd.grad(run(b).sum(), parameters) for b in BACKENDS]
                torch.testing.assert_close(*pairs)
    assert outcomes
