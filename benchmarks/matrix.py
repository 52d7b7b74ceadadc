"""Steps whose state is a matrix for every head, in PyTorch: heads are an axis beside the batch.

H is the width of the outputs: HEADS heads of D = H / HEADS numbers, so that a state has H * D numbers in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steploop as sl

from .data import HEADS

States = tuple[Tensor, ...]


class Heads(sl.Step):
    """What they have in common: x (B, I) -> everything that needs no state, side by side."""

    states: tuple[str, ...] = ("S",)

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.size = hidden_size // HEADS
        self.layer = nn.Linear(input_size, 3 * hidden_size + 2 * HEADS)
        self.S = sl.State((HEADS, self.size, self.size))

    def project(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def parts(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value (B, HEADS, D); two gates (B, HEADS)."""
        wide = HEADS * self.size
        q, k, v, gates = projected.split([wide, wide, wide, 2 * HEADS], -1)
        return *(a.unflatten(-1, (HEADS, self.size)) for a in (q, k, v)), *torch.sigmoid(gates).chunk(2, -1)

    def advance(self, projected: Tensor, states: States) -> tuple[States, Tensor]:
        raise NotImplementedError

    def step(self, x: Tensor) -> Tensor:
        found = [getattr(self, name) for name in self.states]
        states, y = self.advance(self.project(x), tuple(s.prev for s in found))
        for state, value in zip(found, states):
            state.next = value
        return y


class LinearAttention(Heads):
    """Linear attention (Katharopoulos et al. 2020) with a decay per head (Sun et al. 2023)."""

    def advance(self, projected: Tensor, states: States) -> tuple[States, Tensor]:
        q, k, v, decay, _ = self.parts(projected)
        S = decay[..., None, None] * states[0] + k.unsqueeze(-1) * v.unsqueeze(-2)
        return (S,), torch.einsum("bhkv,bhk->bhv", S, q).flatten(1)


class Delta(Heads):
    """The delta rule (Schlag et al. 2021), with keys of length 1."""

    def advance(self, projected: Tensor, states: States) -> tuple[States, Tensor]:
        q, k, v, beta, _ = self.parts(projected)
        k = F.normalize(k, dim=-1)
        old = (states[0] @ k.unsqueeze(-1)).squeeze(-1)
        S = states[0] + (beta.unsqueeze(-1) * (v - old)).unsqueeze(-1) * k.unsqueeze(-2)
        return (S,), (S @ q.unsqueeze(-1)).squeeze(-1).flatten(1)


class MLSTM(Heads):
    """The matrix memory of xLSTM (Beck et al. 2024, equations 19-27), its gates through sigmoids."""

    states = ("S", "n", "m")

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__(input_size, hidden_size)
        self.n, self.m = sl.State((HEADS, self.size)), sl.State(HEADS)

    def advance(self, projected: Tensor, states: States) -> tuple[States, Tensor]:
        q, k, v, i, f = self.parts(projected)
        before, n, m = states
        log_f = torch.log(f)
        bound = torch.maximum(log_f + m, i)
        i, f = torch.exp(i - bound), torch.exp(log_f + m - bound)
        S = f[..., None, None] * before + i[..., None, None] * (v.unsqueeze(-1) * k.unsqueeze(-2))
        n = f[..., None] * n + i[..., None] * k
        read = torch.einsum("bhvk,bhk->bhv", S, q)
        return (S, n, bound), (read / (n * q).sum(-1, keepdim=True).abs().clamp(min=1.0)).flatten(1)


class FastWeights(Heads):
    """Fast weights (Ba et al. 2016, equations 2-3, one inner step)."""

    states = ("S", "h")

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__(input_size, hidden_size)
        self.h = sl.State((HEADS, self.size))
        self.slow = nn.Linear(hidden_size, hidden_size, bias=False)

    def advance(self, projected: Tensor, states: States) -> tuple[States, Tensor]:
        x = self.parts(projected)[2]
        before, h = states
        S = 0.9 * before + 0.1 * h.unsqueeze(-1) * h.unsqueeze(-2)
        slow = self.slow(h.flatten(1)).unflatten(-1, (HEADS, self.size))
        h = torch.tanh(x + slow + torch.matmul(S, h.unsqueeze(-1)).squeeze(-1))
        return (S, h), h.flatten(1)
