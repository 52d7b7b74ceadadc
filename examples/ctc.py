"""Speech in small: a bidirectional layer-norm LSTM learns labels from noisy frames with the CTC loss.

    python examples/ctc.py

Each label sounds for 2 to 4 frames, and nobody says for how many. Lengths are unequal; padding is never computed.
The label error rate is an edit distance, which is an operation of `sl.memory`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steploop as sl

BLANK, LABELS, FEATURES = 0, 6, 8


class Recogniser(nn.Module):
    """frames (T, B, FEATURES), lengths (B,) -> log-probabilities (T, B, LABELS)."""

    def __init__(self, units: int = 24) -> None:
        super().__init__()
        cells = (sl.nn.LayerNormLSTMCell(FEATURES, units) for _ in range(2))
        self.both_ways, self.output = sl.nn.Bidirectional(*cells), nn.Linear(2 * units, LABELS)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        ys, _ = self.both_ways(frames, lengths=lengths)
        return self.output(ys).log_softmax(-1)


def batch(rows: int, sounds: Tensor, longest: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """frames (T, B, FEATURES), their lengths (B,), labels (B, U), their lengths (B,)."""
    counts = torch.randint(2, longest + 1, (rows,))
    labels = torch.randint(1, LABELS, (rows, longest))
    said = [row[:n].repeat_interleave(torch.randint(2, 5, (int(n),))) for row, n in zip(labels, counts, strict=True)]
    frames = nn.utils.rnn.pad_sequence([sounds[s] for s in said])
    return frames + 0.5 * torch.randn_like(frames), torch.tensor([len(s) for s in said]), labels, counts


def best_path(scores: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The best label of each frame (T, B), and where it counts: no blank, no repetition, no padding."""
    best = scores.argmax(-1)
    before = torch.cat([torch.full_like(best[:1], BLANK), best[:-1]])
    inside = torch.arange(len(best))[:, None] < lengths
    return best, (best != BLANK) & (best != before) & inside


def error_rate(scores: Tensor, lengths: Tensor, labels: Tensor, counts: Tensor) -> float:
    """Edit distance over the number of labels. The frames that count are the valid steps of the distance."""
    found, counts_here = best_path(scores, lengths)
    distance = sl.Loop(sl.memory.EditDistance())
    row, _ = distance.last_output(found, mask=counts_here, target=labels, target_lengths=counts)
    wrong = torch.where(counts_here.any(0), row[:, -1], counts)  # nothing found: every label is missing
    return (wrong.sum() / counts.sum()).item()


def train(updates: int, rows: int = 24) -> tuple[list[float], float]:
    """The losses, and the label error rate on rows that were not trained on."""
    sounds = torch.randn(LABELS, FEATURES)
    model = Recogniser()
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.02), []
    for _ in range(updates):
        frames, lengths, labels, counts = batch(rows, sounds)
        loss = F.ctc_loss(model(frames, lengths), labels, lengths, counts, blank=BLANK, zero_infinity=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        frames, lengths, labels, counts = batch(100, sounds)
        return losses, error_rate(model(frames, lengths), lengths, labels, counts)


def example() -> tuple[sl.Step, Tensor]:
    """What `steploop explain` runs: the step of one direction and its inputs."""
    return sl.nn.LayerNormLSTMCell(FEATURES, 24), torch.randn(20, 24, FEATURES)


if __name__ == "__main__":
    torch.manual_seed(0)
    losses, rate = train(120)
    print(f"CTC loss {losses[0]:.2f} -> {losses[-1]:.2f}, label error rate {rate:.1%}")
