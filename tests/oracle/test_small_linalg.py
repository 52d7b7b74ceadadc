"""Linear algebra on small matrices inside native loops: values and gradients are those of the plain loop."""

from __future__ import annotations

import pytest
import torch
from agree import agree_scan
from cpu_loops import assert_same, both, make_case, run

import steploop as sl
from steploop.backends import cpu, eager
from steploop.backends.native.fuse import fuse
from steploop.backends.native.interpret import Interpreter
from steploop.backends.native.lower import lower
from steploop.backends.native.ops_linalg import LARGEST
from steploop.compiler.schedule import make_schedule

T = 4
linalg = torch.linalg


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def matrices(*shape, dtype=torch.float64):
    """(.., n, n), far from singular, though the diagonal is 0: without pivots nothing comes out."""
    n = shape[-1]
    if n == 1:
        return torch.rand(*shape, 1, dtype=dtype) + 0.5
    noise = 0.3 * torch.randn(*shape, n, dtype=dtype) * (1 - torch.eye(n, dtype=dtype))
    return noise + 2 * torch.eye(n, dtype=dtype).roll(1, 0) * (1 + torch.rand(n, dtype=dtype))


# -- all forms, forward --------------------------------------------------------------------------------------


def with_pivots(a, b, v):
    """a (B, n, n), b (B, n, 3), v (B, n)"""
    lu, pivots, info = linalg.lu_factor_ex(a)
    return [
        *linalg.inv_ex(a), linalg.solve(a, b), linalg.solve(a, v), linalg.solve(a, b.mT, left=False),
        linalg.solve(a.mT, b), linalg.inv(a.mT), lu, pivots, info, linalg.lu_solve(lu, pivots, b),
        linalg.lu_solve(lu, pivots, b, adjoint=True), linalg.lu_solve(lu, pivots, b.mT, left=False),
        linalg.lu_solve(lu, pivots, b.mT, left=False, adjoint=True), linalg.det(a), linalg.det(a.mT),
        *linalg.slogdet(a), *linalg.slogdet(-a.mT),
    ]  # fmt: skip


def with_triangles(a, b, v):
    spd = a @ a.mT + 0.1 * torch.eye(a.shape[-1], dtype=a.dtype)
    lower, upper = linalg.cholesky(spd), linalg.cholesky_ex(spd, upper=True)
    found = [lower, *upper, linalg.cholesky(spd.mT), torch.cholesky_inverse(lower), torch.logdet(spd)]
    found += [torch.cholesky_solve(b, lower), torch.cholesky_solve(b, upper[0], upper=True)]
    for unit in (False, True):
        for factor, up in ((lower, False), (upper[0], True), (lower.mT, True), (spd, False), (spd, True)):
            found.append(linalg.solve_triangular(factor, b, upper=up, unitriangular=unit))
            found.append(linalg.solve_triangular(factor, b.mT, upper=up, left=False, unitriangular=unit))
    return found + [linalg.solve_triangular(lower, v.unsqueeze(-1), upper=False)]


def each(functions, n, dtype, batch=4):
    """All results of some functions in one loop, beside a state that they work on."""

    def step(xs, constants, states):
        a, b, v = xs[0] * (1 + 0.1 * states[0].tanh()).unsqueeze(-1), xs[1], states[0]
        found = [r for function in functions for r in function(a, b, v)]
        return [r.clone() for r in found], [0.5 * states[0] + found[0].sum(-1).tanh()]

    xs = [matrices(T, batch, n, dtype=dtype), torch.randn(T, batch, n, 3, dtype=dtype)]
    return make_case(step, xs, [torch.randn(batch, n, dtype=dtype)])


@pytest.mark.parametrize("n", [1, 2, 3, 5, LARGEST])
def test_every_form(n):
    lengths = torch.tensor([4, 0, 3, 4])
    assert_same(each([with_pivots, with_triangles], n, torch.float64), lengths, rtol=1e-9, atol=1e-10)


