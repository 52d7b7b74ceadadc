"""Operations that make values of sizes and numbers alone, and random ones."""

from __future__ import annotations

import sympy
from torch import fx

from ..ir.graph import shape_of
from .rules import Axis, first_axis, has, made_up, pointwise
from .table import add


def _like(node: fx.Node, batch: sympy.Symbol) -> Axis:
    """zeros_like, new_zeros(sizes), bernoulli, ...: the batch axis is where the sizes have it."""
    dims = [d for d, s in enumerate(shape_of(node)) if has(s, batch)]
    if not dims:
        return None
    rows = node.args[0].meta["rows"]
    if rows is not None and rows.dim == dims[0] and shape_of(node)[dims[0]] == shape_of(node.args[0])[dims[0]]:
        return rows
    return made_up(node, batch)


# -- the rows of the table -----------------------------------------------------------------------------------

add("zeros ones full", sizes=(0,), factory=True)
add("scalar_tensor eye", factory=True)
add("arange", sizes=(0, 1, 2), factory=True)
add("zeros_like ones_like full_like", rows=_like, factory=True)
add("new_zeros new_ones new_full", rows=_like, sizes=(1,), factory=True)

# What lies in new memory is not the same twice: those are no factories.
add("empty", sizes=(0,))
add("empty_strided", sizes=(0, 1))
add("empty_like", rows=_like)
add("new_empty", rows=_like, sizes=(1,))
add("new_empty_strided", rows=_like, sizes=(1, 2))

add("rand randn", sizes=(0,))
add("randint", sizes=(1, 2))
add("rand_like randn_like randint_like", rows=_like)
add("bernoulli bernoulli_p uniform normal_functional exponential geometric cauchy log_normal random", rows=_like)
add("native_dropout rrelu_with_noise_functional", rows=pointwise)
add("normal poisson binomial _standard_gamma", rows=pointwise)
add("_standard_gamma_grad _dirichlet_grad", rows=pointwise)
add("multinomial", rows=first_axis())
