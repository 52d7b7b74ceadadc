"""Errors about labels that are given to a search from outside: the first, a prefix, hypotheses to score."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import OutsideError, message


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


def _range(value: Any) -> str:
    labels = torch.as_tensor(value)
    if labels.numel() == 0:
        return "without labels"
    least, most = int(labels.min()), int(labels.max())
    return f"{most}" if least == most else f"from {least} to {most}"
