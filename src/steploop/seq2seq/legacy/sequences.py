"""What goes into and comes out of the legacy models: lists over time or tensors (T, B, ...)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, describe, message
from ...step import Step


def labels(inputs: Any, name: str) -> Tensor:
    """(T, B) int64, from a list of T tensors (B,) or a tensor (T, B). InputError that names the argument."""
    stacked = _stacked(inputs, name, "[B] ids")
    if stacked.dim() != 2 or stacked.is_floating_point() or stacked.dtype == torch.bool:
        raise InputError(
            message(
                f"{name}: not a sequence of labels.",
                expected="(T, B) integers, or a list of T tensors (B,)",
                found=describe(stacked),
            )
        )
    return stacked.to(torch.int64)


def vectors(inputs: Any, name: str, size: int) -> Tensor:
    """(T, B, size), from a list of T tensors (B, size) or a tensor."""
    stacked = _stacked(inputs, name, "[B, I] floats")
    if stacked.dim() != 3 or stacked.shape[2] != size or not stacked.is_floating_point():
        raise InputError(
            message(
                f"{name}: not a sequence of vectors of this size.",
                expected=f"(T, B, {size}) floats, or a list of T tensors (B, {size})",
                found=describe(stacked),
                fix="input_size= where the model is made" if stacked.dim() == 3 else None,
            )
        )
    return stacked


def _stacked(inputs: Any, name: str, of: str) -> Tensor:
    if isinstance(inputs, Tensor):
        return inputs
    if not isinstance(inputs, (list, tuple)) or not all(isinstance(x, Tensor) for x in inputs):
        found = [describe(x) for x in inputs if not isinstance(x, Tensor)] if is_listed(inputs) else None
        raise InputError(
            message(
                f"{name}: neither a tensor nor a list of tensors over time.",
                expected=f"(T, B, ...), or a list of T tensors {of}",
                found=f"a list with {found[0]}" if found else describe(inputs),
                fix="torch.as_tensor(array)",
            )
        )
    if not inputs:
        raise InputError(
            message(
                f"{name}: an empty list.",
                expected="at least one step; nothing else tells the size of the batch",
                found="[]",
                fix="a tensor of shape (0, B, ...) for no steps at all",
            )
        )
    if any(x.shape != inputs[0].shape for x in inputs):
        raise InputError(
            message(
                f"{name}: the steps differ in shape.",
                expected=f"{describe(inputs[0])} at every step",
                found=describe(next(x for x in inputs if x.shape != inputs[0].shape)),
            )
        )
    return torch.stack(list(inputs))


def is_listed(inputs: Any) -> bool:
    """Whether outputs go back as a list over time."""
    return isinstance(inputs, (list, tuple))


def as_given(outputs: Tensor, inputs: Any) -> Tensor | list[Tensor]:
    """Outputs (T, B, ...) in the form in which `inputs` came."""
    return list(outputs.unbind(0)) if is_listed(inputs) else outputs


def first_steps(inputs: Any, count: int) -> Any:
    """The first `count` steps."""
    return inputs[:count]


def size_of_inputs(owner: str, cell: Step, given: int | None, name: str = "input_size") -> int:
    """`given`, or what the cell was made for. InputError where nothing says it."""
    size = getattr(cell, "input_size", None) if given is None else given
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    raise InputError(
        message(
            f"{owner} has to know how many features its inputs have.",
            expected=f"{name}=, or a cell that was made with it",
            found=describe(size),
            fix=f"{owner}(cell, ..., {name}=8)",
        )
    )


def check_same_length(what: str, lengths: dict[str, Sequence[Any]]) -> None:
    """InputError unless all have the same number of steps."""
    if len({len(value) for value in lengths.values()}) > 1:
        raise InputError(
            message(
                f"{what}: {', '.join(lengths)} differ in the number of steps.",
                expected="the same number of steps in each",
                found=", ".join(f"{name}: {len(value)}" for name, value in lengths.items()),
            )
        )
