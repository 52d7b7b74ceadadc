"""Additive attention (Bahdanau, Cho & Bengio 2015, arXiv:1409.0473)."""

from __future__ import annotations

from torch import Tensor, nn

from ..masks import masked_softmax
from .base import Attention, checked_dropout


class AdditiveAttention(Attention):
    """e_j = v^T tanh(W q + U h_j + b), a = softmax(e) (eq. 6), c = sum_j a_j h_j (eq. 5).

    Bahdanau et al. 2015; the energy e is the one of their appendix A.1.2. In their decoder the query q is the
    state before this step: `self.attention(self.cell.h.prev, memory=...)`.
    Deviations: b, which the paper has not (bias=False leaves it out); dropout of the weights.

    query_size, memory_size: features of q and of each h_j.  size: of v, rows of W and U.
    Modules: "query" (W), "keys" (U and b), "energy" (v).

    See `Attention` for the call.
    """

    def __init__(
        self, query_size: int, memory_size: int, size: int, *, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.query_size, self.memory_size = query_size, memory_size
        self.query = nn.Linear(query_size, size, bias=False)
        self.keys = nn.Linear(memory_size, size, bias=bias)
        self.energy = nn.Linear(size, 1, bias=False)
        self.dropout = checked_dropout("AdditiveAttention", dropout)

    def attend(self, query: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        hidden = (self.keys(memory) + self.query(query).unsqueeze(1)).tanh()
        return masked_softmax(self.energy(hidden).squeeze(-1), mask, -1)
