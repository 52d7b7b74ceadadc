"""What an operation is told by keyword: no native form may leave it out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from plain_loop import in_turn
from torch import Tensor
from torch.nn import functional as F

import steploop as sl
from steploop.backends.native.lowering import TABLE

# Not about the numbers, or told by the result's own type and shape.
ELSEWHERE = {
    "dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking", "generator", "keepdim", "dim",
    "check_errors", "implicit", "sparse_grad", "copy",
}  # fmt: skip
INDEX = torch.tensor([0, 2, 1, 0])


def safe(h: Tensor) -> Tensor:
    """Symmetric, positive definite matrices (B, 2, 2)."""
    h = h.view(-1, 2, 2)
    return h @ h.mT + 2 * torch.eye(2)


def triangle(h: Tensor) -> Tensor:
    return h.view(-1, 2, 2).tril() + 2 * torch.eye(2)


def lu(h: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linalg.lu_factor(safe(h))


# (operation, keyword) -> what a step computes of its state and its input, both (B, 4). Not all have a native form.
CASES = {
    ("add", "alpha"): lambda h, x: torch.add(h, x, alpha=0.3),
    ("sub", "alpha"): lambda h, x: torch.sub(h, x, alpha=0.3),
    ("rsub", "alpha"): lambda h, x: torch.rsub(h, x, alpha=0.3),
    ("addbmm", "alpha"): lambda h, x: h + torch.addbmm(torch.ones(1, 1), x.view(-1, 1, 4), h.view(-1, 4, 1), alpha=0.3),
    ("addbmm", "beta"): lambda h, x: h + torch.addbmm(torch.ones(1, 1), x.view(-1, 1, 4), h.view(-1, 4, 1), beta=0.3),
    ("addcdiv", "value"): lambda h, x: torch.addcdiv(h, x, 2 + h.square(), value=0.3),
    ("addcmul", "value"): lambda h, x: torch.addcmul(x, x, h, value=0.3),
    ("addmm", "alpha"): lambda h, x: torch.addmm(x, h, torch.eye(4), alpha=0.3),
    ("addmm", "beta"): lambda h, x: torch.addmm(x, h, torch.eye(4), beta=0.3),
    ("addmv", "alpha"): lambda h, x: h * torch.addmv(x[:, 0], h, torch.ones(4), alpha=0.3).unsqueeze(1),
    ("addmv", "beta"): lambda h, x: h * torch.addmv(x[:, 0], h, torch.ones(4), beta=0.3).unsqueeze(1),
    ("baddbmm", "alpha"): lambda h, x: torch.baddbmm(x.view(-1, 2, 2), safe(h), safe(x), alpha=0.3).flatten(1),
    ("baddbmm", "beta"): lambda h, x: torch.baddbmm(x.view(-1, 2, 2), safe(h), safe(x), beta=0.3).flatten(1),
    ("div", "rounding_mode"): lambda h, x: h / 2 + torch.div(h, 0.3 + x.square(), rounding_mode="trunc"),
    ("gelu", "approximate"): lambda h, x: F.gelu(h + x, approximate="tanh"),
    ("gelu_backward", "approximate"): lambda h, x: F.gelu(h + x, approximate="tanh"),
    ("index_add", "alpha"): lambda h, x: h.index_add(1, INDEX, x, alpha=-0.5),
    ("linalg_cholesky_ex", "upper"): lambda h, x: torch.linalg.cholesky(safe(h + x), upper=True).flatten(1),
    ("linalg_lu_factor_ex", "pivot"): lambda h, x: h + safe(x).flatten(1) / (1 + safe(h).det().unsqueeze(1)),
    ("linalg_lu_solve", "left"): lambda h, x: torch.linalg.lu_solve(*lu(h), safe(x), left=False).flatten(1),
    ("linalg_lu_solve", "adjoint"): lambda h, x: torch.linalg.lu_solve(*lu(h), safe(x), adjoint=True).flatten(1),
    ("_linalg_solve_ex", "left"): lambda h, x: torch.linalg.solve(safe(h), safe(x), left=False).flatten(1),
    ("linalg_solve_triangular", "left"): lambda h, x: torch.linalg.solve_triangular(
        triangle(h), safe(x), upper=False, left=False
    ).flatten(1),
    ("linalg_solve_triangular", "upper"): lambda h, x: torch.linalg.solve_triangular(
        triangle(h).mT, safe(x), upper=True
    ).flatten(1),
    ("linalg_solve_triangular", "unitriangular"): lambda h, x: torch.linalg.solve_triangular(
        triangle(h), safe(x), upper=False, unitriangular=True
    ).flatten(1),
    ("round", "decimals"): lambda h, x: h / 2 + torch.round(h + x, decimals=1),
    ("scatter", "reduce"): lambda h, x: h + x + torch.scatter(
        x.detach(), 1, INDEX.expand(len(h), 4), h.detach(), reduce="add"
    ),
    ("std", "correction"): lambda h, x: h + torch.std(h + x, 1, correction=0, keepdim=True),
    ("var", "correction"): lambda h, x: h + torch.var(h + x, 1, correction=0, keepdim=True),
    ("var_mean", "correction"): lambda h, x: h + torch.var_mean(h + x, 1, correction=0, keepdim=True)[0],
}  # fmt: skip


def keywords() -> Iterator[tuple[str, str]]:
    """Of all operations that native loops take."""
    for name in TABLE:
        packet = getattr(torch.ops.aten, name, None)
        for overload in packet.overloads() if packet else ():
            schema = getattr(packet, overload)._schema
            if not any(a.is_out for a in schema.arguments):
                yield from ((name, a.name) for a in schema.arguments if a.kwarg_only and a.name not in ELSEWHERE)


def test_every_keyword_has_a_case():
    assert set(keywords()) <= {*CASES}


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_what_is_told_by_keyword_counts(case, backend):
    def fn(h, x):
        new = torch.tanh(CASES[case](h, x))
        return new, new + h

    torch.manual_seed(1)
    given = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 3, 4, dtype=torch.float64)]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = []
        for run in (in_turn, lambda *args: sl.scan(*args, backend=backend)):
            h, xs = (t.clone().requires_grad_() for t in given)
            results = run(fn, h, xs)
            found.append([*results, *torch.autograd.grad(sum(r.cos().sum() for r in results), (h, xs))])
    finally:
        torch.set_default_dtype(default)
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