def test_the_interpreter_means_the_same():
    case = each([with_pivots, with_triangles], 3, torch.float64)
    program, reasons = lower(case.loop)
    assert not reasons
    schedule = make_schedule(T, 4, torch.device("cpu"), torch.tensor([4, 0, 3, 4]), None, None)
    wanted, found = (run(r, case, schedule) for r in (eager.Runner(case.loop), Interpreter(case.loop, fuse(program))))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def test_every_form_in_single_precision():
    """As far from the exact values as torch's, within a factor."""
    case = each([with_pivots, with_triangles], 5, torch.float32)
    (_, wanted), (_, found) = both(case)
    for node, a, b in zip(case.loop.kept, wanted, found):
        scale = a.abs().amax() if a.is_floating_point() else 0.0
        torch.testing.assert_close(b, a, rtol=0, atol=float(2e-4 * scale), msg=lambda m, n=node: f"{n}: {m}")


def test_what_is_singular_is_not_finite():
    def step(xs, constants, states):
        flat = torch.zeros_like(xs[0]) + states[0].unsqueeze(-1)  # rows of equal numbers
        outer = states[0].unsqueeze(-1) * states[0].unsqueeze(-2)
        factor, info = linalg.cholesky_ex(outer - torch.eye(3))
        inverse, at = linalg.inv_ex(flat)
        return [inverse, at.clone(), factor.diagonal(dim1=1, dim2=2) + 0, info > 0, *linalg.slogdet(flat * 0)], [
            states[0] + 0
        ]

    _, (inverse, at, diagonal, failed, sign, log) = both(
        make_case(step, [torch.zeros(T, 2, 3, 3)], [torch.tensor([[1.0, 2, 4], [0.5, 8, 2]])])
    )[1]
    assert not inverse.isfinite().any() and (at == 2).all()
    assert failed.all() and diagonal[:, -1].isnan().all()
    assert (sign == 0).all() and (log == -torch.inf).all()


def test_hilbert_matrices_are_solved_as_well_as_by_lapack():
    n = 9  # of condition 5e11
    places = torch.arange(n, dtype=torch.float64)
    hilbert = (1 / (places[:, None] + places + 1)).expand(1, 2, n, n).contiguous()
    exact = torch.ones(1, 2, n)

    def step(xs, constants, states):
        a = xs[0] + 0 * states[0].unsqueeze(-1)
        return [linalg.solve(a, (a * xs[1].unsqueeze(-2)).sum(-1))], [states[0] * 0.5]

    (_, (wanted,)), (_, (found,)) = both(make_case(step, [hilbert, exact], [torch.ones(2, n)]))
    assert (found - 1).abs().max() < 10 * (wanted - 1).abs().max() + 1e-12


# -- gradients -----------------------------------------------------------------------------------------------


def runs_pivots(weight):
    def fn(h, x):
        a = (x + weight) * (1 + 0.1 * h.tanh()).unsqueeze(-1)
        solved = linalg.solve(a, h)
        right = linalg.solve(a, x.mT, left=False)
        value = linalg.det(a).tanh() + linalg.slogdet(a.mT)[1] + linalg.slogdet(a)[1]
        h = (solved + linalg.inv(a.mT).sum(-1) + 0.1 * right.sum(-1)).tanh() * value.tanh().unsqueeze(-1)
        return h, (h, value, right)

    return fn


def runs_triangles(weight):
    def fn(h, x):
        a = (x + weight) * (1 + 0.1 * h.tanh()).unsqueeze(-1)
        spd = a @ a.mT + torch.eye(a.shape[-1])
        lower, upper = linalg.cholesky(spd), linalg.cholesky(a.mT @ a + torch.eye(a.shape[-1]), upper=True)
        one = torch.cholesky_solve(h.unsqueeze(-1), lower).squeeze(-1)
        two = linalg.solve_triangular(upper, h.unsqueeze(-1), upper=True).squeeze(-1)
        three = linalg.solve_triangular(lower, x.mT, upper=False, left=False, unitriangular=True)
        h = (one + two + 0.1 * three.sum(-1)).tanh()
        return h, (h, torch.logdet(spd), lower.diagonal(dim1=-2, dim2=-1).log().sum(-1))

    return fn


