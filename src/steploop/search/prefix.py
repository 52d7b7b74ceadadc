"""Labels that hypotheses go on from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, describe, message
from .labels import counts


class Prefix:
    """labels (P, B), lengths (B,), ended (B,): whether a row's prefix has an end."""

    def __init__(self, labels: Any, lengths: Any, end: int | None) -> None:
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
            found = describe(labels)
            raise InputError(message("A prefix is a sequence of labels.", expected="(P, B) integers", found=found))
        self.labels = labels.to(torch.int64)
        if lengths is None:
            lengths = torch.full((labels.shape[1],), len(labels), dtype=torch.int64, device=labels.device)
        self.lengths = counts("prefix_lengths", torch.as_tensor(lengths)).to(labels.device)
        if self.lengths.shape != labels.shape[1:] or bool((self.lengths > len(labels)).any()):
            wanted = f"({labels.shape[1]},) numbers up to {len(labels)}"
            raise InputError(
                message("`prefix_lengths` do not fit the prefix.", expected=wanted, found=str(self.lengths.tolist()))
            )
        inside = torch.arange(len(labels), device=labels.device)[:, None] < self.lengths
        self.ended = torch.zeros_like(self.lengths, dtype=torch.bool)
        if end is not None:
            self.ended = (inside & (self.labels == end)).any(0)

    def read(self, first: Tensor) -> Tensor:
        """(P, B) what a model reads before it goes on: the label before the first (B,), then all but the last."""
        return torch.cat([first.unsqueeze(0), self.labels.to(first.device)])[: len(self.labels)]

    def last(self, first: Tensor) -> Tensor:
        """(B,) the label that a model goes on from."""
        if not len(self.labels):
            return first
        lengths = self.lengths.to(first.device)
        last = self.labels.to(first.device).gather(0, (lengths - 1).clamp(min=0).unsqueeze(0)).squeeze(0)
        return torch.where(lengths > 0, last, first)
