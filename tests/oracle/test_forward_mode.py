"""Tangents of forward-mode differentiation are never dropped: a compiled loop has those of the plain one, or refuses.

Each case gives, for a backend, a function of a dual tensor; the plain loop says what its tangent is.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from compiled_backends import COMPILED
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, jacfwd, jvp, linearize, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import steploop as sl

pytestmark = pytest.mark.pairs

T, B, I, H = 4, 2, 3, 3
GLOBAL = torch.ones(H)


class Cell(sl.Step):
    """Reads tensors in every place where a step can hold one."""

    factor = 1

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(I + H, H)
        self.h = sl.State(H, init="learned")
        self.plain = torch.ones(H)
        self.register_buffer("buffer", torch.ones(H))
        self.holds = SimpleNamespace(scale=torch.ones(H), more=[{"shift": torch.ones(H)}])
        self.inner = sl.Loop(Inner())

    def step(self, x, *, memory=None):
        y = self.mix(torch.cat([x, self.h.prev], -1)) * self.plain * self.buffer * GLOBAL
        y = y * self.holds.scale + self.holds.more[0]["shift"]
        y = y + self.inner(x.unsqueeze(0))[0][0]
        if memory is not None:
            y = y + memory
        self.h.next = torch.tanh(y)
        return self.h.next * self.factor


class Inner(sl.Step):
    def __init__(self):
        super().__init__()
        self.s, self.factor = sl.State(H), torch.full((H,), 0.5)

    def step(self, x):
        self.s.next = self.s.prev * self.factor + x
        return self.s.next


def dual(like):
    return forward_ad.make_dual(like.detach().clone(), torch.ones_like(like))


def put(where, name):
    """A case: the tensor at `where(cell)[name]`, replaced by a dual one."""

    def run(cell, loop, xs):
        holder = where(cell)
        before = holder[name]
        holder[name] = dual(before)
        try:
            return loop(xs)[0]
        finally:
            holder[name] = before

    return run


GIVEN = {
    "a sequence": lambda cell, loop, xs: loop(dual(xs))[0],
    "ragged": lambda cell, loop, xs: loop(dual(xs), lengths=[T, 1], resets=torch.ones(T, B) > 0)[0],
    "a constant": lambda cell, loop, xs: loop(xs, memory=dual(torch.ones(B, H)))[0],
    "a state": lambda cell, loop, xs: loop(xs, state={"h": dual(torch.ones(B, H))})[0],
    "a weight": put(lambda c: c.mix._parameters, "weight"),
    "a learned initial state": put(lambda c: c.h._parameters, "init"),
    "a buffer": put(lambda c: c._buffers, "buffer"),
    "an attribute": put(lambda c: c.__dict__, "plain"),
    "in an object": put(lambda c: c.holds.__dict__, "scale"),
    "in a list of dicts": put(lambda c: c.holds.more[0], "shift"),
    "a global": put(lambda c: globals(), "GLOBAL"),
    "of an inner loop": put(lambda c: c.inner.step.__dict__, "factor"),
    "the functional form": lambda cell, loop, xs: functional_call(
        loop, {"step.mix.weight": dual(cell.mix.weight)}, (xs,)
    )[0],
    "a scan's closure": lambda cell, loop, xs: scanned(dual(torch.eye(H)), torch.ones(B, H), xs, loop.backend),
    "a scan's carry": lambda cell, loop, xs: scanned(torch.eye(H), dual(torch.ones(B, H)), xs, loop.backend),
    "a scan's sequence": lambda cell, loop, xs: scanned(torch.eye(H), torch.ones(B, H), dual(xs), loop.backend),
    "a memory's input": lambda cell, loop, xs: sl.Loop(sl.memory.CumSum(), backend=loop.backend)(dual(xs))[0],
}


def scanned(weight, init, xs, backend):
    def step(c, x):
        c = torch.tanh(c @ weight + x)
        return c, c

    return sl.scan(step, init, xs, backend=backend)[1]


def right_or_refused(case, cell, backend, xs):
    """A compiled loop's tangent is the plain loop's, or the call is refused with a way out."""
    cell.inner.backend = "reference"
    expected = forward_ad.unpack_dual(case(cell, sl.Loop(cell, backend="reference"), xs)).tangent
    cell.inner.backend = "auto"
    assert expected is not None
    try:
        found = case(cell, sl.Loop(cell, backend=backend), xs)
    except sl.UnsupportedError as error:
        assert 'backend="reference"' in str(error)
    else:
        torch.testing.assert_close(forward_ad.unpack_dual(found).tangent, expected)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_tangent_is_never_dropped(backend, name, gradients):
    """At the first call, and after calls without one; afterwards plain calls go on as before."""
    torch.manual_seed(0)
    cell, xs, case = Cell(), torch.randn(T, B, I), GIVEN[name]
    loop = sl.Loop(cell, backend=backend)
    with torch.set_grad_enabled(gradients), forward_ad.dual_level():
        right_or_refused(case, cell, backend, xs)
    with torch.set_grad_enabled(gradients):
        before = loop(xs)[0]
        with forward_ad.dual_level():
            assert torch.equal(loop(xs)[0], before)
            right_or_refused(case, cell, backend, xs)
        assert torch.equal(loop(xs)[0], before)
    torch.testing.assert_close(before, sl.Loop(cell, backend="reference")(xs)[0])


def test_what_a_step_does_not_read_may_be_dual():
    cell, xs = Cell(), torch.randn(T, B, I)
    cell.unread = nn.Linear(2, 2)
    expected = sl.Loop(cell, backend="eager")(xs)[0]
    with forward_ad.dual_level():
        del cell.unread._parameters["weight"]
        cell.unread.weight = dual(torch.ones(2, 2))
        assert torch.equal(sl.Loop(cell, backend="eager")(xs)[0], expected)


def test_tangents_are_nothing_where_forward_mode_is_off():
    cell, xs = Cell(), torch.randn(T, B, I)
    loop = sl.Loop(cell, backend="eager")
    with torch.no_grad():
        expected = loop(xs)[0]
        with forward_ad.dual_level():
            x = dual(xs)
            with torch.inference_mode():
                assert torch.equal(loop(x)[0], expected)
                cell.factor = 2  # captured again: the loop inside has been captured outside of inference mode
                assert torch.equal(loop(x)[0], 2 * expected)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("warm", [0, 1, 3])
def test_streams(backend, warm):
    torch.manual_seed(0)
    cell, x = Cell(), torch.randn(B, I)

    def stream(backend=backend, **constants):
        cell.inner.backend = "reference" if backend == "reference" else "auto"
        made = sl.Loop(cell, backend=backend).stream(B, **constants)
        for _ in range(warm):
            made(x)
        return made

    def of_state(made):
        made.state = {"h": dual(torch.ones(B, H))}
        return made(x)

    def of_attribute(made):
        cell.plain = dual(torch.ones(H))
        try:
            return made(x)
        finally:
            cell.plain = torch.ones(H)

    with torch.no_grad():
        for use in (lambda made: made(dual(x)), of_state, of_attribute):
            plain, made = stream("reference"), stream()
            with forward_ad.dual_level():
                cell.inner.backend = "reference"
                assert forward_ad.unpack_dual(use(plain)).tangent is not None
                cell.inner.backend = "auto"
                with pytest.raises(sl.UnsupportedError, match="dual"):
                    use(made)
        made, twin = stream(), stream("reference")
        with forward_ad.dual_level():
            torch.testing.assert_close(made(x), twin(x))
        torch.testing.assert_close(made(x), twin(x))


@pytest.mark.parametrize("backend", COMPILED)
def test_dual_cotangents(backend):
    """A tangent may come in from behind: gradients with a dual grad_outputs."""
    cell, xs = Cell(), torch.randn(T, B, I, requires_grad=True)
    outputs = sl.Loop(cell, backend=backend)(xs)[0]
    with forward_ad.dual_level(), pytest.raises(sl.UnsupportedError, match="cotangent"):
        torch.autograd.grad(outputs, xs, dual(torch.ones_like(outputs)))


TRANSFORMS = {
    "jvp": lambda f, xs: jvp(f, (xs,), (xs,)),
    "jvp of jvp": lambda f, xs: jvp(lambda x: jvp(f, (x,), (x,))[1], (xs,), (xs,)),
    "linearize": linearize,
    "jacfwd": lambda f, xs: jacfwd(f)(xs),
    "vmap": lambda f, xs: vmap(f)(torch.stack([xs, xs])),
    "functional jvp": lambda f, xs: torch.autograd.functional.jvp(f, (xs,), (xs,)),
    "functional jacobian": lambda f, xs: torch.autograd.functional.jacobian(
        f, xs, strategy="forward-mode", vectorize=True
    ),
}


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("gradients", [False, True])
def test_transforms_are_refused(backend, name, gradients):
    """Of a loop, of a stream that has run before, and of a loop that was traced before."""
    cell, xs = Cell(), torch.randn(T, B, I)
    loop = sl.Loop(cell, backend=backend)
    with torch.set_grad_enabled(gradients):
        traced = make_fx(lambda x: loop(x)[0])(xs)
        stream = loop.stream(B)
        stream(xs[0]), stream(xs[0])
        for function, given in ((lambda x: loop(x)[0], xs), (traced, xs), (stream, xs[0])):
            with pytest.raises(sl.UnsupportedError):
                TRANSFORMS[name](function, given)
            stream.state = stream.state.detach()


@pytest.mark.parametrize("gradients", [False, True])
def test_a_traced_loop_refuses_dual_tensors(gradients):
    cell, xs = Cell(), torch.randn(T, B, I)
    loop = sl.Loop(cell, backend="eager")
    with torch.set_grad_enabled(gradients):
        traced = make_fx(lambda x: loop(x)[0])(xs)
        with forward_ad.dual_level(), pytest.raises(sl.UnsupportedError, match="dual"):
            traced(dual(xs))
