"""rescore: differentiable log-probabilities of label sequences that are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ..errors import InputError, describe, message
from ..inputs import constant_leaves
from ..loop import Loop
from ..step import Step, Unbatched, unbatched
from ..tracebacks import ends_at_the_call
from ..tree import unflatten
from .copies import picked, spread
from .labels import check_targets, explained_labels
from .prefix import Prefix
from .started import taken_apart


@ends_at_the_call
def rescore(
    model: Step | Loop[Any],
    labels: Tensor,
    lengths: Tensor,
    *,
    start: int | Tensor,
    end: int | None = None,
    finished: Tensor | None = None,
    scores: Any = None,
    normalised: bool = False,
    prefix: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    xs: Any = (),
    state: Any = None,
    backend: str = "auto",
    per_label: bool = False,
    **constants: Any,
) -> Tensor:
    """The model's log-probabilities of hypotheses, from one run over whole sequences: they can be differentiated.

        hyps = sl.search.sample(model, start=bos, end=eos, max_steps=60, samples=5, memory=memory)
        log_probs = sl.search.rescore(model, hyps.labels, hyps.lengths, start=bos, end=eos, finished=hyps.finished,
                                      memory=memory)                       # (B, N), equal to hyps.log_probs

    labels:   (B, N, L) integers, or (B, L): one for each row.  lengths: (B, N) or (B,): labels that count.
    start:    the label before the first, or (B,).
    end:      where it is given, its log-probability after the last label counts too, for hypotheses that `finished`
              (a bool tensor like lengths; None: all) says have it.
    per_label: gives (B, N, L + 1) instead, one for each label and one for the end; zeros beyond.
    prefix, prefix_lengths, xs, state, scores, normalised, constants: as for `sl.search.greedy`. A prefix counts
              nothing itself; a row whose prefix has an end has log-probability 0.

    Returns (B, N), or (B,) for labels (B, L). Raises InputError for labels and lengths that do not fit. Where there was
    no hypothesis (`hyps.scores` is -inf) it gives that of the labels that stand there, 0 for none: leave those out.
    """
    model, state, constants = taken_apart(model, state, constants)
    lone = labels.dim() == 2
    labels, lengths = (labels.unsqueeze(1), lengths.unsqueeze(1)) if lone else (labels, lengths)
    if labels.dim() != 3 or labels.shape[:2] != lengths.shape or labels.is_floating_point():
        found = f"{describe(labels)} and {describe(lengths)}"
        wanted = "labels (B, N, L) and lengths (B, N), or (B, L) and (B,), integers"
        raise InputError(message("Labels and lengths of hypotheses do not fit together.", expected=wanted, found=found))
    batch, count, steps = labels.shape
    first = torch.as_tensor(start, dtype=torch.int64, device=labels.device).expand(batch)
    lengths = lengths.to(labels.device)
    ends = torch.full_like(lengths, int(end is not None))
    if end is not None and finished is not None:
        ends = finished.reshape(lengths.shape).to(ends)
    xs = xs if isinstance(xs, (tuple, list)) else (xs,)
    if prefix is not None:
        before = Prefix(prefix, prefix_lengths, end)
        first, state = _after_prefix(model, before, first, xs, state, backend, constants)
        goes_on = ~before.ended.to(labels.device).unsqueeze(1)
        lengths, ends = lengths * goes_on, ends * goes_on
    lengths, ends = lengths.flatten(), ends.flatten()
    given = labels.flatten(0, 1).T.to(torch.int64)
    given = torch.where(_steps(given, steps) < lengths, given, 0)
    inputs = torch.cat([first.repeat_interleave(count).unsqueeze(0), given])
    longest = _longest(xs, lengths + ends, steps + 1)
    sequences = pytree.tree_map_only(Tensor, lambda x: x[:longest].repeat_interleave(count, 1), tuple(xs))
    constants = {name: _spread(value, count) for name, value in constants.items()}
    state = None if state is None else {name: spread(value, count) for name, value in state.items()}
    with explained_labels(start=start, labels=given):
        output, _ = Loop(model, backend=backend)(
            inputs[:longest], *sequences, lengths=lengths + ends, state=state, **constants
        )
    log_probs = picked(output, scores)
    log_probs = log_probs if normalised else torch.log_softmax(log_probs, -1)
    chosen = F.pad(_chosen(log_probs, given, lengths, ends, end).T, (0, steps + 1 - longest))
    found = (chosen if per_label else chosen.sum(1)).unflatten(0, (batch, count))
    return found.squeeze(1) if lone else found


def _after_prefix(
    model: Step | Loop[Any], prefix: Prefix, first: Tensor, xs: Any, state: Any, backend: str, constants: dict[str, Any]
) -> tuple[Tensor, Any]:
    """The label before the hypotheses, and the model's States there."""
    if xs:
        raise InputError(message("Hypotheses over given sequences have no prefix.", expected="xs= or prefix="))
    with explained_labels(start=first, prefix=prefix.labels):
        _, after = Loop(model, backend=backend)(
            prefix.read(first), lengths=prefix.lengths.to(first.device), state=state, **constants
        )
    return prefix.last(first), after


def _steps(like: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=like.device).unsqueeze(1)


def _chosen(log_probs: Tensor, labels: Tensor, lengths: Tensor, ends: Tensor, end: int | None) -> Tensor:
    """(T, R) the log-probabilities of labels (L, R) and of the end after them, zero where neither is."""
    check_targets(labels, log_probs.shape[-1])
    places = _steps(labels, len(log_probs))
    targets = torch.cat([labels, torch.zeros_like(lengths).unsqueeze(0)])[: len(log_probs)]
    if end is not None:
        targets = torch.where(places == lengths, end, targets)
    chosen = log_probs.gather(2, targets.unsqueeze(2)).squeeze(2)
    return torch.where(places < lengths + ends, chosen, torch.zeros_like(chosen))


def _longest(xs: Any, taken: Tensor, steps: int) -> int:
    """Steps that are there. xs: sequences that the model reads beside labels; taken: steps of every hypothesis."""
    times = [len(x) for x in pytree.tree_leaves(xs) if isinstance(x, Tensor)]
    most = int(taken.max()) if taken.numel() else 0
    if times and most > min(times):
        raise InputError(
            message(
                "The sequences of `xs` are shorter than the hypotheses.",
                expected=f"{most} steps: one for every label, and for the end",
                found=f"{min(times)} steps",
            )
        )
    return min([steps, *times])


def _spread(value: Any, count: int) -> Any:
    if isinstance(value, Unbatched):
        return value
    tensors, structure, batched, _ = constant_leaves({"it": value})
    if all(batched):
        return spread(value, count)
    leaves = [spread(t, count) if has_rows else unbatched(t) for t, has_rows in zip(tensors, batched, strict=True)]
    return unflatten(leaves, structure)["it"]
