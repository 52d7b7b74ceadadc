"""Peers of the search cases: a decoder with attention searched by steploop, and by a batched PyTorch loop.

The loop by hand is what a careful person writes: the memory's keys once, states as (B * K, ...) tensors that are
selected by back-pointers, one topk a step, an end when all rows have ended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import steploop as sl

from .data import SEARCHES, Data, Workload
from .peers import PEERS, Blank, Runner, Steploop

START, END = 1, 0
WIDTHS = {"greedy": 1, "sample": 1, "beam": 8}  # hypotheses of a row


class Decoder(sl.Step):
    """GRU with dot attention and input feeding. The end is rare: searches run to their limit."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.embedding = nn.Embedding(work.V, work.I)
        self.cell = sl.nn.GRUCell(work.I + work.H, work.H)
        self.key = nn.Linear(work.H, work.H)
        self.head = nn.Linear(2 * work.H, work.V)
        self.context = sl.State(work.H)
        with torch.no_grad():
            self.head.bias[END] = -20.0

    def step(self, label: Tensor, *, memory: Tensor) -> Tensor:
        h = self.cell(torch.cat([self.embedding(label), self.context.prev], -1))
        weights = torch.bmm(self.key(memory), h.unsqueeze(2)).softmax(1)
        self.context.next = torch.bmm(weights.transpose(1, 2), memory).squeeze(1)
        return self.head(torch.cat([h, self.context.next], -1))


def make_runner(name: str, work: Workload, mode: str) -> Runner:
    """A Runner that searches for T labels of every row and gives the labels and scores of the best."""
    torch.manual_seed(0)
    decoder, memory = Decoder(work), torch.randn(work.B, work.S, work.H)
    if name == "eager":
        run: Callable[[], Any] = lambda: by_hand(decoder, memory, work.T, mode)
    elif isinstance(PEERS.get(name), Steploop):
        run = lambda: by_steploop(decoder, memory, work.T, mode, PEERS[name].backend)
    else:
        raise Blank("has no search here")
    # Samples differ from peer to peer: there is nothing to compare.
    arrays = {} if mode == "sample" else None
    return Runner(run, lambda found: arrays if arrays is not None else {"y": np.asarray(found[1])})


def make_first_runner(name: str, work: Workload) -> Runner:
    """A Runner for a process's first search, and for searches of other sizes after it."""
    torch.manual_seed(0)
    mode, width = SEARCHES[work.kind]
    decoder = Decoder(work)
    now = {"memory": torch.randn(work.B, work.S, work.H), "steps": work.T}

    def again(data: Data) -> None:
        now["steps"], batch = data.x.shape
        now["memory"] = torch.randn(batch, work.S, work.H)

    def run() -> tuple[Tensor, Tensor]:
        if name == "eager":
            return by_hand(decoder, now["memory"], now["steps"], mode, width)
        return by_steploop(decoder, now["memory"], now["steps"], mode, PEERS[name].backend, width)

    return Runner(run, again=again)


def by_steploop(
    decoder: Decoder, memory: Tensor, steps: int, mode: str, backend: str, width: int | None = None
) -> tuple[Tensor, Tensor]:
    given = {"start": START, "end": END, "max_steps": steps, "memory": memory, "backend": backend}
    if mode == "beam":
        hyps = sl.search.beam(decoder, size=width or WIDTHS["beam"], **given)
    else:
        hyps = (sl.search.greedy if mode == "greedy" else sl.search.sample)(decoder, **given)
    return hyps.best(), hyps.scores[:, 0]


@torch.no_grad()
def by_hand(decoder: Decoder, memory: Tensor, steps: int, mode: str, width: int | None = None) -> tuple[Tensor, Tensor]:
    batch, count = len(memory), width or WIDTHS[mode]
    cell = nn.GRUCell(decoder.cell.weight_ih.shape[1], decoder.cell.weight_hh.shape[1])
    cell.load_state_dict(decoder.cell.state_dict())
    keys = decoder.key(memory)
    rows = torch.arange(batch).unsqueeze(1) * count
    if count > 1:
        keys, memory = (x.repeat_interleave(count, 0) for x in (keys, memory))
    label = torch.full((batch * count,), START)
    h = context = memory.new_zeros(batch * count, memory.shape[2])
    score = memory.new_full((batch, count), float("-inf"))
    score[:, 0] = 0.0
    ended = torch.zeros(batch, count, dtype=torch.bool)
    labels = torch.zeros(batch, count, 0, dtype=torch.int64)
    for _ in range(steps):
        h = cell(torch.cat([decoder.embedding(label), context], -1), h)
        weights = torch.bmm(keys, h.unsqueeze(2)).softmax(1)
        context = torch.bmm(weights.transpose(1, 2), memory).squeeze(1)
        log_probs = decoder.head(torch.cat([h, context], -1)).log_softmax(-1).view(batch, count, -1)
        if mode == "beam":
            only_end = torch.full_like(log_probs, float("-inf"))
            only_end[..., END] = 0.0
            log_probs = torch.where(ended.unsqueeze(2), only_end, log_probs)
            score, index = (score.unsqueeze(2) + log_probs).view(batch, -1).topk(count, 1)
            parent, new = index // log_probs.shape[2], index % log_probs.shape[2]
            flat = (rows + parent).view(-1)
            h, context = h.index_select(0, flat), context.index_select(0, flat)
            ended, labels = ended.gather(1, parent), labels.gather(1, parent.unsqueeze(2).expand_as(labels))
        else:
            flat = log_probs.squeeze(1)
            new = flat.argmax(1, keepdim=True) if mode == "greedy" else flat.exp().multinomial(1)
            new = torch.where(ended, END, new)
            score = score + torch.where(ended, 0.0, flat.gather(1, new))
        ended, label = ended | (new == END), new.view(-1)
        labels = torch.cat([labels, new.unsqueeze(2)], 2)
        if bool(ended.all()):
            break
    return labels[:, 0], score[:, 0]
