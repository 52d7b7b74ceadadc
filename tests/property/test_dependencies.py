"""Whatever a step depends on in Python may change between two calls: no call may run with what it was before.

Every kind of dependency is tried alone; then steps that are put together of several, with changes in any order. The
plain loop runs the same step with the same state of everything.
"""

from __future__ import annotations

import contextlib
import random
import sys
import warnings

import pytest
import torch
from dependency_kinds import KINDS, build

import steploop as sl

T, B = 4, 3
NEAR = dict(rtol=1e-8, atol=1e-10)  # of float64: with float32, gradients that nearly cancel look like stale ones
# Changes that leave the step nothing to be refused for: all of them; a refusal would be an error of the test.


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def module_of(kinds, number=0):
    made = build(kinds, number)
    try:
        yield made
    finally:
        for name in [n for n in sys.modules if n.startswith("steploop_test_")]:
            del sys.modules[name]


def calls(loop, step, xs, gradients):
    outputs, state = loop(xs)
    if not gradients:
        return [outputs.detach(), state["h"].detach()]
    given = [p for p in step.parameters() if p.requires_grad]
    found = torch.autograd.grad(outputs.square().sum(), [xs, *given], allow_unused=True)
    return [outputs, state["h"], *(torch.zeros(()) if g is None else g for g in found)]


def agree(loop, plain, step, gradients, where):
    xs = torch.randn(T, B, 3, requires_grad=gradients)
    for i, (found, expected) in enumerate(zip(*(calls(one, step, xs, gradients) for one in (loop, plain)))):
        torch.testing.assert_close(found, expected, **NEAR, msg=lambda m: f"{where}, result {i}: {m}")


def streams_agree(stream, plain, where):
    x = torch.randn(B, 3)
    torch.testing.assert_close(stream(x), plain(x), **NEAR, msg=lambda m: f"{where}, streamed: {m}")


def try_out(kinds, order, gradients, number=0, backend="eager"):
    """Calls, with the changes of `order` between them; two calls and two streamed steps after each."""
    with module_of(kinds, number) as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop, plain = sl.Loop(made.step, backend=backend), sl.Loop(made.step, backend="reference")
        with torch.no_grad():
            streams = [one.stream(B) for one in (loop, plain)]
        for k, changed in enumerate([None, *order]):
            where = f"call {k}, after {None if changed is None else kinds[changed].name}\n{made.text}"
            if changed is not None:
                made.change(changed, k)
            for _ in range(2):
                agree(loop, plain, made.step, gradients, where)
                with torch.no_grad():
                    streams_agree(*streams, where)


@pytest.mark.parametrize("kind", KINDS, ids=[k.name for k in KINDS])
def test_every_kind(kind):
    try_out([kind], [0, 0, 0], bool(KINDS.index(kind) % 2))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS, ids=[k.name for k in KINDS])
def test_every_kind_the_other_way(kind):
    try_out([kind], [0, 0, 0], not KINDS.index(kind) % 2)


@pytest.mark.parametrize("kind", KINDS, ids=[k.name for k in KINDS])
def test_another_step_of_the_class(kind):
    """A second step of the class, changed before its first call, may find the first one's capture; then a third, equal
    to the first, and the first itself once more."""
    gradients = bool(KINDS.index(kind) % 2)
    with module_of([kind]) as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, steps = made.step, [made.Cell(), made.Cell()]
        for k, step in enumerate([first, *steps, first]):
            made.step = step
            if k == 1:
                made.change(0, 1)
            loop, plain = sl.Loop(step, backend="eager"), sl.Loop(step, backend="reference")
            agree(loop, plain, step, gradients, f"step {k}, {kind.name}\n{made.text}")


@pytest.mark.parametrize("seed", range(6))
def test_several_at_once(seed):
    try_random(seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 2100))
def test_many(seed):
    try_random(seed)


def try_random(seed):
    draw = random.Random(seed)
    kinds = draw.sample(KINDS, draw.randint(2, 4))
    order = [draw.randrange(len(kinds)) for _ in range(draw.randint(2, 5))]
    try_out(kinds, order, draw.random() < 0.5, seed, draw.choice(["eager", "eager", "eager", "auto"]))
