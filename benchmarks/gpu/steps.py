"""The recurrent programs that are timed: each a Step, and the same formula as a plain function of states.

`step(x, states, **constants) -> (states, y)` is what everybody but steploop runs, one step after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steploop as sl

from ..models import MODELS as TABLES

MEMORY = 64  # frames that the decoder attends to
CLASSES = 32  # of each of the RSSM's 32 categorical variables


class RSSM(sl.Step):
    """One step of DreamerV3's recurrent state space model (Hafner et al. 2023, appendix): x is [action, embedding].

    A GRU with one layer norm over its gates, before it a dense layer of [z, action]; a posterior of 32 categorical
    variables of 32 classes from [h, embedding], 1 % uniform; straight-through gradients. Its Gumbel noise is an input,
    so that every way draws the same. Smaller than the published one: one dense layer each, sizes all H.
    """

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        size = CLASSES * CLASSES
        self.action = input_size // 4
        self.before = nn.Sequential(nn.Linear(size + self.action, hidden_size), nn.LayerNorm(hidden_size), nn.SiLU())
        self.gates = nn.Linear(2 * hidden_size, 3 * hidden_size, bias=False)
        self.norm = nn.LayerNorm(3 * hidden_size)
        embedding = input_size - self.action
        self.seen = nn.Sequential(nn.Linear(hidden_size + embedding, hidden_size), nn.LayerNorm(hidden_size), nn.SiLU())
        self.logits = nn.Linear(hidden_size, size)
        self.h, self.z = sl.State(hidden_size), sl.State(size)

    def advance(self, x: Tensor, states: tuple[Tensor, ...], noise: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        h, z = states
        action, embedding = x[:, : self.action], x[:, self.action :]
        a = self.before(torch.cat([z, action], -1))
        reset, candidate, update = self.norm(self.gates(torch.cat([a, h], -1))).chunk(3, -1)
        update = torch.sigmoid(update - 1)
        h = update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * h
        logits = self.logits(self.seen(torch.cat([h, embedding], -1))).unflatten(-1, (CLASSES, CLASSES))
        probabilities = 0.99 * torch.softmax(logits, -1) + 0.01 / CLASSES
        chosen = (torch.log(probabilities) + noise).argmax(-1, keepdim=True)
        drawn = torch.zeros_like(probabilities).scatter(-1, chosen, 1.0)
        z = (drawn + probabilities - probabilities.detach()).flatten(-2)
        return (h, z), torch.cat([h, z], -1)

    def step(self, x: Tensor, noise: Tensor) -> Tensor:
        (self.h.next, self.z.next), y = self.advance(x, (self.h.prev, self.z.prev), noise)
        return y


class SLSTM(sl.Step):
    """The sLSTM of Beck et al. 2024 (equations 8-17 with the stabiliser m), four heads, exponential input gate."""

    HEADS = 4

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.input_gates = nn.Linear(input_size, 4 * hidden_size)
        part = hidden_size // self.HEADS
        self.recurrent = nn.Parameter(torch.randn(self.HEADS, part, 4 * part) / part**0.5)
        self.h, self.c, self.n = sl.State(hidden_size), sl.State(hidden_size), sl.State(hidden_size)
        self.m = sl.State(hidden_size)

    def advance(self, x: Tensor, states: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        h, c, n, m = states
        heads = h.unflatten(-1, (self.HEADS, -1)).transpose(0, 1)
        from_h = torch.bmm(heads, self.recurrent).transpose(0, 1).unflatten(-1, (4, -1)).transpose(1, 2).flatten(1)
        z, i, f, o = (self.input_gates(x) + from_h).chunk(4, -1)
        f = F.logsigmoid(f) + m
        m = torch.maximum(f, i)
        i, f = torch.exp(i - m), torch.exp(f - m)
        c = f * c + i * torch.tanh(z)
        n = f * n + i
        h = torch.sigmoid(o) * c / n.clamp(min=1e-6)
        return (h, c, n, m), h

    def step(self, x: Tensor) -> Tensor:
        states = self.h.prev, self.c.prev, self.n.prev, self.m.prev
        (self.h.next, self.c.next, self.n.next, self.m.next), y = self.advance(x, states)
        return y


@dataclass(frozen=True)
class Problem:
    """One program at one size: T steps of B rows, I = H inputs."""

    cell: str
    steps: int
    batch: int
    hidden: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.cell} H={self.hidden} B={self.batch} T={self.steps}"


CELLS = ("lstm", "gru", "lnlstm", "rssm", "slstm", "decoder")
STATES = {"lstm": 2, "gru": 1, "lnlstm": 2, "rssm": 2, "slstm": 4, "decoder": 3}
OWN = {"rssm": RSSM, "slstm": SLSTM}


def module_of(problem: Problem, device: str) -> sl.Step:
    torch.manual_seed(1)
    made = {**TABLES, **OWN}[problem.cell](problem.hidden, problem.hidden)
    return made.to(device, problem.dtype)


def data_of(problem: Problem, device: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(sequences, constants)"""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, problem.dtype)

    t, b, h = problem.steps, problem.batch, problem.hidden
    xs, constants = [normal(t, b, h)], {}
    if problem.cell == "rssm":
        uniform = torch.rand(t, b, CLASSES, CLASSES, generator=generator).clamp(1e-6, 1 - 1e-6)
        xs.append((-torch.log(-torch.log(uniform))).to(device, problem.dtype))
    if problem.cell == "decoder":
        constants["memory"] = normal(b, MEMORY, h)
        words = torch.randint(MEMORY // 2, MEMORY + 1, (b, 1), generator=generator)
        constants["memory_mask"] = (torch.arange(MEMORY) < words).to(device)
    return xs, constants


def first_states(problem: Problem, module: sl.Step, like: Tensor) -> tuple[Tensor, ...]:
    sizes = [CLASSES * CLASSES if name == "z" else problem.hidden for name in _names(problem)]
    return tuple(like.new_zeros(problem.batch, size) for size in sizes)


def _names(problem: Problem) -> str:
    return {"rssm": "hz"}.get(problem.cell, "h" * STATES[problem.cell])


def one_step(module: sl.Step, xs: tuple[Tensor, ...], states: tuple[Tensor, ...], constants: dict[str, Any]) -> Any:
    """One step as its author wrote it: input products inside."""
    if isinstance(module, tuple(OWN.values())):
        return module.advance(xs[0], states, *xs[1:])
    return module.advance(module.project(xs[0]), states, **constants)
