"""Peers of the case `g2p`: the recipe's model as steploop runs it, and as a Python loop over nn.LSTMCell.

The loop by hand is what a careful person writes: batches padded to the longest word, products that need no state before
the loops, states kept where a word has ended, the memory's keys once. Words have the lengths of a dictionary's; both
sides get the same batches of like lengths and the same weights, and their losses, gradients and scores are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steploop as sl
from steploop.recipes.g2p import Model, Shape
from steploop.seq2seq.buckets import pad_to_longest

from .data import Workload
from .peers import PEERS, Blank, Runner, Steploop

LETTERS, BEAM = 29, {"greedy": 1, "beam": 8}
BATCHES = 4  # of a run, from short words to long ones
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # letters (S, B), their lengths, labels (T, B), their lengths


def batches_of(work: Workload) -> list[Batch]:
    """Words of 2 to work.S letters and about as many phonemes, sorted by length and cut into batches."""
    random = np.random.default_rng(0)
    letters = np.sort(random.binomial(2 * work.S, 0.5 * 7.5 / max(work.S, 8), BATCHES * work.B).clip(2, work.S))
    phonemes = (letters - random.integers(0, 3, len(letters))).clip(1, work.T - 1)
    word = lambda size, most, end: torch.from_numpy(np.append(random.integers(1, most, size), end))
    pairs = [
        (word(s - 1, LETTERS, random.integers(1, LETTERS)), word(t, work.V, 0))
        for s, t in zip(letters, phonemes, strict=True)
    ]
    found = []
    for start in range(0, len(pairs), work.B):
        x, y = pad_to_longest(pairs[start : start + work.B])
        found.append((x.values, x.lengths, y.values, y.lengths))
    return found


def make_runner(name: str, work: Workload, mode: str) -> Runner:
    """`training`: the loss of every batch and its gradients. `greedy`, `beam`: pronunciations of all words."""
    ours = isinstance(PEERS.get(name), Steploop)
    if not ours and name != "eager":
        raise Blank("not written for this model")
    torch.manual_seed(0)
    shape = Shape("lstm", 1, work.H, work.I, dropout=0.0)
    model = Model(LETTERS, work.V, shape, PEERS[name].backend if ours else "eager")
    batches = batches_of(work)
    if mode == "training":
        scores = model if ours else ByHand(model).scores
        return Runner(lambda: trained(model, scores, batches), gradients)
    with torch.no_grad():
        model.decoder.step.output.bias[0] = -20.0  # a word ends when it has as many phonemes as it should
    model.eval()
    search = searched if ours else ByHand(model).search

    @torch.no_grad()
    def run() -> list[Tensor]:
        return [search(model, *batch, BEAM[mode]) for batch in batches]

    return Runner(run, lambda found: {f"y {k}": scores.numpy() for k, scores in enumerate(found)})


def searched(model: Model, letters: Tensor, lengths: Tensor, _: Tensor, limits: Tensor, count: int) -> Tensor:
    """The score of the best hypothesis of every word; a beam where count > 1."""
    options = {"start": 0, "end": 0, "max_steps": limits, "memory_lengths": lengths}
    memory = model.encoder(letters, lengths)
    if count == 1:
        return sl.search.greedy(model.decoder, memory=memory, **options).scores[:, 0]
    return sl.search.beam(model.decoder, size=count, memory=memory, **options).scores[:, 0]


def trained(model: Model, scores: Callable[..., Tensor], batches: list[Batch]) -> tuple[Tensor, Model]:
    losses = []
    model.zero_grad(set_to_none=True)
    for letters, lengths, said, said_lengths in batches:
        valid = torch.arange(len(said))[:, None] < said_lengths
        targets = torch.where(valid, said, -100)
        found = scores(letters, lengths, said, said_lengths)
        loss = F.cross_entropy(found.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses), model


def gradients(result: tuple[Tensor, Model]) -> dict[str, np.ndarray]:
    losses, model = result
    return {"y": losses.numpy()} | {f"grad {name}": p.grad.numpy() for name, p in model.named_parameters()}


class ByHand:
    """The model's weights in loops of Python. Its nn.LSTMCells share the parameters of the model's cells."""

    def __init__(self, model: Model) -> None:
        (both,) = model.encoder.layers
        self.model, self.decoder = model, model.decoder.step
        self.ahead, self.back = (as_torch(loop.step) for loop in (both.forward_loop, both.backward_loop))
        self.cell = as_torch(self.decoder.cell[1])

    def encoded(self, letters: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """memory, keys (B, S, H), mask (B, S)."""
        x = self.model.encoder.embedding(letters)
        valid = torch.arange(len(letters))[:, None] < lengths
        ahead, back = (self._direction(*way, x, valid) for way in ((self.ahead, False), (self.back, True)))
        memory = torch.cat([ahead, back], -1).transpose(0, 1)
        # The keys as GeneralAttention has them: computed for all letters before the loop.
        return memory, self.decoder.attention.keys(memory), valid.t()

    def _direction(self, cell: nn.LSTMCell, reverse: bool, x: Tensor, valid: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[1], cell.hidden_size)
        outputs = [h] * len(x)
        for t in reversed(range(len(x))) if reverse else range(len(x)):
            new_h, new_c = cell(x[t], (h, c))
            here = valid[t].unsqueeze(1)
            h, c = torch.where(here, new_h, h), torch.where(here, new_c, c)
            outputs[t] = torch.where(here, h, 0.0)
        return torch.stack(outputs)

    def begin(self, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.tanh(self.decoder.start(memory[:, 0]))
        return h, torch.zeros_like(h), torch.zeros_like(h)

    def advance(self, x: Tensor, states: Any, memory: Tensor, keys: Tensor, mask: Tensor) -> Any:
        h, c, fed = states
        h, c = self.cell(torch.cat([x, fed], -1), (h, c))
        energy = torch.bmm(keys, h.unsqueeze(2)).squeeze(2).masked_fill(~mask, float("-inf"))
        context = torch.bmm(energy.softmax(-1).unsqueeze(1), memory).squeeze(1)
        fed = torch.tanh(self.decoder.combine(torch.cat([context, h], -1)))
        return (h, c, fed), fed

    def scores(self, letters: Tensor, lengths: Tensor, said: Tensor, _: Tensor) -> Tensor:
        memory, keys, mask = self.encoded(letters, lengths)
        xs = self.decoder.embedding(torch.cat([torch.zeros_like(said[:1]), said[:-1]]))
        states, outputs = self.begin(memory), []
        for x in xs:
            states, fed = self.advance(x, states, memory, keys, mask)
            outputs.append(fed)
        return self.decoder.output(torch.stack(outputs))

    def search(self, _: Model, letters: Tensor, lengths: Tensor, __: Tensor, limits: Tensor, count: int) -> Tensor:
        """As `searched`."""
        batch = len(lengths)
        encoded = self.encoded(letters, lengths)
        states = self.begin(encoded[0])
        if count > 1:
            encoded, states = (tuple(v.repeat_interleave(count, 0) for v in part) for part in (encoded, states))
        rows = torch.arange(batch).unsqueeze(1) * count
        label = torch.zeros(batch * count, dtype=torch.int64)
        score = torch.full((batch, count), float("-inf"))
        score[:, 0] = 0.0
        ended = torch.zeros(batch, count, dtype=torch.bool)
        for step in range(1, int(limits.max()) + 1):
            states, fed = self.advance(self.decoder.embedding(label), states, *encoded)
            log_probs = self.decoder.output(fed).log_softmax(-1).view(batch, count, -1)
            only_end = torch.full_like(log_probs, float("-inf"))
            only_end[..., 0] = 0.0
            log_probs = torch.where(ended.unsqueeze(2), only_end, log_probs)
            score, index = (score.unsqueeze(2) + log_probs).view(batch, -1).topk(count, 1)
            parent, label = index // log_probs.shape[2], (index % log_probs.shape[2]).view(-1)
            if count > 1:
                states = tuple(state.index_select(0, (rows + parent).view(-1)) for state in states)
            ended = (label.view(batch, count) == 0) | (step >= limits).unsqueeze(1)
            if bool(ended.all()):
                break
        return score[:, 0]


def as_torch(cell: nn.Module) -> nn.LSTMCell:
    """torch's cell with the very parameters of steploop's."""
    made = nn.LSTMCell(cell.weight_ih.shape[1], cell.weight_hh.shape[1])
    for name, parameter in cell.named_parameters():
        setattr(made, name, parameter)
    return made
