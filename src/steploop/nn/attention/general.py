"""General attention (Luong, Pham & Manning 2015, arXiv:1508.04025)."""

from __future__ import annotations

from torch import Tensor, nn

from ..masks import masked_softmax
from .base import Attention, checked_dropout
from .dot import dots


class GeneralAttention(Attention):
    """e_j = q^T W h_j, a = softmax(e) (Luong et al. 2015, eq. 7 with the score "general"), c = sum_j a_j h_j.

    query_size, memory_size: features of q and of h_j.  Module: "keys" (W); W h_j is computed once.
    Deviation: dropout of the weights.

    In Luong's decoder the query q is the state after this step. See `Attention` for the call.
    """

    def __init__(self, query_size: int, memory_size: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.query_size, self.memory_size = query_size, memory_size
        self.keys = nn.Linear(memory_size, query_size, bias=False)
        self.dropout = checked_dropout("GeneralAttention", dropout)

    def attend(self, query: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        return masked_softmax(dots(query, self.keys(memory)), mask, -1)
