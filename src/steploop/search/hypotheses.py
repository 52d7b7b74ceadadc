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
    after, before = _slots(outputs["parent"], taken, slot)
    here = taken.unsqueeze(2)
    label, log_prob = outputs["label"].gather(2, after), outputs["log_prob"].gather(2, after)
    label = torch.where(here, label, label.new_full((), 0 if end is None else end))
    log_prob = torch.where(here, log_prob, torch.zeros_like(log_prob))
    at = before.flatten(0, 1)
    kept = pytree.tree_map(lambda leaf: _last(of_slot(leaf.flatten(0, 1), at), before), outputs["kept"])
    return label.movedim(0, 2), log_prob.movedim(0, 2), kept


def _slots(parents: Tensor, taken: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """(T, B, N) each: where hypotheses that end in `slot` (B, N) stood after and before every step.

    parents: (T, B, K), where each one stood before it.
    """
    own = torch.arange(parents.shape[2], device=parents.device)
    parents = torch.where(taken.unsqueeze(2), parents, own)
    found = [slot]
    if bool((parents == own).all()):
        found *= len(parents) + 1
    else:
        for parent in reversed(parents.unbind()):
            found.append(parent.gather(1, found[-1]))
    every = torch.stack(found[::-1])
    return every[1:], every[:-1]


def _last(value: Tensor, like: Tensor) -> Tensor:
    """(T * B, N, ...) as (B, N, T, ...)."""
    return value.unflatten(0, like.shape[:2]).movedim(0, 2)


def of_slot(value: Tensor, slot: Tensor) -> Tensor:
    """value (B, K, ...) at slot (B, N)."""
    index = wide(slot, value).expand(*slot.shape, *value.shape[2:])
    return value.gather(1, index)
