"""Denormal numbers count in every thread of a native loop; torch.set_flush_denormal is the switch."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from compiled_backends import COMPILED
from torch import nn

import steploop as sl

SMALL = {torch.float32: 1e-39, torch.float64: 1e-310}  # denormal, with many digits left
LARGE = {torch.float32: 1e37, torch.float64: 1e306}
EDGES = {torch.float32: (90, 87.4), torch.float64: (715, 708.5)}  # where e^-x and 1 / (1 + e^x) are denormal
CLOSE = {torch.float32: 2e-3, torch.float64: 1e-9}


class Fading(sl.Step):
    """A state that fades among the denormal numbers, and everything by which one can tell them from zero."""

    def __init__(self, size: int, dtype: torch.dtype, mixes: bool):
        super().__init__()
        self.large = LARGE[dtype]
        self.exp, self.sigmoid = EDGES[dtype]
        self.h = sl.State(size, init=SMALL[dtype], dtype=dtype)
        self.decay = nn.Parameter(torch.linspace(0.7, 0.9, size, dtype=dtype))
        self.head = nn.Parameter(torch.rand(size, 3, dtype=dtype))
        self.mix = nn.Parameter(torch.rand(size, size, dtype=dtype) / (10 * size)) if mixes else None

    def step(self, x):
        h = self.h.prev * self.decay
        if self.mix is not None:
            h = h + h @ self.mix
        self.h.next = h
        seen = h.detach()  # where a gradient would be infinite
        return {
            "log": h.log() * 1e-5,
            "log2": torch.log2(h) * 1e-5,
            "sqrt": h.sqrt(),
            "scaled": h * self.large,
            "chosen": torch.where(h > 0, h * self.large, -1.0),
            "outside": (h @ self.head) * self.large,
            "tanh": torch.tanh(h) * self.large,
            "root": seen.rsqrt(),
            "division": (x / self.large * 0.01) / seen,
            "reciprocal": 1 / (seen * self.large),
            "sign": torch.sign(seen),
            "not zero": h != 0,
            "below": h < 1 / self.large,
            "read": (x / self.large * 0.01) * self.large,
            "exp": torch.exp(-x - self.exp) * self.large,
            "sigmoid": torch.sigmoid(-x / 4 - self.sigmoid).log(),
        }


class Fed(sl.Step):
    def __init__(self, size: int, dtype: torch.dtype, mixes: bool):
        super().__init__()
        self.h = sl.State(size, dtype=dtype)
        self.decay = nn.Parameter(torch.linspace(0.7, 0.9, size, dtype=dtype))
        self.mix = nn.Parameter(torch.rand(size, size, dtype=dtype) / (10 * size)) if mixes else None

    def step(self, x):
        h = self.h.prev * self.decay
        self.h.next = torch.tanh(x + (h if self.mix is None else h + h @ self.mix))
        return self.h.next


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def flushing():
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU can't count denormal numbers as zero")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


# (rows, features, whether there is a product in the loop): single rows, tiles, and teams (a wide product).
SHAPES = [(1, 5, False), (7, 33, True), (40, 16, False), (1, 600, True), (4, 600, True)]


@pytest.fixture(params=COMPILED)
def backend(request):
    return request.param


def by_threads(step, backend, run):
    """What `run` gives for the plain loop; and for the compiled one, with one thread and with two."""
    loop = sl.Loop(step, backend=backend)
    found = [run(sl.Loop(step, backend="reference"))]
    for count in (1, 2):
        with threads(count):
            found.append(run(loop))
    return found


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("rows, size, mixes", SHAPES)
def test_states_and_outputs(backend, dtype, rows, size, mixes):
    torch.manual_seed(1)
    step, xs = Fading(size, dtype, mixes), torch.rand(12, rows, size, dtype=dtype).add(0.5).requires_grad_()

    def run(loop):
        outputs, state = loop(xs)
        total = sum(y.sum() for y in outputs.values() if y.requires_grad) / 2**17
        gradients = torch.autograd.grad(total, [xs, *step.parameters()])
        return outputs | {"last state": state["h"] * LARGE[dtype]} | dict(enumerate(gradients))

    expected, *both = by_threads(step, backend, run)
    assert expected["not zero"].all() and (expected["scaled"] < 1).all()
    for found in both:
        for key, value in expected.items():
            if not value.is_floating_point():
                assert torch.equal(found[key], value), key
                continue
            assert value.isfinite().all(), key
            close = {"rtol": CLOSE[dtype], "atol": 0.0}
            torch.testing.assert_close(found[key], value, **close, msg=lambda text: f"{key}: {text}")


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("rows, size, mixes", SHAPES)
def test_gradients(backend, dtype, rows, size, mixes):
    """Of vanishing size, as those of a long sequence are."""
    torch.manual_seed(2)
    step, xs = Fed(size, dtype, mixes), torch.randn(12, rows, size, dtype=dtype, requires_grad=True)

    def run(loop):
        outputs, _ = loop(xs)
        cotangent = torch.full_like(outputs[-1], SMALL[dtype])
        return [g * LARGE[dtype] for g in torch.autograd.grad(outputs[-1], [xs, *step.parameters()], cotangent)]

    expected, *both = by_threads(step, backend, run)
    for found in both:
        for a, b in zip(found, expected):
            assert (b != 0).any() and (b.abs() < 1).all()
            torch.testing.assert_close(a, b, rtol=CLOSE[dtype], atol=float(b.abs().max()) * CLOSE[dtype] / 10)


def test_streams(backend):
    step, xs = Fading(33, torch.float32, True), torch.rand(12, 7, 33)
    plain, stream = (sl.Loop(step, backend=name).stream(7) for name in ("reference", backend))
    with torch.no_grad():
        for x in xs:
            for (key, expected), found in zip(plain(x).items(), stream(x).values()):
                torch.testing.assert_close(found, expected, rtol=2e-3, atol=0.0, msg=lambda text: f"{key}: {text}")


class Counts(sl.Step):
    """How many of its states are not zero."""

    def __init__(self, size: int, mixes: bool):
        super().__init__()
        self.h = sl.State(size, init=1e-39)
        self.mix = nn.Parameter(torch.eye(size)) if mixes else None

    def step(self, x):
        self.h.next = h = self.h.prev * (1 + x) if self.mix is None else self.h.prev @ self.mix + x
        return (h != 0).to(torch.int64)


@pytest.mark.parametrize("rows, size, mixes", SHAPES)
@pytest.mark.parametrize("count", [1, 2])
def test_the_callers_choice_holds_in_every_thread_and_stays(rows, size, mixes, count):
    if "cpu" not in COMPILED:
        pytest.skip("no native loops here")
    loop, xs = sl.Loop(Counts(size, mixes), backend="cpu"), torch.zeros(6, rows, size)
    denormal = torch.full((1 << 20,), 1e-39)
    with threads(count), torch.no_grad():
        stream = loop.stream(rows)
        stream(xs[0])
        for _ in range(3):
            assert loop(xs)[0].all() and stream(xs[0]).all()
            with flushing():
                assert not loop(xs)[0].any() and not stream(xs[0]).any()
                assert (denormal[:9] * 1 == 0).all()  # in this thread as before
            assert loop(xs)[0].all()
            assert (denormal * 1 != 0).all()  # in torch's threads, which worked on the loop
            stream.state = loop.stream(rows).state
