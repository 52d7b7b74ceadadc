"""The conditions on sizes and numbers under which a captured graph holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.printers import PythonPrinter

from .free_numbers import FUNCTIONS


def conditions_of(env: ShapeEnv, known: set[sympy.Symbol]) -> list[sympy.Expr]:
    """The conditions on known symbols that a trace relied on."""
    guards = [g.expr for g in env.guards]
    return [g for g in guards if g not in (True, sympy.true) and g.free_symbols <= known]


def condition(
    conditions: list[sympy.Expr], floats: Mapping[sympy.Symbol, str] = MappingProxyType({})
) -> Callable[..., bool]:
    """Conditions as one function of {symbol name: size} and of {path of a float: its value}."""
    texts = [PythonPrinter().doprint(g) for g in conditions]
    if not texts:
        return lambda sizes, values=None: True
    code = compile(" and ".join(f"({t})" for t in texts), "<conditions>", "eval")
    names = {str(s): path for s, path in floats.items()}
    return lambda sizes, values=None: bool(
        eval(code, FUNCTIONS, {**sizes, **{n: values[p] for n, p in names.items()}})
    )
