"""Builds expressions: equal ones become one object, views are pushed down to the loads.

Sharing equal objects is what makes common subexpressions of a fused nest be computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, overload

import torch

from . import geometry
from .geometry import View
from .language import Const, Dim, Expr, Iota, Load, Op, contiguous, same

FLOATS = (torch.float32, torch.float64)


_E = TypeVar("_E", bound=Expr)


class Expressions:
    def __init__(self) -> None:
        self._made: dict[tuple[Hashable, ...], Any] = {}
        self.names: dict[int, str] = {}  # id of an expression -> the user's name for it

    def _share(self, key: tuple[Hashable, ...], make: Callable[[], _E]) -> _E:
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = make()
        return found

    def const(self, value: Any, shape: tuple[Dim, ...], dtype: torch.dtype) -> Const:
        if isinstance(value, (bool, int, float)):
            value = _as(value, dtype)
        return self._share(("const", repr(value), shape, dtype), lambda: Const(value, shape, dtype))

    def load(self, like: Load) -> Load:
        strides = tuple(0 if same(n, 1) else s for n, s in zip(like.shape, like.strides))
        like = Load(like.buffer, like.shape, strides, like.offset, like.at)
        at = tuple((id(e), s) for e, s in like.at)
        key = ("load", id(like.buffer), like.shape, like.strides, like.offset, at)
        return self._share(key, lambda: like)

    def iota(self, shape: tuple[Dim, ...], strides: tuple[Dim, ...], offset: Dim = 0) -> Iota:
        return self._share(("iota", shape, strides, offset), lambda: Iota(shape, strides, offset))

    def op(self, name: str, args: list[Expr], dtype: torch.dtype) -> Expr:
        """All arguments have the same shape."""
        key = (name, tuple(map(id, args)), dtype)
        return self._share(key, lambda: Op(name, tuple(args), args[0].shape, dtype))

    def cast(self, expr: Expr, dtype: torch.dtype) -> Expr:
        if expr.dtype == dtype:
            return expr
        if isinstance(expr, Const) and isinstance(expr.value, (bool, int, float)):
            return self.const(expr.value, expr.shape, dtype)
        return self.op("cast", [expr], dtype)

    @overload
    def view(self, expr: Load, change: View, memo: dict[int, Expr] | None = None) -> Load: ...

    @overload
    def view(self, expr: Expr, change: View, memo: dict[int, Expr] | None = None) -> Expr: ...

    def view(self, expr: Expr, change: View, memo: dict[int, Expr] | None = None) -> Expr:
        """`change` applied to every load of an expression."""
        memo = {} if memo is None else memo
        found = memo.get(id(expr))
        if found is None:
            found = memo[id(expr)] = self._view(expr, change, memo)
            if id(expr) in self.names:
                self.names.setdefault(id(found), self.names[id(expr)])
        return found

    def _view(self, expr: Expr, change: View, memo: dict[int, Expr]) -> Expr:
        if isinstance(expr, Op):
            return self.op(expr.name, [self.view(a, change, memo) for a in expr.args], expr.dtype)
        if isinstance(expr, Const):
            shape, _, _ = change(expr.shape, (0,) * len(expr.shape))
            return self.const(expr.value, shape, expr.dtype)
        shape, strides, delta = change(expr.shape, expr.strides)
        if isinstance(expr, Iota):
            return self.iota(shape, strides, expr.offset + delta)
        at = tuple((self.view(e, change, memo), s) for e, s in expr.at)
        return self.load(Load(expr.buffer, shape, strides, expr.offset + delta, at))

    def expand(self, expr: Expr, shape: tuple[Dim, ...]) -> Expr:
        if same_shape(expr.shape, shape):
            return expr
        return self.view(expr, geometry.expand(shape))


def same_shape(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def is_contiguous(load: Load) -> bool:
    wanted = contiguous(load.shape)
    return all(same(n, 1) or same(s, w) for n, s, w in zip(load.shape, load.strides, wanted))


def _as(value: bool | int | float, dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return bool(value)
    if dtype.is_floating_point:
        return float(value)
    return int(value)
