"""Dropout: a fresh mask at every step, or one per sequence (Gal & Ghahramani 2016)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..state import State
from ..step import Step


class Dropout(Step):
    """In training each entry of x is zero with probability p, else x / (1 - p).  In eval mode x itself.

    same_mask_every_step=False: a fresh mask at every step, as torch.nn.Dropout draws over a whole sequence
      (Srivastava et al. 2014; between layers: Zaremba et al. 2014).
    same_mask_every_step=True: one mask per row and sequence ("variational", Gal & Ghahramani 2016,
      arXiv:1512.05287), for x of any feature shape.  The state `seed` (B, 1) int64 holds the row's random
      seed, 0 before the row's first valid step in training; the mask is a hash of seed and feature index.  So
      a returned state carries the mask on to the next chunk of the sequence, and a reset starts a new mask.
      Deviation from the paper: none in distribution; the bits are a hash's instead of the generator's.

    x: (B, ...) floating.  Seeds come from torch's generator.  Raises ValueError for p outside [0, 1].
    """

    def __init__(self, p: float = 0.5, same_mask_every_step: bool = False):
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"Dropout: p is a probability in [0, 1], got {p}")
        self.p = p
        self.same_mask_every_step = same_mask_every_step
        if same_mask_every_step:
            self.seed = State(1, init=0, dtype=torch.int64)

    def step(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if not self.same_mask_every_step:
            return F.dropout(x, self.p)
        seed = self._sequence_seed()
        keep = hashed_mask(seed, x.shape[1:], 1.0 - self.p)
        scale = 1.0 / (1.0 - self.p) if self.p < 1.0 else 0.0
        return torch.where(keep, x * scale, 0.0)

    def _sequence_seed(self) -> Tensor:
        """The row's seed, drawn now where the row has none yet: so a reset draws a new one."""
        seed = self.seed.prev
        seed = torch.where(seed == 0, torch.randint(1, 2**62, seed.shape, device=seed.device), seed)
        self.seed.next = seed
        return seed

    def extra_repr(self) -> str:
        return f"p={self.p}" + (", same_mask_every_step=True" if self.same_mask_every_step else "")


def hashed_mask(seed: Tensor, shape: tuple[int, ...], keep: float) -> Tensor:
    """(B, *shape) bool, True with probability `keep` (to 2**-32): a hash of seed (B, 1) and position."""
    position = torch.arange(math.prod(shape), device=seed.device)
    low, high = seed & 0x7FFFFFFF, seed >> 31
    bits = _hash32(_hash32(_hash32(position) ^ low) ^ high)
    kept = bits < round(keep * 2**32)
    return kept.unflatten(-1, shape) if shape else kept.squeeze(-1)


def hashed_keep(seed: Tensor, position: Tensor, keep: float) -> Tensor:
    """bool, True with probability `keep` (to 2**-32): a hash of seed and position, int64, broadcast together.

    The same seed and position give the same bit, wherever in a tensor they stand.
    """
    key = _hash32(_hash32(seed & 0x7FFFFFFF) ^ (seed >> 31))
    return _hash32(_hash32(position) ^ key) < round(keep * 2**32)


def _hash32(n: Tensor) -> Tensor:
    """A 32-bit integer hash in int64 (Wellons, hash-prospector, constants of its issue 19: bias 0.107).

    Both multipliers are below 2**31, so that no product of theirs with a 32-bit number leaves int64.
    """
    n = n & 0xFFFFFFFF
    n = ((n ^ (n >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    n = ((n ^ (n >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return n ^ (n >> 15)
