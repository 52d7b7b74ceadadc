"""Dot-product attention (Luong, Pham & Manning 2015, arXiv:1508.04025), plain and scaled (Vaswani et al. 2017)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..masks import masked_softmax
from .base import Attention, checked_dropout


class DotAttention(Attention):
    """e_j = q^T h_j, a = softmax(e) (Luong et al. 2015, eq. 7 with the score "dot"), c = sum_j a_j h_j.

    size: features of q and of h_j alike.
    scaled: e_j = q^T h_j / sqrt(size) (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).
    Deviation: dropout of the weights, which Vaswani et al. have and Luong et al. have not.

    In Luong's decoder the query q is the state after this step. See `Attention` for the call.
    """

    def __init__(self, size: int, *, scaled: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.query_size = self.memory_size = size
        self.scaled = scaled
        self.dropout = checked_dropout("DotAttention", dropout)

    def attend(self, query: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        if self.scaled:
            query = query / math.sqrt(self.query_size)
        return masked_softmax(dots(query, memory), mask, -1)

    def extra_repr(self) -> str:
        return f"{self.query_size}, scaled={self.scaled}"


def dots(query: Tensor, keys: Tensor) -> Tensor:
    """q^T k_j for every j: (B, K), (B, S, K) -> (B, S)."""
    return torch.bmm(keys, query.unsqueeze(-1)).squeeze(-1)
