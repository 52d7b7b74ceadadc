"""Every stranger's step runs as the plain loop does: written by hand, as a scan, as a Step; at sizes one after the
other, with and without gradients."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
from agree import GRADIENTS, VALUES, compare
from strangers import all_strangers
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import steploop as sl
from steploop.closed_over import trainable

STRANGERS = all_strangers()
SIZES = [(5, 2), (1, 4), (0, 1), (9, 3), (5, 1), (3, 4)]  # (T, B)


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def plain_loop(fn, carry, xs, steps):
    """What sl.scan promises, by hand."""
    ys = []
    for t in range(steps):
        carry, y = fn(carry, pytree.tree_map(lambda x: x[t].clone(), xs))
        ys.append(y)
    if not ys:
        return carry, None
    spec = pytree.tree_flatten(ys[0])[1]
    return carry, pytree.tree_map(lambda *parts: torch.stack(parts), *[
        pytree.tree_unflatten(pytree.tree_flatten(y)[0], spec) for y in ys])  # fmt: skip


def leaf(tensor: Tensor, gradient: bool) -> Tensor:
    tensor = tensor.detach().clone()
    return tensor.requires_grad_(gradient and tensor.is_floating_point())


def everything(run, fn, init, xs, gradient):
    """Results and gradients of a way to run a step."""
    init, xs = pytree.tree_map_only(Tensor, lambda t: leaf(t, gradient), (init, xs))
    results = [t for t in pytree.tree_leaves(run(init, xs)) if isinstance(t, Tensor)]
    found = {f"result {i}": t for i, t in enumerate(results)}
    tracked = [t for t in results if t.requires_grad]
    leaves = [t for t in pytree.tree_leaves((init, xs)) if isinstance(t, Tensor) and t.requires_grad]
    leaves += [t for _, t in trainable(fn)]
    if gradient and tracked and leaves:
        # Finite cotangents of another sign and size for every number.
        given = [torch.linspace(-1, 1.5, t.numel()).view_as(t).to(t.dtype) for t in tracked]
        got = torch.autograd.grad(tracked, leaves, given, allow_unused=True, materialize_grads=True)
        found.update({f"gradient {i}": g for i, g in enumerate(got)})
    return found


def agreed(expected, found, what):
    for name in expected:
        compare(expected[name].detach(), found[name].detach(), f"{what}: {name}", name.startswith("gradient"))


class AsStep(sl.Step):
    """A function of a scan as a Step: every tensor of its carry is a State."""

    def __init__(self, fn, init):
        super().__init__()
        self.fn = fn
        leaves, self.spec = pytree.tree_flatten(init)
        self.slots = nn.ModuleList(sl.State(init=None, dtype=v.dtype) for v in leaves)

    def begin(self, carry):
        for slot, value in zip(self.slots, pytree.tree_leaves(carry), strict=True):
            slot.prev = value

    def step(self, xs, *, carry):
        carry, y = self.fn(pytree.tree_unflatten([s.prev for s in self.slots], self.spec), xs)
        for slot, value in zip(self.slots, pytree.tree_leaves(carry), strict=True):
            slot.next = value
        return y


@pytest.mark.parametrize("name", [n for n, s in STRANGERS.items() if not s.random])
def test_as_a_scan(name):
    fn, init, xs = STRANGERS[name].make()
    for steps, batch in SIZES:
        start, sequences = init(batch), xs(steps, batch)
        for gradient in (False, True):
            what = f"{name}, T={steps}, B={batch}"
            expected = everything(lambda c, x: plain_loop(fn, c, x, steps), fn, start, sequences, gradient)
            found = everything(lambda c, x: sl.scan(fn, c, x), fn, start, sequences, gradient)
            if steps:
                agreed(expected, found, what)
            else:  # ys of no steps, which a loop by hand does not have
                carry = {n: v for n, v in expected.items() if n.startswith("result")}
                agreed(carry, found, what)


@pytest.mark.parametrize("as_step", [False, True])
@pytest.mark.parametrize("name", [n for n, s in STRANGERS.items() if n.startswith("habits.") and not s.random])
def test_before_anything_else_has_run_the_step(name, as_step):
    """Caches that a first step fills are empty still, and hold the step's own tensors afterwards."""
    make = STRANGERS[name].make
    for value in vars(sys.modules[make.__module__]).values():
        if isinstance(value, functools._lru_cache_wrapper):
            value.cache_clear()
    torch.manual_seed(0)
    fn, init, xs = make()
    start, sequences = init(3), xs(4, 3)
    if as_step:
        found = sl.Loop(AsStep(fn, start), backend="eager")(sequences, carry=start)[0]
    else:
        found = sl.scan(fn, start, sequences, backend="eager")[1]
    expected = plain_loop(fn, start, sequences, 4)[1]
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
        compare(a.detach(), b.detach(), name, False)


@pytest.mark.parametrize("name", [n for n, s in STRANGERS.items() if s.rows])
def test_as_a_step(name):
    stranger = STRANGERS[name]
    fn, init, xs = stranger.make()
    step = AsStep(fn, init(2))
    loop = sl.Loop(step)
    for steps, batch in SIZES:
        start, sequences = init(batch), xs(steps, batch)
        lengths = torch.randint(0, steps + 1, (batch,))
        for arguments in ({}, {"lengths": lengths}):
            sl.verify(loop, leafs(sequences), carry=leafs(start), **arguments)


def leafs(tree):
    return pytree.tree_map_only(Tensor, lambda t: leaf(t, True), tree)


assert GRADIENTS and VALUES
