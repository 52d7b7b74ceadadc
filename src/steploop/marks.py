"""Bool marks of rows and steps: valid, reset, ended. How they meet values, and what a row had last."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(mark: Tensor, value: Tensor) -> Tensor:
    """`mark` with axes of size 1 behind it, to be broadcast with `value`."""
    return mark.reshape(*mark.shape, *[1] * (value.dim() - mark.dim()))


def valid_at(steps: int, lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """(T, B) bool on the CPU, True where a step is valid; None where all are."""
    valid = None if mask is None else mask.detach().cpu()
    if lengths is not None:
        within = torch.arange(steps, device="cpu")[:, None] < lengths.detach().cpu()[None, :]
        valid = within if valid is None else valid & within
    return valid


def latest(valid: Tensor, reverse: bool = False) -> Tensor:
    """(T, B) for each step the time of the row's last valid step so far in running order; -1 where there is none."""
    if not len(valid):
        return torch.zeros_like(valid, dtype=torch.int64)
    time = torch.arange(valid.shape[0], device=valid.device)[:, None].expand_as(valid)
    if not reverse:
        return torch.cummax(torch.where(valid, time, -1), 0).values
    found = torch.cummin(torch.where(valid, time, len(valid)).flip(0), 0).values.flip(0)
    return torch.where(found == len(valid), -1, found)


def at_steps(x: Tensor, source: Tensor) -> Tensor:
    """x (T, B, ...) read at the times `source` (T, B), each row its own."""
    return x.gather(0, wide(source, x).expand(x.shape))


def repeated(y: Tensor, source: Tensor) -> Tensor:
    """y (T, B, ...) at the times `source` (T, B), zeros where one is -1."""
    return torch.where(wide(source >= 0, y), at_steps(y, source.clamp(min=0)), torch.zeros_like(y))
