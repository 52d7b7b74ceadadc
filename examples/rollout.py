"""A decoder rolled out step by step: a stack of GRU layers, each with an extra input, that looks at a memory.

The query of the attention is the state of the bottom layer, before the step; what it finds is the extra input of every
layer. The label before comes back through a State: the given one in training, its own when it runs freely, or some of
each (scheduled sampling). Nobody unrolls anything: the plan says what is left in a loop, forward and backward.

    steploop explain examples/rollout.py

Here it learns to say a sequence of labels backwards.
"""

import torch
from torch import nn
from torch.nn import functional as F

import steploop as sl

START = 0


class Encoder(nn.Module):
    """labels (B, S), lengths (B,) -> memory (B, S, 2 units)."""

    def __init__(self, labels: int, units: int):
        super().__init__()
        self.embedding = nn.Embedding(labels, units)
        self.both_ways = sl.nn.Bidirectional(sl.nn.GRUCell(units, units), sl.nn.GRUCell(units, units))

    def forward(self, labels, lengths):
        outputs, _ = self.both_ways(self.embedding(labels.t()), lengths=lengths)
        return outputs.transpose(0, 1)


class Rollout(sl.Step):
    """A step of the decoder: scores of the label (B, labels), the label (B,), and where it looked (B, S).

    label (B,): the right one, or None: its own. where (B,): the rows that are given theirs; None: all.
    """

    def __init__(self, labels: int, units: int, memory_size: int, layers: int = 3):
        super().__init__()
        self.choice = sl.memory.Choice(start=START)
        self.embedding = nn.Embedding(labels, units)
        self.attention = sl.nn.attention.AdditiveAttention(units, memory_size, units)
        self.layers = nn.ModuleList(sl.nn.GRUCell(units + memory_size, units) for _ in range(layers))
        self.output = nn.Linear(units, labels)

    def step(self, label=None, where=None, *, memory, memory_lengths):
        found, weights = self.attention(self.layers[0].h.prev, memory=memory, memory_lengths=memory_lengths)
        x = self.embedding(self.choice.previous())
        for layer in self.layers:
            x = layer(torch.cat([x, found], -1))
        scores = self.output(x)
        return scores, self.choice(scores, label, where), weights


def batch(rows: int, longest: int, labels: int):
    """(source (B, S), its lengths (B,), the same backwards and then START, (S + 1, B))."""
    lengths = torch.randint(2, longest + 1, (rows,))
    source = torch.randint(1, labels, (rows, longest))
    place = lengths[:, None] - 1 - torch.arange(longest + 1)
    backwards = source.gather(1, place.clamp(min=0))
    return source, lengths, torch.where(place >= 0, backwards, START).t()


class Model(nn.Module):
    """Encoder and decoder: `model(source, source_lengths, ...)`, the rest as the rollout is called."""

    def __init__(self, labels: int, units: int = 32):
        super().__init__()
        self.encoder = Encoder(labels, units)
        self.decoder = sl.Loop(Rollout(labels, units, 2 * units))

    def forward(self, source, source_lengths, *xs, **arguments):
        memory = self.encoder(source, source_lengths)
        return self.decoder(*xs, memory=memory, memory_lengths=source_lengths, **arguments)[0]


def train(model: Model, updates: int, labels: int, longest: int = 8, rows: int = 64, own: float = 0.0) -> list[float]:
    """The losses. own: the share of steps that read the decoder's own label instead of the given one."""
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.005), []
    for _ in range(updates):
        source, lengths, target = batch(rows, longest, labels)
        given = () if own == 0 else (torch.rand(target.shape) >= own,)
        scores, _, _ = model(source, lengths, target, *given, lengths=lengths + 1)
        valid = torch.arange(len(target))[:, None] <= lengths
        loss = F.cross_entropy(scores[valid], target[valid])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def accuracy(model: Model, labels: int, longest: int = 8, rows: int = 256) -> float:
    """The share of sequences that it says right when it reads its own labels."""
    source, lengths, target = batch(rows, longest, labels)
    with torch.no_grad():
        _, said, _ = model(source, lengths, steps=longest + 1, lengths=lengths + 1)
    return (said == target).all(0).float().mean().item()


def example():
    """What `steploop explain` runs: the step, its input (T, B), and its constants."""
    memory, lengths = torch.randn(4, 12, 64, requires_grad=True), torch.tensor([12, 7, 12, 3])
    return Rollout(20, 32, 64), torch.randint(0, 20, (10, 4)), dict(memory=memory, memory_lengths=lengths)


if __name__ == "__main__":
    torch.manual_seed(0)
    labels = 12
    model = Model(labels)
    losses = train(model, 300, labels)
    losses += train(model, 100, labels, own=0.25)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {accuracy(model, labels):.0%} of the sequences right on its own")
