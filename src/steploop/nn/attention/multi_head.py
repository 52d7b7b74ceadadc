"""Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...errors import InputError, message
from ..masks import masked_softmax
from .base import Attention, checked_dropout


class MultiHeadAttention(Attention):
    """Several scaled dot products side by side: c = W_O [c^1; ...; c^heads] + b_O, for each head

        a = softmax_j(q^T k_j / sqrt(d)) (eq. 1), c^i = sum_j a_j v_j,
        q = W_Q query + b_Q, k_j = W_K h_j, v_j = W_V h_j + b_V, each cut into `heads` parts of d = size / heads

    (Vaswani et al. 2017, section 3.2.2; dropout of the weights as in their code). torch.nn.MultiheadAttention gives
    the same; it has a b_K as well, which adds the same to all scores of a query, and so changes nothing.

    size: of all heads together, a multiple of `heads`.  output_size: features of the context; default: size.
    bias: b_Q, b_V and b_O, which the paper has not.  Modules: "query", "keys", "values", "out".

    Returns a context (B, output_size) and weights (B, heads, S), before dropout. A row whose memory has no valid
    entry gets zeros, not b_O. See `Attention` for the call.
    Raises InputError where heads does not divide size.
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        heads: int,
        size: int,
        *,
        output_size: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if heads < 1 or size % heads:
            raise InputError(
                message(
                    "MultiHeadAttention: heads divides size.",
                    expected=f"a size that is a multiple of heads={heads}",
                    found=f"size={size}",
                )
            )
        self.query_size, self.memory_size, self.heads = query_size, memory_size, heads
        self.query = nn.Linear(query_size, size, bias)
        self.keys = nn.Linear(memory_size, size, bias=False)
        self.values = nn.Linear(memory_size, size, bias)
        self.out = nn.Linear(size, size if output_size is None else output_size, bias)
        self.dropout = checked_dropout("MultiHeadAttention", dropout)

    def attend(self, query: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """(B, heads, S)."""
        q = self._heads(self.query(query))
        keys = self._heads(self.keys(memory)).transpose(1, 2)
        scores = torch.matmul(keys, q.unsqueeze(-1)).squeeze(-1) / math.sqrt(q.shape[-1])
        return masked_softmax(scores, None if mask is None else mask.unsqueeze(1), -1)

    def _context(self, weights: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """(B, output_size)."""
        values = self._heads(self.values(memory)).transpose(1, 2)  # (B, heads, S, d)
        context = self.out(torch.matmul(weights.unsqueeze(2), values).flatten(1))
        return context if mask is None else torch.where(mask.any(1, keepdim=True), context, 0.0)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def extra_repr(self) -> str:
        return f"heads={self.heads}"