@pytest.mark.parametrize("runs", [runs_pivots, runs_triangles])
@pytest.mark.parametrize("n", [1, 3, LARGEST])
def test_gradients(runs, n):
    fn = runs((0.1 * torch.randn(n, n) * (1 - torch.eye(n))).requires_grad_())
    for batch in (4, 1, 3, 0) if n == 3 else (4,):
        init, xs = torch.randn(batch, n).requires_grad_(), matrices(T, batch, n).requires_grad_()
        resets = torch.rand(T, batch) > 0.6
        lengths = torch.tensor([4, 0, 3, 1])[:batch]
        agree_scan(fn, init, xs, backend="cpu", lengths=lengths, resets=resets)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_determinants_of_transposed_matrices(backend):
    """They may leave the loop, and there the matrices have other strides than in the step."""

    def fn(h, x):
        a = x * (1 + 0.1 * h.tanh()).unsqueeze(-1)
        turned = (a @ a.mT + a).mT
        h = (h + turned.sum(-1)).tanh()
        return h, (linalg.slogdet(turned)[1], linalg.det(turned).tanh(), linalg.slogdet(turned.contiguous())[1])

    for batch in (3, 1):
        init, xs = torch.randn(batch, 3).requires_grad_(), matrices(T, batch, 3).requires_grad_()
        agree_scan(fn, init, xs, backend=backend)
        agree_scan(fn, init, xs, backend=backend, lengths=torch.tensor([4, 2, 3])[:batch])


def test_gradients_without_a_batch():
    fn = runs_pivots((0.1 * torch.randn(3, 3)).requires_grad_())
    agree_scan(fn, torch.randn(3), matrices(T, 3).requires_grad_(), backend="cpu")
    agree_scan(fn, torch.randn(2, 3), matrices(T, 2, 3).requires_grad_(), backend="cpu")


def test_larger_matrices_stay_with_lapack():
    n = LARGEST + 1
    ((reason, line), *_) = cpu.reasons_against(each([lambda a, b, v: [linalg.solve(a, b)]], n, torch.float64).loop)
    assert f"({n}, {n})" in reason and line.startswith("test_small_linalg.py:")
    agree_scan(runs_triangles(torch.zeros(n, n)), torch.randn(2, n), matrices(T, 2, n), backend="auto")


# -- a Kalman filter -----------------------------------------------------------------------------------------


def kalman(move, see):
    noise, blur = 0.1 * torch.eye(4), 0.3 * torch.eye(2)

    def fn(carry, z):
        mean, cov = carry
        mean, cov = mean @ move.T, move @ cov @ move.T + noise
        spread, miss = see @ cov @ see.T + blur, z - mean @ see.T
        gain = linalg.solve(spread, see @ cov).mT
        weighed = linalg.solve(spread, miss)
        mean = mean + (gain @ miss.unsqueeze(-1)).squeeze(-1)
        return (mean, cov - gain @ see @ cov), -0.5 * ((miss * weighed).sum(-1) + torch.logdet(spread))

    return fn


@pytest.mark.parametrize("batch", [(), (5,)])
def test_a_kalman_filter_is_native(batch):
    move, see = (0.9 * torch.eye(4) + 0.05).requires_grad_(), torch.randn(2, 4).requires_grad_()
    init = torch.zeros(*batch, 4), torch.eye(4).expand(*batch, 4, 4).clone()
    xs = torch.randn(6, *batch, 2).requires_grad_()
    agree_scan(kalman(move, see), init, xs, backend="cpu")
    if batch:
        agree_scan(kalman(move, see), init, xs, backend="cpu", lengths=torch.tensor([6, 0, 2, 5, 6]))


def test_backend_cpu_would_tell():
    """What the tests above rest on."""
    step = lambda h, x: (linalg.qr(x + h).Q, h)  # noqa: E731
    with pytest.raises(sl.UnsupportedError, match="qr"):
        sl.scan(step, torch.eye(2), torch.randn(3, 2, 2), backend="cpu")
