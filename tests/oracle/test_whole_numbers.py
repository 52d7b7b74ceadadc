"""Whole numbers in native loops at the edges of their types: as torch has them, overflow and zeros included."""

from __future__ import annotations

import operator

import pytest
import torch

import steploop as sl

SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
TYPES = (torch.uint8, *SIGNED)


def edges(dtype):
    info = torch.iinfo(dtype)
    values = {info.min, info.min + 1, 0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 100, info.max // 2, info.max - 1, info.max}
    values |= {-1, -2, -3, -7, 200, 255, 2**24 + 1, 2**53 + 1}
    return torch.tensor(sorted(v for v in values if info.min <= v <= info.max), dtype=dtype)


def every_pair(dtype):
    a = edges(dtype)
    left, right = torch.meshgrid(a, a, indexing="ij")
    return left.flatten(), right.flatten()


def same(work, a, b):
    """Each of `work`, (a, b) -> a value, is done twice over, all of them in one native loop."""
    names = list(work)

    def step(carry, x):
        # Each reads them all: what is not on one recurrence would be no part of the loop.
        zero = torch.stack([c * 0 for c in carry.values()]).sum(0).to(a.dtype)
        following = {name: (work[name](c, x) + zero).to(a.dtype) for name, c in carry.items()}
        return following, None

    carry, xs = dict.fromkeys(names, a), torch.stack([b, b])
    loops = sl.plan(step, carry, xs, backend="cpu").loops
    assert [loop.backend for loop in loops] == ["cpu"]
    for steps in (1, 2):
        found, expected = (sl.scan(step, carry, xs[:steps], backend=k)[0] for k in ("cpu", "reference"))
        for name in names:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


DIVISIONS = {
    "floor": lambda a, b: a // b,
    "remainder": lambda a, b: a % b,
    "fmod": torch.fmod,
    "trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_divisions(dtype):
    a, b = every_pair(dtype)
    fits = (b != 0) & ~((a == torch.iinfo(dtype).min) & (b == -1))  # (torch's own C++ leaves that open)
    by_constants = {
        f"{name} by {d}": lambda c, x, work=work, d=d: work(c, d)
        for name, work in DIVISIONS.items() for d in (3, 255 if dtype == torch.uint8 else 127)
    }  # fmt: skip
    same({**DIVISIONS, **by_constants}, a[fits], b[fits])


@pytest.mark.parametrize("name", DIVISIONS)
def test_divisions_by_zero(name):
    a, b = torch.tensor([5, 6]), torch.tensor([[1, 2], [2, 0], [3, 3]])

    def step(carry, x):
        return carry + 1, DIVISIONS[name](carry, x)

    with pytest.raises(RuntimeError):
        sl.scan(step, a, b, backend="reference")
    for backend in ("cpu", "eager"):
        with pytest.raises(RuntimeError, match="by zero|ZeroDivision"):
            sl.scan(step, a, b, backend=backend)
    with pytest.raises(sl.DivisionError, match="in a row that runs\n.*test_whole_numbers.py:"):
        sl.scan(lambda c, x: (DIVISIONS[name](c, x), None), a, b, backend="cpu")
    # A row that has ended, or that takes no part, is never looked at.
    found, expected = (sl.scan(step, a, b, lengths=[3, 1], backend=k) for k in ("cpu", "reference"))
    torch.testing.assert_close(found, expected)


class Divides(sl.Step):
    def __init__(self):
        super().__init__()
        self.n = sl.State(init=7, dtype=torch.int64)

    def step(self, x):
        self.n.next = self.n.prev // x + 8
        return self.n.next


def test_a_stream_that_divides_by_zero():
    loop = sl.Loop(Divides())
    stream, plain = loop.stream(2), sl.Loop(loop.step, backend="reference").stream(2)
    with torch.no_grad():
        for x in ([1, 2], [3, 4], [2, 1], [5, 6]):
            assert torch.equal(stream(torch.tensor(x)), plain(torch.tensor(x)))
        with pytest.raises(RuntimeError):
            stream(torch.tensor([1, 0]))


BINARY = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "and": operator.and_, "or": operator.or_,
    "xor": operator.xor, "left": operator.lshift, "right": operator.rshift,
    "maximum": torch.maximum, "minimum": torch.minimum,
    "more": lambda c, x: torch.where(c + 1 > c, c + 1, x),
    "less": lambda c, x: torch.where(c - 1 < c, c - 1, x),
    "carry bit": lambda c, x: torch.where(c + x < c, c, x),
    "doubled and halved": lambda c, x: torch.where(c * 2 // 2 == c, c, x),
}  # fmt: skip
UNARY = {
    "neg": lambda c, x: -c, "abs": lambda c, x: c.abs(), "cube": lambda c, x: c * c * c, "not": lambda c, x: ~c,
    **{name: lambda c, x, name=name: getattr(torch, name)(c) for name in ("floor", "ceil", "round", "trunc", "sign")},
}  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_everything_at_the_edges(dtype):
    shifts = [n for n in (0, 1, 7, 8, 15, 31, 32, 63, 64, 70) if n <= torch.iinfo(dtype).max]
    by_constants = {f"left by {n}": lambda c, x, n=n: c << n for n in shifts}
    by_constants |= {f"right by {n}": lambda c, x, n=n: c >> n for n in shifts}
    unary = {n: w for n, w in UNARY.items() if n != "neg" or dtype.is_signed}
    same({**BINARY, **unary, **by_constants}, *every_pair(dtype))


@pytest.mark.parametrize("name", ["add", "mul", "maximum", "minimum", "logical_xor"])
@pytest.mark.parametrize("lengths", [None, [1, 3]])
def test_bools(name, lengths):
    work = getattr(torch, name)
    xs = torch.tensor([[True, False], [False, False], [False, True]])
    found, expected = (
        sl.scan(lambda c, x: (work(c, x), c), torch.zeros(2, dtype=torch.bool), xs, lengths=lengths, backend=b)
        for b in ("auto", "reference")
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_in_16_bits_are_rounded_at_each_step(dtype):
    xs = torch.full((1000, 2), 1.0, dtype=dtype)
    for lengths in (None, [1000, 300]):
        found, expected = (
            sl.scan(lambda c, x: (c + x, None), torch.zeros(2, dtype=dtype), xs, lengths=lengths, backend=b)[0]
            for b in ("auto", "reference")
        )
        assert torch.equal(found, expected), (found, expected)


def test_gradients_at_nan():
    xs = torch.tensor([[float("nan"), 3.0, -1.0, 7.0] * 9]).requires_grad_()
    found = []
    for backend in ("cpu", "reference"):
        xs.grad = None
        step = lambda c, x: (torch.nn.functional.relu6(x + 0 * c), None)  # noqa: E731
        sl.scan(step, torch.zeros(36), xs, backend=backend)[0].nansum().backward()
        found.append(xs.grad.clone())
    torch.testing.assert_close(found[0], found[1], equal_nan=True)
