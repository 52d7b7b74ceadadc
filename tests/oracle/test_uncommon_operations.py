"""Operations that torch itself treats apart: lazy conjugates, no rule for batching, several results, no rows at all."""

from __future__ import annotations

import pytest
import torch
from plain_loop import in_turn
from spans import cut_time
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import steploop as sl

C = torch.complex
CASES = {
    "frexp of the input": lambda h, x: (h * 0.5 + x, torch.frexp(x)[0]),
    "frexp of the state": lambda h, x: (h * 0.5 + x, torch.frexp(h).mantissa),
    "the exponent": lambda h, x: (h * 0.5 + x, torch.frexp(h).exponent),
    "hfft": lambda h, x: (h * 0.5 + x, torch.fft.hfft(C(h, x), n=6)),
    "the imaginary part of a conjugate": lambda h, x: (h * 0.5 + x, C(h, x).conj().imag),
    "of an input's conjugate": lambda h, x: (h * 0.5 + x, C(x, x).conj().imag),
    "adjoint": lambda h, x: (h * 0.5 + x, C(h, x).view(-1, 2, 2).adjoint().imag.flatten(1)),
    "a resolved conjugate": lambda h, x: (h * 0.5 + x, torch.view_as_real(C(h, x).conj().resolve_conj()).flatten(1)),
    "roll over the rows": lambda h, x: (h.roll(1, 0) * 0.5 + x, h * 1),
    "fftshift": lambda h, x: (torch.fft.fftshift(h) * 0.5 + x, h * 1),
    "the loss of a Gaussian": lambda h, x: (h * 0.5 + x, F.gaussian_nll_loss(x, h, h.square(), True, 0.1, "none")),
    "of variances of rows": lambda h, x: (h * 0.5 + x, h + F.gaussian_nll_loss(h, x, h[:, 0].exp(), reduction="none")),
    "frames of the input": lambda h, x: (h * 0.5 + x, x.as_strided((x.shape[0], 2, 2), (4, 2, 1)).sum(-1)),
    "frames of the state": lambda h, x: (h * 0.5 + x, h.as_strided((h.shape[0], 3, 2), (4, 1, 1)).sum(-1)),
}


def results(run, fn, h, xs, more=(), gradient=True):
    h, xs = (t.clone().requires_grad_(gradient) for t in (h, xs))
    found = list(run(fn, h, xs))
    if gradient:
        total = sum(r.square().sum() for r in found if r.requires_grad)
        found += torch.autograd.grad(total, (h, xs, *more), allow_unused=True, materialize_grads=True)
    return found


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("fn", CASES.values(), ids=CASES)
def test_as_in_the_plain_loop(fn, backend):
    for rows in (2, 3, 2) if fn is CASES["hfft"] else (2, 3, 0, 2):  # torch's own transform takes no empty batch
        torch.manual_seed(rows)
        h, xs = torch.randn(rows, 4, dtype=torch.float64), torch.randn(5, rows, 4, dtype=torch.float64)
        for gradient in (False, True):
            expected = results(in_turn, fn, h, xs, gradient=gradient)
            ours = results(lambda *args: sl.scan(*args, backend=backend), fn, h, xs, gradient=gradient)
            for a, b in zip(expected, ours, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(4,), (3, 2), (1, 1)])
def test_variances_that_do_not_fit(shape):
    """As torch itself says."""
    fn = lambda h, x: (h, F.gaussian_nll_loss(h, x, torch.ones(shape)))
    for run in (in_turn, sl.scan):
        with pytest.raises(Exception, match="var is of incorrect size"):
            run(fn, torch.zeros(3, 4), torch.randn(2, 3, 4))


def test_a_weight_that_lies_transposed():
    layer = nn.Linear(3, 3).double()
    layer.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64).t())
    nn.utils.parametrizations.weight_norm(layer)

    def fn(h, x):
        return torch.tanh(layer(h) + x), h * 1

    h, xs = torch.zeros(2, 3, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    more = list(layer.parameters())
    for a, b in zip(results(in_turn, fn, h, xs, more), results(sl.scan, fn, h, xs, more), strict=True):
        torch.testing.assert_close(b, a)


class Belief:
    """Registered without names of its leaves."""

    def __init__(self, mean, precision):
        self.mean, self.precision = mean, precision


pytree.register_pytree_node(Belief, lambda b: ([b.mean, b.precision], None), lambda leaves, _: Belief(*leaves))


@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
def test_a_carry_whose_leaves_have_no_names(backend):
    def fn(belief, x):
        return Belief(belief.mean + x, belief.precision * 0.9), belief.mean

    xs = torch.randn(4, 2, 3)
    last, means = sl.scan(fn, Belief(torch.zeros(2, 3), torch.ones(2, 3)), xs, backend=backend)
    torch.testing.assert_close(last.mean, xs.sum(0))
    torch.testing.assert_close(means[-1], xs[:-1].sum(0))
    torch.testing.assert_close(last.precision, torch.full((2, 3), 0.9**4))


@pytest.mark.parametrize("given", ["lengths", "mask"])
@pytest.mark.parametrize("spans", [None, 2])
def test_values_whose_size_follows_the_rows_without_an_axis_of_them(given, spans, monkeypatch):
    """A layer folds rows and channels into one axis, and its backward keeps numbers of that many."""
    if spans:
        cut_time(monkeypatch, spans)
    torch.manual_seed(0)
    norm, bag = nn.InstanceNorm1d(2, affine=True).double(), nn.EmbeddingBag(7, 4).double()

    def fn(h, x):
        folded = norm((h + bag(x)).view(-1, 2, 2)).flatten(1)
        return torch.tanh(folded), h * 1

    xs = torch.randint(0, 7, (5, 3, 4))
    how = {"lengths": torch.tensor([2, 5, 4])} if given == "lengths" else {"mask": torch.rand(5, 3) < 0.6}
    if given == "mask":
        how["mask"][:, 0] = True
    found = []
    for backend in ("reference", "auto", "eager"):
        h = torch.full((3, 4), 0.3, dtype=torch.float64).requires_grad_()
        last, ys = sl.scan(fn, h, xs, backend=backend, **how)
        total = last.cos().sum() + ys.sin().sum()
        found.append([last, ys, *torch.autograd.grad(total, (h, *norm.parameters(), *bag.parameters()))])
    for ours in found[1:]:
        for a, b in zip(found[0], ours, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)
