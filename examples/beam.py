"""Sequence to sequence: an encoder, a decoder with attention, trained with given labels; then three ways to search.

    python examples/beam.py

It learns to say a sequence of labels backwards. Greedy search, samples and beam search run the step that was trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steploop as sl

END, START, LABELS, SIZE = 0, 1, 8, 24


class Decoder(sl.Step):
    """label before (B,) -> scores of the next (B, LABELS); memory (B, S, 2 SIZE)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LABELS, SIZE)
        self.attention = sl.nn.attention.AdditiveAttention(SIZE, 2 * SIZE, SIZE)
        self.cell, self.output = sl.nn.GRUCell(3 * SIZE, SIZE), nn.Linear(3 * SIZE, LABELS)

    def step(self, label: Tensor, *, memory: Tensor, memory_lengths: Tensor) -> Tensor:
        found, _ = self.attention(self.cell.h.prev, memory=memory, memory_lengths=memory_lengths)
        h = self.cell(torch.cat([self.embedding(label), found], -1))
        return self.output(torch.cat([h, found], -1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LABELS, SIZE)
        self.encoder = sl.nn.Bidirectional(sl.nn.GRUCell(SIZE, SIZE), sl.nn.GRUCell(SIZE, SIZE))
        self.decoder = Decoder()

    def encode(self, source: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """The decoder's constants, from labels (B, S)."""
        outputs, _ = self.encoder(self.embedding(source.t()), lengths=lengths)
        return {"memory": outputs.transpose(0, 1), "memory_lengths": lengths}


def batch(rows: int, longest: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """source (B, S), its lengths (B,), and the same backwards with END behind it, (S + 1, B)."""
    lengths = torch.randint(2, longest + 1, (rows,))
    source = torch.randint(2, LABELS, (rows, longest))
    place = lengths[:, None] - 1 - torch.arange(longest + 1)
    return source, lengths, torch.where(place >= 0, source.gather(1, place.clamp(min=0)), END).t()


def train(updates: int, rows: int = 32) -> tuple[Model, list[float]]:
    """The model, and the loss at each update."""
    model = Model()
    loop, optimizer, losses = sl.Loop(model.decoder), torch.optim.Adam(model.parameters(), 0.02), []
    for _ in range(updates):
        source, lengths, target = batch(rows)
        before = torch.cat([torch.full_like(target[:1], START), target[:-1]])
        scores, _ = loop(before, lengths=lengths + 1, **model.encode(source, lengths))
        valid = torch.arange(len(target))[:, None] < lengths + 1
        loss = F.cross_entropy(scores[valid], target[valid])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def example() -> tuple[sl.Step, Tensor, dict[str, Tensor]]:
    """What `steploop explain` runs: the step, its input and its constants."""
    model = Model()
    source, lengths, target = batch(32)
    return model.decoder, target, model.encode(source, lengths)


if __name__ == "__main__":
    torch.manual_seed(0)
    model, losses = train(150)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    source, lengths, target = batch(4)
    with torch.no_grad():
        given = {"start": START, "end": END, "max_steps": 8, **model.encode(source, lengths)}
        greedy = sl.search.greedy(model.decoder, **given)
        draws = sl.search.sample(model.decoder, samples=3, **given)
        beam = sl.search.beam(model.decoder, size=4, n_best=2, length_penalty=("average",), **given)
    for row, length in enumerate(lengths.tolist()):
        print("heard ", source[row, :length].tolist())
        print("greedy", greedy.to_lists()[row][0], " samples", draws.to_lists()[row])
        print("beam  ", beam.to_lists()[row], "the best there is" if beam.proved_best[row] else "")
