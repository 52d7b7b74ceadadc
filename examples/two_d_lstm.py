"""A translation model without attention: a 2-D LSTM over (target, source), as in Bahar et al. 2018.

Every target step sees the whole source through one more row of the grid. Trained, all rows run together; at
decoding each new row is one inner loop over the source. Here it learns to reverse a sequence.
"""

import torch
from torch import nn
from torch.nn import functional as F

import steploop as sl


class Reverser(sl.Step):
    """label (B,) -> scores of the next one (B, labels); source (B, S), source_lengths (B,) are constants."""

    def __init__(self, labels: int, units: int = 32):
        super().__init__()
        self.source, self.target = nn.Embedding(labels, units), nn.Embedding(labels, units)
        self.grid = sl.memory.TwoDLSTM(units, units, units, pooling="weighted")
        self.out = nn.Linear(units, labels)

    def step(self, label, source, source_lengths):
        row = self.grid(self.target(label), source=self.source(source), source_lengths=source_lengths)
        return self.out(row)


def batch(size: int, longest: int, labels: int):
    """source (B, S) of labels 1..., lengths (B,), and the source reversed, (S, B)."""
    lengths = torch.randint(2, longest + 1, (size,))
    source = torch.randint(1, labels, (size, longest))
    place = (lengths[:, None] - 1 - torch.arange(longest)).clamp(min=0)
    return source, lengths, source.gather(1, place).t()


def train(model: Reverser, updates: int, labels: int = 6, longest: int = 5) -> list[float]:
    """The losses."""
    loop, optimizer, losses = sl.Loop(model), torch.optim.Adam(model.parameters(), 0.01), []
    for _ in range(updates):
        source, lengths, target = batch(32, longest, labels)
        given = torch.cat([torch.zeros_like(target[:1]), target[:-1]])  # 0 starts
        scores, _ = loop(given, lengths=lengths, source=source, source_lengths=lengths)
        valid = torch.arange(longest)[:, None] < lengths
        loss = F.cross_entropy(scores[valid], target[valid])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    losses = train(Reverser(6), 150)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
