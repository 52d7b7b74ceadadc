"""Masks over inner axes, such as the S of a memory (B, S, D): `length_mask` makes one, `masked_softmax`,
`masked_sum`, `masked_mean` and `masked_max` look at the marked entries only. For use inside a step and outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, describe, message


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """(B, S) bool, True at the first `lengths` entries of each row: the mask of a right-padded axis.

    lengths: (B,) integers, or of any other shape: (...) gives (..., size).  size: S, as in `memory.shape[1]`.
    A length above `size` counts as `size`, one below 0 as 0.

    Raises InputError for lengths that are no integers.
    """
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise InputError(
            message(
                "length_mask takes lengths as integers.",
                expected="(B,) int64",
                found=describe(lengths),
                fix="lengths.long()",
            )
        )
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(-1)


def masked_softmax(x: Tensor, mask: Tensor | None, dim: int = -1) -> Tensor:
    """softmax over the entries of `dim` that `mask` marks; zeros at the others, and in a row without any.

    What stands at an entry that is not marked, NaN and infinity too, reaches neither the result nor a gradient.

    x:    floating.
    mask: bool, True = counts; None: all do. It has the axes of x, of the same sizes or 1; or only the first axes
          of x, `dim` among them: (B, S) for x (B, S) or for x (B, S, D) with dim=1.

    Returns a tensor like x. Raises InputError for a mask that does not fit.
    """
    if mask is None:
        return torch.softmax(x, dim)
    mask = _fitted("masked_softmax", x, mask, dim)
    # 0 where no entry counts: the softmax of nothing but -inf is NaN.
    left_out = torch.where(mask.any(dim, keepdim=True), float("-inf"), 0.0).to(x.dtype)
    return torch.where(mask, torch.softmax(torch.where(mask, x, left_out), dim), 0.0)


def masked_sum(x: Tensor, mask: Tensor | None, dim: int | tuple[int, ...] = -1, keepdim: bool = False) -> Tensor:
    """The sum over the entries of `dim` that `mask` marks; 0 where there are none. Arguments as `masked_softmax`.

    dim: one axis or several.
    """
    if mask is None:
        return x.sum(dim, keepdim=keepdim)
    mask = _fitted("masked_sum", x, mask, dim)
    return torch.where(mask, x, 0).sum(dim, keepdim=keepdim)


def masked_mean(x: Tensor, mask: Tensor | None, dim: int | tuple[int, ...] = -1, keepdim: bool = False) -> Tensor:
    """The mean over the entries of `dim` that `mask` marks; 0 where there are none. Arguments as `masked_sum`."""
    if mask is None:
        return x.mean(dim, keepdim=keepdim)
    mask = _fitted("masked_mean", x, mask, dim)
    count = torch.broadcast_to(mask, x.shape).sum(dim, keepdim=keepdim)
    return torch.where(mask, x, 0).sum(dim, keepdim=keepdim) / count.clamp(min=1)


def masked_max(
    x: Tensor,
    mask: Tensor | None,
    dim: int | tuple[int, ...] = -1,
    keepdim: bool = False,
    empty: float = 0.0,
) -> Tensor:
    """The largest entry of `dim` that `mask` marks; `empty` where there are none. Arguments as `masked_sum`.

    Entries that are equally large share the gradient, as in `torch.amax`.
    """
    if mask is None:
        mask = torch.ones((), dtype=torch.bool, device=x.device).expand(x.shape)
    mask = torch.broadcast_to(_fitted("masked_max", x, mask, dim), x.shape)
    some = mask.any(dim, keepdim=True)
    if any(x.shape[axis] == 0 for axis in _axes(dim)):  # torch has no largest entry of none
        largest = torch.zeros_like(some, dtype=x.dtype)
    else:
        lowest = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
        largest = torch.where(mask, x, lowest).amax(dim, keepdim=True)
    largest = largest.masked_fill(~some, empty)
    return largest if keepdim else largest.squeeze(dim)


def _axes(dim: int | tuple[int, ...]) -> tuple[int, ...]:
    return (dim,) if isinstance(dim, int) else tuple(dim)


def _fitted(owner: str, x: Tensor, mask: Any, dim: int | tuple[int, ...]) -> Tensor:
    """`mask` with as many axes as x has."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise InputError(
            message(
                f"{owner}: the mask is boolean, True = the entry counts.",
                expected="a bool tensor, such as sl.length_mask(lengths, x.shape[1])",
                found=describe(mask),
                fix="mask.bool()" if isinstance(mask, Tensor) else None,
            )
        )
    axes = [axis % x.dim() for axis in _axes(dim)]
    short = mask.dim() < x.dim()
    # A short mask has x's first axes. A size 1 would leave open which axis was meant, so they are equal there.
    fits = mask.dim() <= x.dim() and all(
        m == n or (m == 1 and not short) for m, n in zip(mask.shape, x.shape, strict=False)
    )
    if not fits or (short and any(axis >= mask.dim() for axis in axes)):
        raise InputError(
            message(
                f"{owner}: the mask does not fit x.",
                expected=f"the axes of x, {tuple(x.shape)}, each of the same size or 1; or its first ones, "
                f"with dim={dim} among them",
                found=describe(mask),
                fix="mask[:, None] puts an axis of size 1 between B and S",
            )
        )
    return mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim())) if short else mask
