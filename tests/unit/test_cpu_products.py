"""Products outside loops by the kernels of the loops: against torch.mm."""

from __future__ import annotations

import pytest
import torch
from cpu_loops import make_case

from steploop.backends import cpu


@pytest.fixture(scope="module")
def product():
    weight = torch.randn(5, 5)
    case = make_case(
        lambda xs, constants, states: ([], [states[0] @ weight + xs[0]]), [torch.randn(2, 3, 5)], [torch.zeros(3, 5)]
    )
    found = cpu.compile(case.loop).product
    if found is None:
        pytest.skip("this CPU has no wide vectors: torch's products are used")
    return found


def check(product, a, w, bias):
    found = product(a, w, bias)
    wanted = a.double() @ w.double() + (0 if bias is None else bias.double())
    bound = a.double().abs() @ w.double().abs() + 1
    assert ((found - wanted).abs() <= 2e-6 * bound).all()


@pytest.mark.parametrize("rows", [256, 257, 300, 321, 511, 1000])
@pytest.mark.parametrize(("depth", "columns"), [(16, 64), (33, 65), (96, 127), (97, 192), (256, 504)])
@pytest.mark.parametrize("biased", [False, True])
def test_sizes(product, rows, depth, columns, biased):
    check(product, torch.randn(rows, depth), torch.randn(depth, columns), torch.randn(columns) if biased else None)


def test_layouts(product):
    a, w = torch.randn(300, 80), torch.randn(70, 80)
    check(product, a, w.t(), None)
    check(product, a[:, 3:40], w[:, 3:40].t(), torch.randn(70))
    check(product, torch.randn(900, 80)[::3], torch.randn(160, 140)[::2, ::2], None)
    check(product, torch.randn(1, 80).expand(300, 80), w.t(), None)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(product, threads):
    a, w, bias = torch.randn(777, 130), torch.randn(130, 99), torch.randn(99)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = product(a, w, bias)
        torch.set_num_threads(threads)
        assert torch.equal(product(a, w, bias), wanted)
    finally:
        torch.set_num_threads(before)


def test_what_it_does_not_take(product):
    a, w = torch.randn(300, 80), torch.randn(80, 70)
    assert product(a[:200], w, None) is None
    assert product(a.double(), w.double(), None) is None
    assert product(a.t().contiguous().t(), w, None) is None
    assert product(a, w, torch.randn(1, 70)) is None
    assert product(a, w[:, :60], None) is None


def test_numbers_that_are_none(product):
    a, w = torch.randn(256, 32), torch.randn(32, 64)
    a[3, 4], a[7, 1], w[5, 6] = float("inf"), float("nan"), float("-inf")
    torch.testing.assert_close(product(a, w, None), a @ w, rtol=1e-5, atol=1e-5, equal_nan=True)
