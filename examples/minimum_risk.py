"""Minimum-risk training (Shen et al. 2016, arXiv:1512.02433): a decoder learns to repeat a word from its errors alone.

    python examples/minimum_risk.py

For every word some hypotheses are drawn; their edit distances to the word are the costs. What is made small is the
expected cost under the model's own distribution over those hypotheses: no label is ever imposed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import steploop as sl

END, START, LABELS, SIZE = 0, 1, 6, 24


class Repeater(sl.Step):
    """A GRU that is started with a vector of the word."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LABELS, SIZE)
        self.cell = sl.nn.GRUCell(2 * SIZE, SIZE)
        self.words = nn.Linear(3 * LABELS, SIZE)
        self.head = nn.Linear(SIZE, LABELS)

    def step(self, label: Tensor, *, word: Tensor) -> Tensor:
        read = torch.tanh(self.words(word))
        return self.head(self.cell(torch.cat([self.embedding(label), read], -1)))


def batch_of_words(count: int, generator: torch.Generator) -> Tensor:
    """(count, 3) labels without start and end."""
    return torch.randint(2, LABELS, (count, 3), generator=generator)


def one_hot(words: Tensor) -> Tensor:
    return nn.functional.one_hot(words, LABELS).flatten(1).float()


def distance(found: list[int], wanted: list[int]) -> int:
    """Levenshtein's."""
    row = list(range(len(wanted) + 1))
    for i, label in enumerate(found, 1):
        before, row = row, [i]
        for j, other in enumerate(wanted, 1):
            row.append(min(row[-1] + 1, before[j] + 1, before[j - 1] + (label != other)))
    return row[-1]


def costs(hyps: sl.search.Hypotheses, words: Tensor) -> Tensor:
    """(B, N) edit distances."""
    pairs = zip(hyps.labels.tolist(), hyps.lengths.tolist(), words.tolist(), strict=True)
    return torch.tensor([[float(distance(y[:n], w)) for y, n in zip(row, ns, strict=True)] for row, ns, w in pairs])


def train(updates: int, words_at_once: int = 32, samples: int = 8, seed: int = 0) -> tuple[Repeater, list[float]]:
    """The model, and the mean cost of its samples at every update."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, history = Repeater(), []
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(updates):
        words = batch_of_words(words_at_once, generator)
        given = {"start": START, "end": END, "word": one_hot(words)}
        hyps = sl.search.sample(model, max_steps=5, samples=samples, generator=generator, **given)
        cost = costs(hyps, words)
        log_probs = sl.search.rescore(model, hyps.labels, hyps.lengths, finished=hyps.finished, **given)
        share = torch.softmax(0.5 * log_probs, 1)  # Shen et al.'s sharpness
        risk = (share * (cost - cost.mean(1, keepdim=True))).sum(1).mean()
        optimiser.zero_grad()
        risk.backward()
        optimiser.step()
        history.append(float(cost.mean()))
    return model, history


def main() -> None:
    model, history = train(updates=400)
    for i in range(0, len(history), 50):
        print(f"after {i:4d} updates: {history[i]:.2f} edits a word")
    words = batch_of_words(4, torch.Generator().manual_seed(7))
    hyps = sl.search.beam(model, start=START, end=END, max_steps=6, size=4, word=one_hot(words))
    for word, found in zip(words.tolist(), hyps.to_lists(), strict=True):
        print(word, "->", found[0])


if __name__ == "__main__":
    main()
