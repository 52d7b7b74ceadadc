"""What every attention has in common: a query looks at a memory, and gets a context and the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError, describe, message
from ...step import Step
from ..masks import length_mask


class Attention(Step):
    """One look at a memory: weights a_j for its entries h_j, and the context c = sum_j a_j h_j.

        context, weights = self.attention(query, memory=memory, memory_lengths=lengths)     # inside a step
        (contexts, weights), state = attention(queries, memory=memory)                      # a whole sequence

    query:          (B, query_size), the state of a decoder in most models.
    memory:         (B, S, memory_size), the outputs of an encoder, the same at every step. An encoder's Loop gives
                    (S, B, ...): `.transpose(0, 1)`, or batch_first=True.
    memory_lengths: (B,) integers, right padding of the memory.  memory_mask: (B, S) bool, True = valid, holes
                    anywhere. Both: AND. What stands in the memory elsewhere, NaN too, is never read; its weight is
                    zero, and so is its gradient.
    context:        (B, memory_size).  weights: (B, S).  A row whose memory has no valid entry gets zeros for both.

    Whatever depends on the memory alone (its mask, its projection to keys) is computed once per call, since no
    state is in it: it leaves the loop by itself.

    To write one: a subclass that defines `attend(query, memory, mask) -> weights`. One whose weights depend on
    earlier weights keeps them in a State: `sl.State(...)`, read by `self.before.sized(memory.shape[1], like=query)`,
    since its size is that of the memory.

    Raises InputError for arguments of other shapes.
    """

    dropout: float = 0.0  # of the weights, where a subclass has it

    def step(
        self,
        query: Tensor,
        *,
        memory: Tensor,
        memory_lengths: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        check_query_and_memory(self, query, memory)
        memory, mask = valid_memory(memory, memory_lengths, memory_mask)
        weights = self.attend(query, memory, mask)
        return self._context(self._dropped(weights), memory, mask), weights

    def attend(self, query: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """The weights (B, S), zero where `mask` (B, S) is False.

        memory has zeros there; mask None: all entries are valid.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define attend(query, memory, mask)")

    def _context(self, weights: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """What the weights (after dropout) make of the memory, (B, memory_size)."""
        return weighted_sum(weights, memory)

    def _dropped(self, weights: Tensor) -> Tensor:
        return F.dropout(weights, self.dropout) if self.training and self.dropout > 0 else weights


def valid_memory(memory: Tensor, lengths: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(memory with zeros where an entry is not valid, (B, S) bool or None)."""
    if mask is not None:
        _check_mask(mask, memory)
    if lengths is not None:
        _check_lengths(lengths, memory)
        within = length_mask(lengths, memory.shape[1])
        mask = within if mask is None else mask & within
    return memory if mask is None else torch.where(mask.unsqueeze(-1), memory, 0.0), mask


def weighted_sum(weights: Tensor, memory: Tensor) -> Tensor:
    """sum_j weights[:, j] memory[:, j]: (B, S), (B, S, D) -> (B, D)."""
    return torch.bmm(weights.unsqueeze(1), memory).squeeze(1)


def checked_dropout(owner: str, p: float) -> float:
    """`p`; ValueError unless it is a probability."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{owner}: dropout is a probability in [0, 1], got {p}")
    return p


def check_query_and_memory(attention: Any, query: Any, memory: Any) -> None:
    """InputError unless the query is (B, query_size) and the memory (B, S, memory_size), sizes as the attention's."""
    owner = type(attention).__name__
    for name, value, size, axes in (
        ("query", query, attention.query_size, ("B",)),
        ("memory", memory, attention.memory_size, ("B", "S")),
    ):
        fits = isinstance(value, Tensor) and value.is_floating_point() and value.dim() == len(axes) + 1
        if not fits or value.shape[-1] != size:
            raise InputError(
                message(
                    f"{owner}: the {name} is not what one step takes.",
                    expected=f"({', '.join(axes)}, {size}), floating",
                    found=describe(value),
                    fix=f"{owner} was made for {name}s of {size} features"
                    if isinstance(value, Tensor) and value.dim() == len(axes) + 1
                    else "a memory has B first: memory=encoded.transpose(0, 1) where it comes from a Loop",
                )
            )


def _check_mask(mask: Any, memory: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != memory.shape[:2]:
        raise InputError(
            message(
                "`memory_mask` has one entry for each entry of the memory, True = valid.",
                expected=f"({memory.shape[0]}, {memory.shape[1]}) bool",
                found=describe(mask),
                fix="memory_mask.bool(), (B, S)",
            )
        )


def _check_lengths(lengths: Any, memory: Tensor) -> None:
    is_count = isinstance(lengths, Tensor) and not (
        lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool
    )
    if not is_count or lengths.dim() != 1 or lengths.shape[0] != memory.shape[0]:
        raise InputError(
            message(
                "`memory_lengths` has one number of valid entries per row.",
                expected=f"({memory.shape[0]},) int64",
                found=describe(lengths),
                fix="memory_mask= for a (B, S) bool mask",
            )
        )
