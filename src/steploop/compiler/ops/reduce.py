"""Operations along axes: sums and other reductions, running sums, sorting."""

from __future__ import annotations

from .rules import along, reduction
from .table import add

add("sum", rows=reduction(linear=True), row_pass=True, linear=((0,),))
add("mean", rows=reduction(linear=False), row_pass=True, linear=((0,),))
add("amax amin", rows=reduction(linear=False), row_pass=True)
add("any all argmax argmin", rows=reduction(linear=False), selects=True)
add("nansum logsumexp prod", rows=reduction(linear=False))
add("var", rows=reduction(False, 1, 99), row_pass=True)
add("std", rows=reduction(False, 1, 99))
add("var_mean", rows=reduction(False, 1, 99, 2))
add("norm linalg_vector_norm", rows=reduction(False, 2, 3))
add("max min median mode", rows=reduction(False, 1, 2, 2))
add("aminmax", rows=reduction(False, 99, 99, 2))  # (its axis stands by name alone)
add("kthvalue", rows=reduction(False, 2, 3, 2))
add("cumsum", rows=along(), linear=((0,),))
add("cumprod logcumsumexp", rows=along())
add("cummax cummin", rows=along(results=2))
add("sort", rows=along(1, "dim", 2, -1))
add("topk", rows=along(2, "dim", 2, -1))
add("linalg_cross", rows=along(2, default=-1))
