"""Greedy search: the label with the highest score, at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..loop import Loop
from ..step import Step
from ..tracebacks import ends_at_the_call
from .hypotheses import Hypotheses
from .run import run_search
from .search import Choice, Search


class Greedy(Search):
    """One hypothesis a row, which goes on with its best label; the first of those that are equally good.

    sl.Loop(Greedy(model, start=bos, end=eos, max_steps=60), until="done"); see `Search` for the options.
    """

    def __init__(self, model: Step | Loop[Any], start: int, end: int | None, max_steps: int, **options: Any) -> None:
        super().__init__(model, start, end, max_steps, copies=1, **options)

    def choose(self, gains: Tensor, output: Any) -> Choice:
        label = gains.argmax(-1)
        return going_on(self, gains, label)


def going_on(search: Search, gains: Tensor, label: Tensor) -> Choice:
    """Each hypothesis with one label more; what has ended stays as it was."""
    gain = gains.gather(2, label.unsqueeze(2)).squeeze(2)
    total = torch.where(search.ended.prev, search.total.prev, search.total.prev + gain)
    return None, label, total, total, {}


@ends_at_the_call
def greedy(
    model: Step | Loop[Any],
    *,
    start: int | Tensor,
    end: int | None,
    max_steps: int | Tensor,
    min_steps: int | Tensor = 0,
    prefix: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    suppress: Any = (),
    allowed: Any = None,
    no_repeat: int = 0,
    scorers: Any = (),
    keep: Any = (),
    scores: Any = None,
    normalised: bool = False,
    xs: tuple[Any, ...] = (),
    state: Any = None,
    batch_size: int | None = None,
    backend: str = "auto",
    **constants: Any,
) -> Hypotheses:
    """Greedy search: `hyps = sl.search.greedy(model, start=bos, end=eos, max_steps=60, memory=memory)`.

    model:     a Step or Loop from the label before this step, (B,) int64, to scores (B, V); see `Search`.
    start:     the label before the first, or one for each row (B,).
    max_steps: labels at most, the end included, or (B,) one number for each row.  min_steps: labels before an end.
    prefix:    (P, B) labels that every hypothesis goes on from, prefix_lengths (B,) of them valid. The model runs
               over them as over a whole sequence. They are no part of the result, its scores or lengths; `no_repeat`
               and `allowed` see them. A row whose prefix has an end already gives an empty hypothesis.
    xs:        further sequences of the model (T, B, ...), one step of them for every label.
    state:     the model's States to go on from.
    suppress, allowed, no_repeat, scorers, keep, scores, normalised: see `Search`.
    constants: the model's, as at a Loop's call.

    Returns Hypotheses with N = 1. A row for which no label was allowed at some step has score -inf.
    Raises InputError; so do scores that are NaN, naming row and step.
    """
    options = {
        "suppress": suppress, "allowed": allowed, "no_repeat": no_repeat, "scorers": scorers, "keep": keep,
        "scores": scores, "normalised": normalised,
    }  # fmt: skip
    return run_search(
        Greedy, model, options, 1, start=start, end=end, max_steps=max_steps, min_steps=min_steps, prefix=prefix,
        prefix_lengths=prefix_lengths, xs=xs, state=state, batch_size=batch_size, backend=backend, constants=constants,
    )  # fmt: skip
