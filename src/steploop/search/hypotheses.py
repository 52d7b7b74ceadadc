"""Hypotheses: what a search found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InputError, message
from ..marks import wide
from ..states import States


@dataclass(eq=False)
class Hypotheses:
    """N label sequences for each of B rows, best first; equally good ones by label.

    labels:   (B, N, L) int64, L steps; after a row's end the end label (0 where there is none).
    lengths:  (B, N) int64, labels without the end.
    scores:   (B, N) what they are ranked by: log-probabilities with penalties and scorers. -inf: there is none.
    log_probs: (B, N) the model's own.  label_log_probs: (B, N, L) for every label, the end included; zeros after it.
    finished: (B, N) bool, whether it ended, by the end label; else it was cut.
    proved_best: (B,) bool: no label sequence whatever within the limits has a better score than the first.
    bound:    (B,): no sequence that is not here has a better score; +inf where nothing is known.
    kept:     what `keep` asked for, by its name: (B, N, L, ...); zeros after the end.
    state:    the model's States, rows B * N, before the last label was read; what goes on from them starts with that.
    end:      the end label, or None.
    """

    labels: Tensor
    lengths: Tensor
    scores: Tensor
    log_probs: Tensor
    label_log_probs: Tensor
    finished: Tensor
    proved_best: Tensor
    bound: Tensor
    state: States
    kept: dict[Any, Any] = field(default_factory=dict)
    end: int | None = None

    def best(self) -> Tensor:
        """(B, L) the labels of each row's best hypothesis."""
        return self.labels[:, 0]

    def to_lists(self) -> list[list[list[int]]]:
        """For every row, for every hypothesis that there is, its labels without the end."""
        there = (self.scores > float("-inf")).tolist()
        pairs = zip(self.labels.tolist(), self.lengths.tolist(), there, strict=True)
        return [[y[:n] for y, n, ok in zip(*row, strict=True) if ok] for row in pairs]

    def table(self, vocabulary: Sequence[str] | None = None, separator: str = " ") -> str:
        """The hypotheses of all rows as text, with scores and log-probabilities.

        vocabulary: a word for every label; None: the labels' numbers.  separator: between words.
        """
        if vocabulary is not None and self.labels.numel() and int(self.labels.max()) >= len(vocabulary):
            wanted = f"a word for each label, at least {int(self.labels.max()) + 1}"
            raise InputError(message("The vocabulary is too short.", expected=wanted, found=f"{len(vocabulary)} words"))
        lines = [f"{'row':>4} {'rank':>4} {'score':>10} {'log prob':>10}  labels"]
        for b, row in enumerate(self.to_lists()):
            for n, labels in enumerate(row):
                words = [str(y) if vocabulary is None else str(vocabulary[y]) for y in labels]
                notes = "" if self.finished[b, n] else "  (cut)"
                notes += "  (proved best)" if n == 0 and self.proved_best[b] else ""
                numbers = f"{float(self.scores[b, n]):10.4f} {float(self.log_probs[b, n]):10.4f}"
                lines.append(f"{b:>4} {n + 1:>4} {numbers}  {separator.join(words)}{notes}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        batch, count, steps = self.labels.shape
        return f"Hypotheses(B={batch}, N={count}, L={steps}, {int(self.proved_best.sum())} rows proved best)"


def traced_back(outputs: dict[str, Any], taken: Tensor, slot: Tensor, end: int | None) -> tuple[Tensor, Tensor, Any]:
    """(labels, log-probabilities (B, N, L), kept): the way of the hypotheses that end in `slot` (B, N).

    outputs: of a search's loop, (T, B, K, ...).  taken: (T, B) which rows took a step.
    """
    nothing = slot.new_full((), 0 if end is None else end)
    labels, log_probs, kept = [], [], []
    for t in reversed(range(len(taken))):
        here = taken[t].unsqueeze(1)
        before = torch.where(here, outputs["parent"][t].gather(1, slot), slot)
        labels.append(torch.where(here, outputs["label"][t].gather(1, slot), nothing))
        log_prob = outputs["log_prob"][t].gather(1, slot)
        log_probs.append(torch.where(here, log_prob, torch.zeros_like(log_prob)))
        kept.append(pytree.tree_map(lambda leaf, t=t, at=before: of_slot(leaf[t], at), outputs["kept"]))
        slot = before
    rows = slot.shape
    if not labels:
        empty = outputs["log_prob"].new_zeros(*rows, 0)
        return (
            slot.new_zeros(*rows, 0),
            empty,
            pytree.tree_map(lambda x: x.new_zeros(*rows, 0, *x.shape[3:]), outputs["kept"]),
        )
    stacked = pytree.tree_map(lambda *steps: torch.stack(steps[::-1], 2), *kept)
    return torch.stack(labels[::-1], 2), torch.stack(log_probs[::-1], 2), stacked


def of_slot(value: Tensor, slot: Tensor) -> Tensor:
    """value (B, K, ...) at slot (B, N)."""
    index = wide(slot, value).expand(*slot.shape, *value.shape[2:])
    return value.gather(1, index)
