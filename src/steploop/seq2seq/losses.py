"""TF1's losses of a sequence: sequence_loss and sequence_loss_by_example, with TF's conventions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError, describe, message

Steps = Sequence[Tensor] | Tensor
SoftmaxLoss = Callable[..., Tensor]


def sequence_loss_by_example(
    logits: Steps,
    targets: Steps,
    weights: Steps,
    average_across_timesteps: bool = True,
    softmax_loss_function: SoftmaxLoss | None = None,
) -> Tensor:
    """(B,): each example's weighted cross entropy, sum_t ce w / (sum_t w + 1e-12).

    logits: T tensors (B, V), or (T, B, V).  targets: labels (B,), or (T, B).  weights: (B,), or (T, B).
    average_across_timesteps: False: the sum over time, undivided.
    softmax_loss_function: in the place of the cross entropy: called once with labels= (T B,) and logits=
        (T B, V), the rows of all steps; returns (T B,).
    An example whose weights are all 0 has loss 0. Raises InputError (a ValueError) where the numbers of steps
    differ.
    """
    logits, targets, weights = _stacked(logits, targets, weights)
    rows, labels = logits.flatten(0, 1), targets.flatten().to(torch.int64)
    if softmax_loss_function is None:
        losses = F.cross_entropy(rows, labels, reduction="none")
    else:
        losses = _checked(softmax_loss_function(labels=labels, logits=rows), labels)
    losses = (losses.unflatten(0, weights.shape) * weights).sum(0)
    return losses / (weights.sum(0) + 1e-12) if average_across_timesteps else losses


def sequence_loss(
    logits: Steps,
    targets: Steps,
    weights: Steps,
    average_across_timesteps: bool = True,
    average_across_batch: bool = True,
    softmax_loss_function: SoftmaxLoss | None = None,
) -> Tensor:
    """A number: the sum of `sequence_loss_by_example` over the batch, divided by its size.

    A mean of the examples' means: a short example counts as much as a long one, an example of weight 0 too.
    average_across_batch: False: the sum, undivided. The other arguments as for `sequence_loss_by_example`.
    """
    losses = sequence_loss_by_example(logits, targets, weights, average_across_timesteps, softmax_loss_function)
    return losses.mean() if average_across_batch else losses.sum()


def _stacked(logits: Steps, targets: Steps, weights: Steps) -> tuple[Tensor, Tensor, Tensor]:
    given = {"logits": logits, "targets": targets, "weights": weights}
    counts = {name: len(value) for name, value in given.items()}
    if len(set(counts.values())) > 1:
        raise InputError(
            message(
                "logits, targets and weights must have the same number of steps.",
                expected=f"{counts['logits']} steps, as logits",
                found=", ".join(f"{name}: {count}" for name, count in counts.items()),
            )
        )
    if any(not isinstance(value, Tensor) and not len(value) for value in given.values()):
        raise InputError(message("An empty list of logits.", expected="one step or more", found="[]"))
    logits, targets, weights = (
        value if isinstance(value, Tensor) else torch.stack([torch.as_tensor(step) for step in value])
        for value in given.values()
    )
    if not (logits.dim() == 3 and targets.shape == logits.shape[:2] and weights.shape == logits.shape[:2]):
        raise InputError(
            message(
                "logits, targets and weights do not fit together.",
                expected="logits (T, B, V), targets (T, B), weights (T, B)",
                found=", ".join(describe(value) for value in (logits, targets, weights)),
            )
        )
    return logits, targets, weights


def _checked(losses: Any, labels: Tensor) -> Tensor:
    if isinstance(losses, Tensor) and losses.shape == labels.shape:
        return losses
    raise InputError(
        message(
            "softmax_loss_function returned something that is not one loss per row.",
            expected=f"({labels.shape[0]},), one for each row of labels",
            found=describe(losses),
            fix='F.cross_entropy(logits, labels, reduction="none")',
        )
    )
