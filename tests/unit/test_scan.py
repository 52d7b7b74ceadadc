"""scan against loops written by hand."""

from collections import namedtuple

import pytest
import torch

import steploop as sl
from steploop.backends import choose

Pair = namedtuple("Pair", "left right")


def scan(*arguments, **options):
    return sl.scan(*arguments, backend="reference", **options)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_recurrence(reverse):
    w = torch.randn(3, 3, requires_grad=True)
    xs, init = torch.randn(5, 2, 3), torch.randn(2, 3)
    carry, ys = scan(lambda c, x: (torch.tanh(c @ w + x), c), init, xs, reverse=reverse)
    c, wanted = init, [None] * 5
    for t in reversed(range(5)) if reverse else range(5):
        wanted[t] = c
        c = torch.tanh(c @ w + xs[t])
    torch.testing.assert_close(carry, c)
    torch.testing.assert_close(ys, torch.stack(wanted))
    (a,) = torch.autograd.grad(carry.sum(), w)
    (b,) = torch.autograd.grad(c.sum(), w)
    torch.testing.assert_close(a, b)


def test_pytrees_none_and_numbers_pass_through():
    def fn(carry, x):
        left, (n, right, none) = carry
        assert n == 2 and none is None
        return Pair(left + x["a"], [n, right * n, None]), {"y": (left, None, 7)}

    init = Pair(torch.zeros(3), [2, torch.ones(()), None])
    carry, ys = scan(fn, init, {"a": torch.ones(4, 3), "k": "fixed"})
    assert isinstance(carry, Pair) and carry.right[0] == 2 and carry.right[2] is None
    assert carry.right[1] == 16 and ys["y"][0].shape == (4, 3) and ys["y"][1:] == (None, 7)


def test_the_order_of_dict_keys_does_not_matter():
    carry, _ = scan(
        lambda c, x: ({"b": c["b"] + 1, "a": c["a"] + 2}, None),
        {"a": torch.zeros(()), "b": torch.zeros(())},
        None,
        length=3,
    )
    assert carry["a"] == 6 and carry["b"] == 3


def test_without_sequences():
    seen = []

    def fn(c, x):
        seen.append(x)
        return c * 2, c

    carry, ys = scan(fn, torch.ones(()), None, length=4)
    assert carry == 16 and ys.tolist() == [1, 2, 4, 8] and seen == [None] * 4


def test_no_steps():
    init = (torch.randn(2), 3)
    carry, ys = scan(lambda c, x: (c, {"y": torch.cat([c[0], x])}), init, torch.randn(0, 4))
    assert torch.equal(carry[0], init[0]) and carry[1] == 3 and ys["y"].shape == (0, 6)


def test_lengths_mask_and_resets():
    xs = torch.ones(4, 3)
    resets = torch.zeros(4, 3, dtype=torch.bool)
    resets[1] = True
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[0, 0] = False
    carry, ys = scan(
        lambda c, x: (c + x, c + x), torch.full((3,), 10.0), xs, lengths=[4, 0, 2], mask=mask, resets=resets
    )
    assert ys.T.tolist() == [[0, 11, 12, 13], [0, 0, 0, 0], [11, 11, 0, 0]]
    assert carry.tolist() == [13, 10, 11]


def test_it_is_functional():
    def fn(carry, x):
        carry["h"].add_(x)
        carry["extra"] = 1
        x.zero_()
        return {"h": carry["h"]}, carry["h"]

    init, xs = {"h": torch.zeros(2)}, torch.ones(3, 2)
    carry, ys = scan(fn, init, xs)
    assert init["h"].eq(0).all() and list(init) == ["h"] and xs.eq(1).all()
    assert ys[:, 0].tolist() == [1, 2, 3] and carry["h"].tolist() == [3, 3]


def test_one_tensor_may_start_several_carries_and_inputs_may_be_expanded():
    zero = torch.zeros(1).expand(3)
    xs = torch.ones(1, 3).expand(4, 3)
    (a, b), _ = scan(lambda c, x: ((c[0] + x, c[1] + 2 * x), None), (zero, zero), xs)
    assert a.tolist() == [4] * 3 and b.tolist() == [8] * 3


def test_scans_may_be_nested():
    def inner(c, x):
        return c + x, None

    def outer(c, row):
        total, _ = scan(inner, torch.zeros(()), row)
        return c + total, total

    carry, ys = scan(outer, torch.zeros(()), torch.arange(6.0).reshape(2, 3))
    assert carry == 15 and ys.tolist() == [3, 12]


def test_a_step_inside_the_function_runs_its_own_sequence():
    class Sum(sl.Step):
        def __init__(self):
            super().__init__()
            self.h = sl.State()

        def step(self, x):
            self.h.next = self.h.prev + x
            return self.h.next

    class Outer(sl.Step):
        def __init__(self):
            super().__init__()
            self.sum = Sum()
            self.sum.whole_sequence().backend = "reference"

        def step(self, x):
            return scan(lambda c, _: (c + self.sum(x.T)[0][-1], None), torch.zeros(2), None, length=2)[0]

    xs = torch.ones(3, 2, 5)
    ys, _ = sl.Loop(Outer(), backend="reference")(xs)
    assert ys.tolist() == [[10, 10]] * 3


def test_transforms_work_over_the_reference():
    xs = torch.randn(4, 3)
    batched = torch.func.vmap(lambda x: scan(lambda c, v: (c + v, None), torch.zeros(()), x)[0])(xs)
    torch.testing.assert_close(batched, xs.sum(1))


def test_only_a_call_that_captures_prepares_backends(monkeypatch):
    """Every call of scan makes a Program: what is begun for a first call must not be begun by each."""
    asked = []
    monkeypatch.setattr(choose.Chosen, "prepare", lambda self, dtypes: asked.append(self.name))

    def add(carry, x):
        return carry * 0.5 + x, carry

    for batch in (3, 3, 4, 3):
        sl.scan(add, torch.zeros(batch, 2), torch.randn(5, batch, 2))
    assert asked == ["auto"]
