"""Attention by a mixture of Gaussians over positions (Graves 2013, arXiv:1308.0850)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...state import State
from .base import Attention


class GaussianMixtureAttention(Attention):
    """A window that moves forward over the memory; what stands in the memory does not move it:

        a_u = sum_k alpha^k exp(-beta^k (kappa^k - u)^2), u = 1, 2, ... (eq. 46),  c = sum_u a_u h_u (eq. 47),
        alpha = exp(alpha^), beta = exp(beta^), kappa = kappa' + exp(kappa^), (alpha^, beta^, kappa^) = W q + b
        (eq. 48 to 51)

    kappa' is the kappa of the step before, 0 before the first (Graves 2013, section 5.1). The weights do not add up
    to 1. No deviations; u counts all entries, valid or not.

    query_size, memory_size: features of q and of each h_u.  components: how many k.
    Module: "window" (W, b), rows in the order alpha^, beta^, kappa^.

    State: `kappa` (B, components). See `Attention` for the call.
    """

    def __init__(self, query_size: int, memory_size: int, components: int = 10) -> None:
        super().__init__()
        self.query_size, self.memory_size = query_size, memory_size
        self.window = nn.Linear(query_size, 3 * components)
        self.kappa = State(components)

    def attend(self, query: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        alpha, beta, step = self.window(query).exp().unsqueeze(-1).chunk(3, 1)  # (B, K, 1)
        kappa = self.kappa.prev.unsqueeze(-1) + step
        self.kappa.next = kappa.squeeze(-1)
        position = torch.arange(1, memory.shape[1] + 1, device=query.device)
        weights = (alpha * torch.exp(-beta * (kappa - position) ** 2)).sum(1)
        return weights if mask is None else torch.where(mask, weights, 0.0)

    def extra_repr(self) -> str:
        return f"components={self.kappa.shape[0]}"
