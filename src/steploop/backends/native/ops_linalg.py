"""Lowerings of linear algebra on small matrices: factors, solutions and determinants.

Each is a few calls of kernels/linalg.h, one for every matrix of a row. Larger matrices stay with LAPACK, outside native
loops. As the `*_ex` forms of torch.linalg do, routines go on: singular matrices give inf and nan, matrices that are not
positive definite a Cholesky factor of nan. Where a step has the forms that raise, `_solved` looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from . import geometry
from .language import Dim, Expr, Load, Routine, contiguous, whole
from .lowering import Lowering, Unsupported, lowers
from .ops_pointwise import Point, option

LARGEST = 16  # rows of a matrix; from about there on LAPACK's blocks are worth their calls

# -- the routines --------------------------------------------------------------------------------------------


def _lu_factor(a: Tensor, n: int) -> Tensor:
    lu, pivots, info = torch.linalg.lu_factor_ex(a)
    return torch.cat([lu.flatten(-2), pivots.to(a.dtype), info.to(a.dtype).unsqueeze(-1)], -1)


def _lu_solved(lu: Tensor, pivots: Tensor, b: Tensor, n: int, adjoint: int) -> Tensor:
    rows = max(t.shape[0] for t in (lu, pivots, b))
    lu, pivots, b = (t.expand(rows, *t.shape[1:]).contiguous() for t in (lu, pivots.squeeze(-1).int(), b))
    return torch.linalg.lu_solve(lu, pivots, b, adjoint=bool(adjoint)).flatten(-2)


def _triangle_solved(a: Tensor, b: Tensor, n: int, upper: int, unit: int) -> Tensor:
    return torch.linalg.solve_triangular(a, b, upper=bool(upper), unitriangular=bool(unit)).flatten(-2)


def _cholesky_factor(a: Tensor, n: int) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(a)
    return torch.cat([factor.flatten(-2), info.to(a.dtype).unsqueeze(-1)], -1)


# What the routines mean: their operands, then their options, the size n of the matrix first.
MEANINGS: dict[str, Callable[..., Tensor]] = {
    "lu_factor": _lu_factor, "lu_solved": _lu_solved, "triangle_solved": _triangle_solved,
    "cholesky_factor": _cholesky_factor,
}  # fmt: skip


class Results:
    """Parts of the numbers that a routine gives for every matrix."""

    def __init__(self, low: Lowering, target: Load):
        self.low, self.target = low, target

    def part(self, start: int, *shape: Dim) -> Load:
        """(*lead, *shape) of the numbers from `start`."""
        target = self.target
        lead, strides = target.shape[:-1], target.strides[:-1]
        return self.low.make.load(
            Load(target.buffer, (*lead, *shape), (*strides, *contiguous(shape)), target.offset + start)
        )


def run(low: Lowering, name: str, operands: Sequence[Expr], options: tuple[int, ...], count: Dim) -> Results:
    """A routine that gives `count` numbers for every matrix. Equal calls are made once."""
    lead = _together([o.shape[:-2] for o in operands])
    given = [_matrix(low, o, lead) for o in operands]
    key = (name, options, *map(id, given))
    if key not in low.routines:
        target = whole(low.temp((*lead, count), operands[0].dtype, name))
        low.emit(Routine(target, name, tuple(given), options))
        low.routines[key] = target
    return Results(low, low.routines[key])


def _together(leads: list[tuple[Dim, ...]]) -> tuple[Dim, ...]:
    """The axes of which all are broadcasts."""
    rank = max(map(len, leads))
    padded = [(1,) * (rank - len(lead)) + tuple(lead) for lead in leads]
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*padded))


def _matrix(low: Lowering, expr: Expr, lead: tuple[Dim, ...]) -> Load:
    if not isinstance(expr, Load) or expr.at:
        expr = low.copy(expr)
    found = low.expand(expr, (*lead, *expr.shape[-2:]))
    assert isinstance(found, Load)
    return found


def _size(low: Lowering, matrix: Expr) -> int:
    rows, columns = matrix.shape[-2:]
    if matrix.dtype not in (torch.float32, torch.float64):
        raise Unsupported(f"{low.operation} of {str(matrix.dtype).removeprefix('torch.')}")
    if not isinstance(rows, int) or rows != columns or not 0 < rows <= LARGEST:
        found = f"{low.operation} of matrices ({rows}, {columns})"
        raise Unsupported(f"{found}: native ones are square, up to {LARGEST} rows")
    return rows


def _flipped(low: Lowering, matrix: Expr) -> Expr:
    rank = len(matrix.shape)
    return low.view(matrix, geometry.permute((*range(rank - 2), rank - 1, rank - 2)))


# -- factors and solutions -----------------------------------------------------------------------------------


class Factors:
    """P A = L U of every matrix, as getrf gives it: lu (.., n, n), pivots (.., n) from 1, info (..)."""

    def __init__(self, low: Lowering, matrix: Expr):
        self.low, n = low, _size(low, matrix)
        found = run(low, "lu_factor", [matrix], (n,), n * n + n + 1)
        self.lu, self.raw_pivots = found.part(0, n, n), found.part(n * n, n)
        self.pivots = low.make.cast(self.raw_pivots, torch.int32)
        self.info = low.make.cast(found.part(n * n + n), torch.int32)

    def solve(self, right: Expr, left: bool = True) -> Expr:
        return lu_solve(self.low, self.lu, self.raw_pivots, right, left, False)


def lu_solve(low: Lowering, lu: Expr, pivots: Expr, right: Expr, left: bool, adjoint: bool) -> Expr:
    """A^-1 B or A^-T B (`adjoint`); not `left`: B A^-1 or B A^-T."""
    if not left:
        return _flipped(low, lu_solve(low, lu, pivots, _flipped(low, right), True, not adjoint))
    n, columns = _size(low, lu), right.shape[-1]
    pivots = low.view(pivots, geometry.unsqueeze(len(pivots.shape)))
    return run(low, "lu_solved", [lu, pivots, right], (n, int(adjoint)), n * columns).part(0, n, columns)


def triangle_solve(low: Lowering, a: Expr, right: Expr, upper: bool, left: bool = True, unit: bool = False) -> Expr:
    if not left:
        return _flipped(low, triangle_solve(low, _flipped(low, a), _flipped(low, right), not upper, True, unit))
    n, columns = _size(low, a), right.shape[-1]
    options = (n, int(upper), int(unit))
    return run(low, "triangle_solved", [a, right], options, n * columns).part(0, n, columns)


def _given(low: Lowering, node: fx.Node, count: int) -> list[Any]:
    """The first arguments of a node, which must not ask for an error."""
    if node.kwargs.get("check_errors"):
        raise Unsupported(f"{low.operation} that raises errors")
    return low.args(node)[:count]


@lowers("solved")
def _solved(low: Lowering, node: fx.Node) -> Expr:
    """The value as it is; the kernel tells where any `info` of the row is not 0."""
    value, info, operation = low.args(node)[:3]
    info = low.make.cast(low.realise(info), torch.int64)
    if info.shape:
        info = low.reduce("amax", info, len(info.shape), torch.int64)
    fine = low.copy(low.inside(info, 1, operation), "fine")
    zero = low.make.op("eq", [low.expand(fine, value.shape), low.const(0, torch.int64, value.shape)], torch.bool)
    return low.make.op("where", [zero, value, value], value.dtype)  # so that the check is not left out


@lowers("linalg_lu_factor_ex")
def _lu_factor_ex(low: Lowering, node: fx.Node) -> list[Expr]:
    if not node.kwargs.get("pivot", True):
        raise Unsupported("an LU factorisation without pivots")
    factors = Factors(low, *_given(low, node, 1))
    return [factors.lu, factors.pivots, factors.info]


@lowers("linalg_inv_ex")
def _inv_ex(low: Lowering, node: fx.Node) -> list[Expr]:
    (matrix,) = _given(low, node, 1)
    factors = Factors(low, matrix)
    return [factors.solve(_identity(low, matrix)), factors.info]


def _identity(low: Lowering, matrix: Expr) -> Expr:
    """(n, n), where rows and columns have one number."""
    n = matrix.shape[-1]
    apart = low.make.iota((n, n), (1, -1))
    zero, one = (low.const(value, matrix.dtype, (n, n)) for value in (0, 1))
    same = low.make.op("eq", [apart, low.const(0, torch.int64, (n, n))], torch.bool)
    return low.make.op("where", [same, one, zero], matrix.dtype)


@lowers("_linalg_solve_ex")
def _solve_ex(low: Lowering, node: fx.Node) -> list[Expr]:
    matrix, right = _given(low, node, 2)
    wanted = node.meta["val"]
    like = wanted[1]
    matrix = low.expand(matrix, low.sizes(like.shape))
    factors = Factors(low, matrix)
    vector = wanted[0].dim() == like.dim() - 1
    if vector:
        right = low.view(right, geometry.unsqueeze(len(right.shape)))
    found = factors.solve(right, vector or node.kwargs.get("left", True))
    if vector:
        found = low.view(found, geometry.select(len(found.shape) - 1, 0))
    return [found, factors.lu, factors.pivots, factors.info]


@lowers("linalg_lu_solve")
def _lu_solve(low: Lowering, node: fx.Node) -> Expr:
    lu, pivots, right = low.args(node)[:3]
    return lu_solve(low, lu, pivots, right, node.kwargs.get("left", True), node.kwargs.get("adjoint", False))


@lowers("linalg_solve_triangular")
def _solve_triangular(low: Lowering, node: fx.Node) -> Expr:
    a, right = low.args(node)[:2]
    how = node.kwargs
    return triangle_solve(low, a, right, how["upper"], how.get("left", True), how.get("unitriangular", False))


@lowers("triangular_solve")
def _triangular_solve(low: Lowering, node: fx.Node) -> list[Expr]:
    right, a = low.args(node)[:2]
    upper, transpose = option(low, node, 2, "upper", True), option(low, node, 3, "transpose", False)
    unit = option(low, node, 4, "unitriangular", False)
    solved = _flipped(low, a) if transpose else a
    return [triangle_solve(low, solved, right, upper != transpose, unit=unit), a]


@lowers("linalg_cholesky_ex")
def _cholesky_ex(low: Lowering, node: fx.Node) -> list[Expr]:
    (matrix,) = _given(low, node, 1)
    upper = node.kwargs.get("upper", False)
    n = _size(low, matrix)
    found = run(low, "cholesky_factor", [_flipped(low, matrix) if upper else matrix], (n,), n * n + 1)
    factor = found.part(0, n, n)
    return [_flipped(low, factor) if upper else factor, low.make.cast(found.part(n * n), torch.int32)]


@lowers("cholesky_solve")
def _cholesky_solve(low: Lowering, node: fx.Node) -> Expr:
    right, factor = low.args(node)[:2]
    return _by_cholesky(low, factor, right, option(low, node, 2, "upper", False))


@lowers("cholesky_inverse")
def _cholesky_inverse(low: Lowering, node: fx.Node) -> Expr:
    factor = low.args(node)[0]
    _size(low, factor)
    return _by_cholesky(low, factor, _identity(low, factor), option(low, node, 1, "upper", False))


def _by_cholesky(low: Lowering, factor: Expr, right: Expr, upper: bool) -> Expr:
    lower = _flipped(low, factor) if upper else factor
    return triangle_solve(low, _flipped(low, lower), triangle_solve(low, lower, right, False), True)


# -- determinants --------------------------------------------------------------------------------------------


@lowers("_linalg_det")
def _det(low: Lowering, node: fx.Node) -> list[Expr]:
    factors = _of_determinant(low, node, 1)
    diagonal = _diagonal(low, factors.lu)
    value = low.reduce("prod", diagonal, 1, diagonal.dtype)
    point = Point(low, None, value.shape, value.dtype)
    return [point.mul(value, _parity(low, factors)), factors.lu, factors.pivots]


@lowers("_linalg_slogdet")
def _slogdet(low: Lowering, node: fx.Node) -> list[Expr]:
    factors = _of_determinant(low, node, 2)
    diagonal = _diagonal(low, factors.lu)
    dtype = diagonal.dtype
    inside = Point(low, None, diagonal.shape, dtype)
    sign = low.reduce("prod", inside.op("sign", diagonal), 1, dtype)
    total = low.reduce("sum", inside.op("log", inside.op("abs", diagonal)), 1, dtype)
    point = Point(low, None, sign.shape, dtype)
    return [point.mul(sign, _parity(low, factors)), total, factors.lu, factors.pivots]


def _diagonal(low: Lowering, matrix: Expr) -> Expr:
    def change(shape: Any, strides: Any) -> Any:
        return shape[:-1], (*strides[:-2], strides[-2] + strides[-1]), 0

    return low.view(matrix, change)


def _parity(low: Lowering, factors: Factors) -> Expr:
    """-1 for an odd number of swapped rows, else 1."""
    pivots = factors.raw_pivots
    point = Point(low, None, pivots.shape, pivots.dtype)
    count = len(pivots.shape)
    stays = low.make.iota(pivots.shape, (*(0,) * (count - 1), 1), 1)
    return low.reduce("prod", point.where(point.test("eq", pivots, stays), 1, -1), 1, pivots.dtype)


def _of_determinant(low: Lowering, node: fx.Node, first: int) -> Factors:
    if any(user.args[1] >= first and (user.users or user in low.loop.kept) for user in node.users):
        # They may be those of the transpose: `factor_for_gradients` factors for those who want some.
        raise Unsupported(f"the factors that {low.operation} leaves")
    return Factors(low, low.args(node)[0])
