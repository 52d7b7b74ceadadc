"""Monotonic attention (Raffel et al. 2017, arXiv:1704.00784)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...state import State
from .base import Attention


class MonotonicAttention(Attention):
    """Attention that moves forward only: at each entry from where it stood it stops with probability p_j.

        e_j = g v^T / ||v|| tanh(W q + V h_j + b) + r (the paper's modified energy function),
        p_j = sigmoid(e_j + noise) (eq. 12),  a_j = p_j q_j (eq. 14),
        q_j = (1 - p_{j-1}) q_{j-1} + a'_j (eq. 13),  q_0 = p_0 = 0,  c = sum_j a_j h_j

    a' are the weights of the step before; before the first step they are 1 at the first entry. a_j is the exact
    probability that it stops at j. What is left of 1 has run past the end: sum_j a_j <= 1. The paper computes q by
    a quotient of a cumulative sum and product, which has to be clipped; here it is computed without a division, in
    log2(S) rounds.

    In training it is soft, as above. In eval mode it is hard: it stops at the first j, from where it stood on, with
    e_j > 0, so a is 1 there and 0 elsewhere (the paper's algorithm 1). Where it stops nowhere, a and c are zeros,
    and stay so: it has run past the end, as in the expectation.
    Deviations: noise may be 0; entries that memory_mask leaves out are passed by.

    query_size, memory_size: features of q and of each h_j.  size: of v.
    noise: standard deviation of the normal noise added to the energies in training, which makes p discrete.
    bias:  what r is at first; the longer the memory, the further below 0 it should be (the paper: -1 to -4).
    hard:  True or False, whatever the mode; None: as above.
    Modules: "query" (W), "keys" (V and b); parameters "energy" (v), "gain" (g, at first 1 / sqrt(size)), "bias" (r).

    State: `before` (B, S), a'. See `Attention` for the call.
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        size: int,
        *,
        noise: float = 1.0,
        bias: float = -1.0,
        hard: bool | None = None,
    ) -> None:
        super().__init__()
        self.query_size, self.memory_size = query_size, memory_size
        self.query = nn.Linear(query_size, size, bias=False)
        self.keys = nn.Linear(memory_size, size)
        self.energy = nn.Parameter(torch.empty(size).uniform_(-(size**-0.5), size**-0.5))
        self.gain = nn.Parameter(torch.tensor(size**-0.5))
        self.bias = nn.Parameter(torch.tensor(float(bias)))
        self.noise, self.hard = noise, hard
        self.before = State(..., init=_at_the_first)

    def attend(self, query: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        before = self.before.sized(memory.shape[1], like=query)
        energies = self.energies(query, memory)
        hard = not self.training if self.hard is None else self.hard
        if hard:
            weights = first_stop(energies > 0 if mask is None else (energies > 0) & mask, before)
        else:
            if self.training and self.noise > 0:
                energies = energies + self.noise * torch.randn_like(energies)
            stop = torch.sigmoid(energies)
            weights = expected_stop(stop if mask is None else torch.where(mask, stop, 0.0), before)
        self.before.next = weights
        return weights

    def energies(self, query: Tensor, memory: Tensor) -> Tensor:
        """e (B, S), without noise."""
        hidden = (self.keys(memory) + self.query(query).unsqueeze(1)).tanh()
        weight = self.gain * self.energy / torch.linalg.vector_norm(self.energy)
        return F.linear(hidden, weight.unsqueeze(0)).squeeze(-1) + self.bias

    def extra_repr(self) -> str:
        return f"noise={self.noise:g}" + ("" if self.hard is None else f", hard={self.hard}")


def _at_the_first(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return (torch.arange(shape[0], device=device) == 0).to(dtype)


def first_stop(stops: Tensor, before: Tensor) -> Tensor:
    """1 at the first True of `stops` (B, S) from the entry on where `before` (B, S) is 1; zeros where there is none."""
    reached = before.cumsum(1) > 0.5
    stops = stops & reached
    return (stops & (stops.cumsum(1) == 1)).to(before.dtype)


def expected_stop(stop: Tensor, before: Tensor) -> Tensor:
    """a_j = p_j q_j, q_j = (1 - p_{j-1}) q_{j-1} + a'_j: p (B, S) and a' (B, S) -> a (B, S)."""
    passed = F.pad(1 - stop[:, :-1], (1, 0))
    return stop * _Recurrence.apply(passed, before)  # type: ignore[no-untyped-call]  # torch's apply has no annotations


class _Recurrence(torch.autograd.Function):
    """q_j = k_j q_{j-1} + x_j along the last axis: k (B, S), of which k_0 is not looked at, and x (B, S) -> q (B, S).

    Backward: g_j = dq_j + k_{j+1} g_{j+1} is the same thing in the other direction; dx = g, dk_j = g_j q_{j-1}.
    """

    @staticmethod
    def forward(ctx: Any, keep: Tensor, x: Tensor) -> Tensor:
        q = _scanned(keep, x, forward=True)
        ctx.save_for_backward(keep, q)
        return q

    @staticmethod
    def backward(ctx: Any, dq: Tensor) -> tuple[Tensor, Tensor]:
        keep, q = ctx.saved_tensors
        g = _scanned(F.pad(keep[:, 1:], (0, 1)), dq, forward=False)
        return g * F.pad(q[:, :-1], (1, 0)), g


# How many rounds serve a size; few different numbers, since each is another program.
_ROUNDS = ((64, 6), (1024, 10), (65536, 16), (2**62, 62))


def _scanned(keep: Tensor, x: Tensor, forward: bool) -> Tensor:
    """q_j = keep_j q_{j-1} + x_j (or j + 1), in rounds that each see twice as far (Hillis & Steele 1986).

    Only products of numbers up to 1 and sums of what is positive where x is: no cancellation, whatever `keep` is.
    """
    size = x.shape[1]
    rounds = next(rounds for most, rounds in _ROUNDS if size <= most)
    for k in range(rounds):
        away = 1 << k
        x = x + keep * _shifted(x, away, forward)
        if k + 1 < rounds:
            keep = keep * _shifted(keep, away, forward)
    return x


def _shifted(x: Tensor, away: int, forward: bool) -> Tensor:
    """x_{j - away}, or j + away; zeros where there is none."""
    return F.pad(x, (away, 0))[:, : x.shape[1]] if forward else F.pad(x, (0, away))[:, away:]
