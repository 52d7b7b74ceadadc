"""Errors about labels that are given to a search from outside: the first, a prefix, hypotheses to score."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, OutsideError, message


@contextmanager
def explained_labels(**given: Any) -> Iterator[None]:
    """An index that is outside while the model reads labels is most often one of those: the error names them."""
    try:
        yield
    except IndexError as error:
        raise OutsideError(
            message(
                f"The model was given a label that it does not know, or has an index outside: {_first(error)}",
                expected="labels that the model's tables hold",
                found=", ".join(f"{name} {_range(value)}" for name, value in given.items() if value is not None),
            )
        ) from error


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0]


def counts(name: str, value: Any) -> Tensor:
    """A number, or one for each row, as int64. name: of the argument, for the error."""
    given = torch.as_tensor(value)
    if given.is_floating_point() or given.dtype == torch.bool or given.dim() > 1 or bool((given < 0).any()):
        raise InputError(
            message(f"`{name}` is a number, or one for each row.", expected="int >= 0, or (B,) ints", found=str(value))
        )
    return given.to(torch.int64)


def check_targets(labels: Tensor, size: int) -> None:
    """InputError unless a model that gives `size` scores gives one for each of these labels."""
    if bool(((labels < 0) | (labels >= size)).any()):
        raise InputError(
            message(
                "There are labels without a score.", expected=f"from 0 to {size - 1}", found=f"labels {_range(labels)}"
            )
        )


def _range(value: Any) -> str:
    labels = torch.as_tensor(value)
    if labels.numel() == 0:
        return "without labels"
    least, most = int(labels.min()), int(labels.max())
    return f"{most}" if least == most else f"from {least} to {most}"
