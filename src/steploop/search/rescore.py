"""rescore: differentiable log-probabilities of label sequences that are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, describe, message
from ..inputs import constant_leaves
from ..loop import Loop
from ..step import Step, Unbatched, unbatched
from ..tracebacks import ends_at_the_call
from ..tree import unflatten
from .copies import picked, spread
from .labels import check_targets, explained_labels
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
    scores, normalised, state, constants: as for `sl.search.greedy`.

    Labels are all that the model reads here. A search with a prefix is rescored with the prefix in front of `labels`
    (and `per_label` to leave its part out); one over given sequences is not.

    Returns (B, N), or (B,) for labels (B, L). Raises InputError for labels and lengths that do not fit.
    """
    model, state, constants = taken_apart(model, state, constants)
    lone = labels.dim() == 2
    labels, lengths = (labels.unsqueeze(1), lengths.unsqueeze(1)) if lone else (labels, lengths)
    if labels.dim() != 3 or labels.shape[:2] != lengths.shape or labels.is_floating_point():
        found = f"{describe(labels)} and {describe(lengths)}"
        wanted = "labels (B, N, L) and lengths (B, N), or (B, L) and (B,), integers"
        raise InputError(message("Labels and lengths of hypotheses do not fit together.", expected=wanted, found=found))
    batch, count, steps = labels.shape
    given = labels.flatten(0, 1).T.to(torch.int64)
    lengths = lengths.flatten().to(given.device)
    first = torch.as_tensor(start, dtype=torch.int64, device=given.device).expand(batch).repeat_interleave(count)
    inside = torch.arange(steps, device=given.device).unsqueeze(1) < lengths
    given = torch.where(inside, given, 0)
    inputs = torch.cat([first.unsqueeze(0), given])
    ends = torch.zeros_like(lengths) if end is None else torch.ones_like(lengths)
    if end is not None and finished is not None:
        ends = finished.flatten().to(device=given.device, dtype=torch.int64)
    constants = {name: _spread(value, count) for name, value in constants.items()}
    state = None if state is None else {name: spread(value, count) for name, value in state.items()}
    with explained_labels(start=start, labels=given):
        output, _ = Loop(model, backend=backend)(inputs, lengths=lengths + ends, state=state, **constants)
    log_probs = picked(output, scores)
    check_targets(given, log_probs.shape[-1])
    log_probs = log_probs if normalised else torch.log_softmax(log_probs, -1)
    targets = torch.cat([given, given.new_zeros(1, batch * count)])
    places = torch.arange(steps + 1, device=given.device).unsqueeze(1)
    if end is not None:
        targets = torch.where(places == lengths, end, targets)
    chosen = log_probs.gather(2, targets.unsqueeze(2)).squeeze(2)
    chosen = torch.where(places < lengths + ends, chosen, torch.zeros_like(chosen))
    found = (chosen.T if per_label else chosen.sum(0)).unflatten(0, (batch, count))
    return found.squeeze(1) if lone else found


def _spread(value: Any, count: int) -> Any:
    if isinstance(value, Unbatched):
        return value
    tensors, structure, batched, _ = constant_leaves({"it": value})
    if all(batched):
        return spread(value, count)
    leaves = [spread(t, count) if has_rows else unbatched(t) for t, has_rows in zip(tensors, batched, strict=True)]
    return unflatten(leaves, structure)["it"]
