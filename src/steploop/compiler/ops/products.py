"""Products of matrices, convolutions, and linear algebra on the last two axes."""

from __future__ import annotations

import sympy
from torch import Tensor, fx

from ..ir.graph import shape_of
from .rules import CONTRACTED, Axis, Mixed, first_axis, leading, tensor_inputs
from .table import add


def _mm(node: fx.Node, batch: sympy.Symbol) -> Axis:
    a, b = node.args[0].meta["rows"], node.args[1].meta["rows"]
    if a is not None and b is not None:
        if a.dim == 1 and b.dim == 0 and (a.outer, a.inner) == (b.outer, b.inner):
            return CONTRACTED
        raise Mixed("multiplies every row with every other")
    if a is not None:
        if a.dim != 0:
            raise Mixed("multiplies across the rows of the batch")
        return a
    if b.dim != 1:
        raise Mixed("multiplies across the rows of the batch")
    return b


def _addmm(node: fx.Node, batch: sympy.Symbol) -> Axis:
    bias, a, b = (n.meta["rows"] for n in node.args[:3])
    if b is None and a is not None and a.dim == 0:
        if bias is None or (bias == a and len(shape_of(node.args[0])) == 2):
            return a
    raise Mixed("multiplies across the rows of the batch")


def _bmm(node: fx.Node, batch: sympy.Symbol) -> Axis:
    a, b = node.args[0].meta["rows"], node.args[1].meta["rows"]
    if a is not None and b is not None:
        if a.dim == b.dim == 0 and a == b:
            return a
        if a.dim == 2 and b.dim == 1 and (a.outer, a.inner) == (b.outer, b.inner):
            return CONTRACTED
        raise Mixed("multiplies every row with every other")
    rows, kept = (a, 1) if a is not None else (b, 2)
    if rows.dim != kept:
        raise Mixed("multiplies across the rows of the batch")
    return rows


def _matvec(node: fx.Node, batch: sympy.Symbol) -> Axis:
    a, b = node.args[0].meta["rows"], node.args[1].meta["rows"]
    if a is not None and b is not None and a.dim == 1 and b.dim == 0:
        return CONTRACTED
    if b is None and a.dim == 0:
        return a
    raise Mixed("multiplies across the rows of the batch")


def _linalg(node: fx.Node, batch: sympy.Symbol) -> Axis | tuple[Axis, ...]:
    """Operations on the last two axes: a matrix of every row. Beside one there may be vectors (pivots, right sides)."""
    operands = [n for n in tensor_inputs(node) if n.meta["rows"] is not None]
    rows = {n.meta["rows"] for n in operands}
    ranks = [len(shape_of(n)) for n in operands]
    if len(rows) != 1 or max(ranks) < 3 or min(ranks) < 2:
        raise Mixed("works across the rows of the batch")
    found = rows.pop()
    if found.dim != 0:
        raise Mixed("works across the rows of the batch")
    value = node.meta["val"]
    return found if isinstance(value, Tensor) else tuple(leading(found, v, batch) for v in value)


# -- the rows of the table -----------------------------------------------------------------------------------

add("mm", rows=_mm, linear=((0,), (1,)))
add("bmm", rows=_bmm, linear=((0,), (1,)))
add("mv", rows=_matvec, linear=((0,), (1,)))
add("addmm", rows=_addmm, linear=((0, 1), (0, 2)))
add("triu tril", rows=_linalg, linear=((0,),))
add("linalg_inv_ex linalg_cholesky_ex linalg_solve_triangular _linalg_solve_ex linalg_lu_factor_ex", rows=_linalg)
add("linalg_lu_solve _linalg_slogdet _linalg_det linalg_lu linalg_qr _linalg_eigh _linalg_svd", rows=_linalg)
add("linalg_matrix_exp cholesky_solve triangular_solve linalg_lu_factor", rows=_linalg)
add("_cdist_forward _euclidean_dist", rows=first_axis(least=3))
