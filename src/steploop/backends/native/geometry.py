"""Views as arithmetic on (shape, strides): each function gives the shape, strides and added offset of a view.

Every view of ATen that keeps addresses affine is one function here; `expressions.py` pushes them through
pointwise operations down to the loads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy
from torch import Tensor

from .language import Dim, product, same

Shape = tuple[Dim, ...]
View = Callable[[Shape, Shape], tuple[Shape, Shape, Dim]]


class NotAffine(Exception):
    """The view has no strides; the value must be copied first."""


def permute(order: Sequence[int]) -> View:
    def view(shape: Shape, strides: Shape) -> tuple[Shape, Shape, Dim]:
        return tuple(shape[d] for d in order), tuple(strides[d] for d in order), 0

    return view


def expand(target: Shape) -> View:
    def view(shape: Shape, strides: Shape) -> tuple[Shape, Shape, Dim]:
        missing = len(target) - len(shape)
        wide = [0] * missing
        for size, stride, wanted in zip(shape, strides, target[missing:]):
            wide.append(stride if same(size, wanted) else 0)
        return tuple(target), tuple(wide), 0

    return view


def narrow(dim: int, start: Dim, size: Dim, step: int = 1) -> View:
    def view(shape: Shape, strides: Shape) -> tuple[Shape, Shape, Dim]:
        stride = strides[dim]
        return _at(shape, dim, size), _at(strides, dim, stride * step), start * stride

    return view


def select(dim: int, index: Dim) -> View:
    def view(shape: Shape, strides: Shape) -> tuple[Shape, Shape, Dim]:
        return shape[:dim] + shape[dim + 1 :], strides[:dim] + strides[dim + 1 :], index * strides[dim]

    return view


def unsqueeze(dim: int) -> View:
    def view(shape: Shape, strides: Shape) -> tuple[Shape, Shape, Dim]:
        return (*shape[:dim], 1, *shape[dim:]), (*strides[:dim], 0, *strides[dim:]), 0

    return view


def flip(dim: int) -> View:
    def view(shape: Shape, strides: Shape) -> tuple[Shape, Shape, Dim]:
        stride = strides[dim]
        return shape, _at(strides, dim, -stride), (shape[dim] - 1) * stride

    return view


def reshape(target: Shape) -> View:
    def view(shape: Shape, strides: Shape) -> tuple[Shape, Shape, Dim]:
        return tuple(target), reshaped_strides(shape, strides, target), 0

    return view


def reshaped_strides(shape: Shape, strides: Shape, target: Shape) -> Shape:
    """Strides of a reshaped array; NotAffine where axes must merge that are not one after the other."""
    if any(same(n, 0) for n in (*shape, *target)):
        return (0,) * len(target)  # there is nothing to find
    old = [(n, s) for n, s in zip(shape, strides) if not same(n, 1)]
    new = [n for n in target if not same(n, 1)]
    found: list[Dim] = []
    while old or new:
        group, sizes = [old.pop(0)] if old else [], [new.pop(0)] if new else []
        while not same(left := product([n for n, _ in group]), right := product(sizes)):
            if _smaller(left, right) and old:
                group.append(old.pop(0))
            elif new:
                sizes.append(new.pop(0))
            else:
                raise NotAffine
        for (_, outer), (size, inner) in zip(group, group[1:]):
            if not same(outer, inner * size):
                raise NotAffine
        stride = group[-1][1] if group else 0
        split: list[Dim] = []
        for size in reversed(sizes):
            split.append(stride)
            stride = stride * size
        found += reversed(split)
    rest = iter(found)
    return tuple(0 if same(n, 1) else next(rest) for n in target)


def memory_order(value: Tensor) -> tuple[int, ...] | None:
    """The order of the axes in memory where that is not the usual one: a transposed weight stays as it is."""
    strides = value.stride()
    if not all(isinstance(n, int) for n in (*value.shape, *strides)) or 0 in strides:
        return None
    order = tuple(sorted(range(value.dim()), key=lambda d: -strides[d]))
    return None if order == tuple(range(value.dim())) else order


def _smaller(a: Dim, b: Dim) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    return sympy.denom(sympy.cancel(sympy.sympify(b) / a)) == 1


def _at(values: Shape, dim: int, value: Dim) -> Shape:
    return values[:dim] + (value,) + values[dim + 1 :]
