"""A transducer's label loop: a step per audio frame, whose language model moves when a label was emitted.

Trained with given alignments, nothing of it has to run step by step but the LSTM, and that only over the
labels: steploop explain examples/transducer.py. The same definition decodes frame by frame.
"""

import torch
from torch import nn
from torch.nn import functional as F

import steploop as sl

BLANK = 0


class Transducer(sl.Step):
    """frame (B, features), and in training label (B,), 0 = blank -> scores (B, labels), label (B,)."""

    def __init__(self, features: int, labels: int, units: int):
        super().__init__()
        self.choice = sl.memory.Choice(start=BLANK)
        self.embedding = nn.Embedding(labels, units)
        self.labels = sl.memory.Masked(sl.nn.LSTMCell(units, units))
        self.joint, self.out = nn.Linear(features + units, units), nn.Linear(units, labels)

    def step(self, frame, label=None):
        previous = self.choice.previous()
        emitted = previous != BLANK
        history = sl.memory.unmask(self.labels(self.embedding(previous), where=emitted), emitted)
        scores = self.out(torch.tanh(self.joint(torch.cat([frame, history], -1))))
        return scores, self.choice(scores, label)


def alignment(frames: int, batch: int, labels: int) -> torch.Tensor:
    """(T, B) labels, two of three of them blank."""
    drawn = torch.randint(1, labels, (frames, batch))
    return torch.where(torch.rand(frames, batch) < 1 / 3, drawn, BLANK)


def example():
    """What `steploop explain` runs: the step and its inputs, (T, B, features) and (T, B)."""
    return Transducer(8, 12, 16), torch.randn(30, 4, 8), alignment(30, 4, 12)


def train(
    step: Transducer, frames: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor, updates: int = 40
):
    """Losses of some updates on one batch."""
    loop, optimizer, losses = sl.Loop(step), torch.optim.Adam(step.parameters(), 0.02), []
    valid = torch.arange(len(frames))[:, None] < lengths
    for _ in range(updates):
        (scores, _), _ = loop(frames, labels, lengths=lengths)
        loss = F.cross_entropy(scores[valid], labels[valid])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def decode(step: Transducer, frames: torch.Tensor) -> torch.Tensor:
    """(T, B) the labels chosen one frame after the other, as they would come from a microphone."""
    stream = sl.Loop(step).stream(frames.shape[1])
    with torch.no_grad():
        return torch.stack([stream(frame)[1] for frame in frames])


if __name__ == "__main__":
    torch.manual_seed(0)
    step, frames, labels = example()
    losses = train(step, frames, labels, torch.tensor([30, 30, 20, 10]))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print("row 0, given  ", labels[:, 0].tolist())
    print("row 0, decoded", decode(step, frames)[:, 0].tolist())
