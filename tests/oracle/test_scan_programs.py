"""What people have as functions: scan gives what the plain loop gives, values and all gradients."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from agree import agree_scan
from torch import nn

import steploop as sl

T, B, INPUT, HIDDEN = 5, 3, 4, 6


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def data(*shape, grad=True):
    return torch.randn(*shape).requires_grad_(grad)


def scan_agrees(fn, init, xs, rows=False, **call):
    """Both directions; with rows also lengths, mask and resets."""
    agree_scan(fn, init, xs, **call)
    agree_scan(fn, init, xs, reverse=True, **call)
    if rows:
        lengths = torch.tensor([T, 0, 3])
        mask, resets = torch.rand(T, B) > 0.3, torch.rand(T, B) > 0.6
        agree_scan(fn, init, xs, lengths=lengths)
        agree_scan(fn, init, xs, lengths=lengths, mask=mask, resets=resets, reverse=True)


def test_gru_cell():
    cell, out = nn.GRUCell(INPUT, HIDDEN), nn.Linear(HIDDEN, 2)

    def fn(h, x):
        h = cell(x, h)
        return h, out(h)

    scan_agrees(fn, torch.zeros(B, HIDDEN), data(T, B, INPUT), rows=True)
    scan_agrees(fn, data(B, HIDDEN), data(T, B, INPUT), rows=True)


def test_one_tensor_starts_both_states_of_an_lstm_cell():
    cell = nn.LSTMCell(INPUT, HIDDEN)

    def fn(state, x):
        h, c = cell(x, state)
        return (h, c), h

    zero = torch.zeros(B, HIDDEN)
    scan_agrees(fn, (zero, zero), data(T, B, INPUT), rows=True)
    start, xs = data(B, HIDDEN), data(T, B, INPUT)
    gradients = []
    for backend in ("reference", "eager"):
        (h, c), _ = sl.scan(fn, (start, start), xs, backend=backend)
        gradients.append(torch.autograd.grad(h.sum() + c.sin().sum(), start)[0])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_dictionaries_numbers_and_none():
    w = data(HIDDEN, HIDDEN)

    def fn(carry, x):
        h = torch.tanh(carry["h"] @ w + x["a"])
        carry = {"h": h, "n": carry["n"] + 1, "scale": carry["scale"], "none": None}
        return carry, {"y": h * carry["scale"], "nothing": None, "n": carry["n"]}

    init = {"h": data(B, HIDDEN), "n": torch.zeros(B, dtype=torch.int64), "scale": 2.5, "none": None}
    scan_agrees(fn, init, {"a": data(T, B, HIDDEN)}, rows=True)


def test_named_tuples_and_lists():
    Pair = namedtuple("Pair", "a b")
    scan_agrees(lambda c, x: (Pair(c.b, c.a * x), Pair(x, c.a)), Pair(data(B), data(B)), data(T, B))
    scan_agrees(lambda c, x: ([c[1], c[0] + x], [c[0], (x,)]), [data(3), data(3)], data(T, 3))


def test_kalman_filter():
    move, see = torch.eye(3) + 0.1 * torch.randn(3, 3), torch.randn(2, 3)
    move.requires_grad_(), see.requires_grad_()
    noise, blur = 0.1 * torch.eye(3), 0.3 * torch.eye(2)

    def fn(carry, z):
        mean, cov = carry
        mean, cov = move @ mean, move @ cov @ move.T + noise
        spread = see @ cov @ see.T + blur
        gain = torch.linalg.solve(spread, see @ cov).T
        miss = z - see @ mean
        likelihood = -0.5 * (miss @ torch.linalg.solve(spread, miss) + torch.logdet(spread))
        return (mean + gain @ miss, cov - gain @ spread @ gain.T), (mean, likelihood)

    scan_agrees(fn, (torch.zeros(3), torch.eye(3)), data(T, 2))


def test_kalman_filters_of_a_batch_by_cholesky():
    move = (torch.eye(3) + 0.1 * torch.randn(3, 3)).requires_grad_()
    see, noise, blur = torch.randn(2, 3), 0.1 * torch.eye(3), 0.3 * torch.eye(2)

    def fn(carry, z):
        mean, cov = carry
        mean, cov = mean @ move.T, move @ cov @ move.T + noise
        spread = see @ cov @ see.T + blur
        gain = torch.cholesky_solve(see @ cov, torch.linalg.cholesky(spread)).transpose(-1, -2)
        mean = mean + (gain @ (z - mean @ see.T)[..., None])[..., 0]
        return (mean, cov - gain @ spread @ gain.transpose(-1, -2)), mean

    scan_agrees(fn, (torch.zeros(B, 3), torch.eye(3).expand(B, 3, 3)), data(T, B, 2), rows=True)


def test_biquad_filter():
    b, a = data(3), data(2)

    def fn(carry, x):
        x1, x2, y1, y2 = carry
        y = b[0] * x + b[1] * x1 + b[2] * x2 - 0.1 * a[0] * y1 - 0.1 * a[1] * y2
        return (x, x1, y, y1), y

    scan_agrees(fn, (torch.zeros(()),) * 4, data(T))
    scan_agrees(fn, (torch.zeros(B),) * 4, data(T, B), rows=True)


def test_forward_algorithm_of_a_hidden_markov_model():
    logits = data(4, 4)

    def fn(alpha, emission):
        moved = torch.logsumexp(alpha[..., :, None] + torch.log_softmax(logits, -1), -2)
        return moved + emission, moved

    scan_agrees(fn, data(B, 4), data(T, B, 4), rows=True)
    scan_agrees(fn, data(4), data(T, 4))


@pytest.mark.parametrize(
    "fn",
    [
        lambda c, x: (c + x, c + x),
        lambda c, x: (c * x, c),
        lambda c, x: (torch.maximum(c, x), c),
        lambda c, x: (c, x * 2),
        lambda c, x: (x, c),
        lambda c, x: (c * 0.9 + x, (c, c, x)),
    ],
    ids=["sum", "product", "maximum", "unchanged", "previous", "aliases"],
)
def test_cumulative_things(fn):
    scan_agrees(fn, data(4), data(T, 4))
    scan_agrees(fn, data(1)[0].detach().requires_grad_(), data(T))
    scan_agrees(fn, data(B, 4), data(T, B, 4), rows=True)


def test_carries_that_swap_or_alias():
    scan_agrees(lambda c, x: ((c[1], c[0]), c[0]), (data(4), data(4)), data(T, 4))
    scan_agrees(lambda c, x: ((c[0] + x, c[0] + x), c[0]), (data(4), data(4)), data(T, 4))


def test_no_sequence():
    w = data(4, 4)
    scan_agrees(lambda c, _: (torch.tanh(c @ w), c), data(4), None, length=5)
    scan_agrees(lambda c, _: (torch.tanh(c @ w), c), data(4), None, length=0)
    scan_agrees(lambda c, _: (c + 1, None), torch.zeros((), dtype=torch.int64), None, length=5)


@pytest.mark.parametrize("steps", [0, 1])
def test_hardly_any_steps(steps):
    w = data(4, 4)
    scan_agrees(lambda c, x: (torch.tanh(c @ w + x), c.sum()), data(4), data(steps, 4))


def test_chained_scans():
    """torch's own scan gave silently wrong gradients here (pytorch#153679)."""
    w, v, xs, init = data(4, 4), data(4, 4), data(T, 3, 4), data(3, 4)

    def run(backend):
        c, ys = sl.scan(lambda c, x: (torch.tanh(c @ w + x), c), init, xs, backend=backend)
        c, zs = sl.scan(lambda c, x: (torch.tanh(c @ v + x * c), c * x), c, ys, reverse=True, backend=backend)
        c, us = sl.scan(lambda c, x: (torch.tanh(c @ w + x), c), c, zs + ys, backend=backend)
        return c, us, *torch.autograd.grad(c.sin().sum() + us.cos().sum(), (xs, init, w, v))

    for expected, found in zip(run("reference"), run("eager"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_closed_over_parameters_when_the_initial_state_needs_no_gradient():
    """torch's own scan left these gradients incomplete (pytorch#184528)."""
    w, b = data(4, 4), data(4)
    fn = lambda c, x: (torch.tanh(c @ w + x + b), c)
    scan_agrees(fn, torch.zeros(4), data(T, 4, grad=False))
    scan_agrees(fn, torch.zeros(2, 4), data(T, 2, 4, grad=False))


def test_expanded_and_transposed_inputs():
    w = data(4, 4)
    fn = lambda c, x: (torch.tanh(c @ w + x), c)
    scan_agrees(fn, torch.zeros(1, 4).expand(3, 4), torch.randn(T, 1, 4).expand(T, 3, 4), rows=True)
    scan_agrees(fn, torch.zeros(4, 3).t(), torch.randn(4, 3, T).permute(2, 1, 0), rows=True)


def test_what_fn_writes_in_place_is_not_seen_outside():
    def fn(carry, x):
        carry["a"].add_(x["x"])
        x["x"].mul_(2)
        carry["new"] = 1
        del carry["new"]
        carry["b"] = carry["b"] + carry["a"]
        return carry, x["x"]

    scan_agrees(fn, {"a": data(3), "b": data(3)}, {"x": data(T, 3)})
    init, xs = {"a": torch.zeros(3), "b": torch.zeros(3)}, {"x": torch.ones(T, 3)}
    sl.scan(fn, init, xs, backend="eager")
    assert init["a"].sum() == 0 and xs["x"].sum() == 3 * T


def test_torch_func_inside():
    w = data(4, 4)

    def mapped(c, x):
        h = torch.func.vmap(lambda row: torch.tanh(row @ w))(c) + x
        return h, h

    def descends(c, x):
        return c - 0.1 * torch.func.grad(lambda r: (torch.tanh(r @ w) ** 2).sum())(c) + x, c

    scan_agrees(mapped, data(B, 4), data(T, B, 4), rows=True)
    scan_agrees(descends, data(B, 4), data(T, B, 4))


def test_autograd_inside():
    w = torch.randn(4, 4)

    def fn(c, x):
        with torch.enable_grad():
            c = c.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((torch.tanh(c @ w) ** 2).sum(), c)
        return c.detach() - 0.1 * gradient + x, c

    agree_scan(fn, torch.randn(B, 4), torch.randn(T, B, 4), backward=False)


def test_complex_carry():
    a = torch.randn(4, dtype=torch.complex128).requires_grad_()
    xs, init = torch.randn(T, B, 4, dtype=torch.complex128), torch.zeros(B, 4, dtype=torch.complex128)
    results = []
    for backend in ("reference", "eager"):
        c, ys = sl.scan(lambda c, x: (c * a * 0.3 + x, c.real), init, xs, backend=backend)
        results.append((c, ys, *torch.autograd.grad(ys.sin().sum() + c.abs().sum(), a)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_float32():
    w = torch.randn(4, 4, dtype=torch.float32).requires_grad_()
    zeros, xs = torch.zeros(3, 4, dtype=torch.float32), torch.randn(T, 3, 4, dtype=torch.float32)
    scan_agrees(lambda c, x: (torch.tanh(c @ w + x), c), zeros, xs, rows=True)
