"""Reading a recipe's checkpoint: a file of plain values and tensors, and what is wrong with one that is none."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError

BEST = "best.ckpt"


def read_checkpoint(path: Path, recipe: str, format: str) -> dict[str, Any]:
    """All that the file holds; its entry `recipe` is a card of this format.

    Raises DataError if there is no such file or it is not a checkpoint of this recipe.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a pickle that is refused, "file an issue with torch"
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"No such checkpoint: {path}\n  fix:      steploop train {recipe} makes one") from None
    except Exception as error:  # torch.load raises half a dozen types for a file that is none of its own
        raise DataError(f"{path} is not a checkpoint: {_why_not(path, error)}") from None
    card = content.get(recipe) if isinstance(content, dict) else None
    if not isinstance(card, dict) or card.get("format") != format:
        raise DataError(f"{path} is a checkpoint of another model: it holds no {format!r}.")
    return content


def save_weights(weights: dict[str, Tensor], path: Path, card: dict[str, str]) -> None:
    """A safetensors file; the one that was there stays until the new one is whole."""
    from safetensors.torch import save_file

    unfinished = path.with_name(f"{path.name}.unfinished")
    save_file({name: value.contiguous() for name, value in weights.items()}, unfinished, card)
    publish(unfinished, path)


def publish(unfinished: Path, path: Path) -> None:
    """Move a file to its place once the disk has all of it: after a power cut the old file is there, or the new one."""
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _why_not(path: Path, error: Exception) -> str:
    """In our words: torch's message for such files ends with advice to turn its check off."""
    if path.is_dir():
        return "it is a folder."
    if path.stat().st_size == 0:
        return "it is empty.\n  fix:      another checkpoint of the run, or train again"
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than plain values and tensors, or no such thing; what could run code is not loaded."
    return "it is cut short, or of another kind.\n  fix:      another checkpoint of the run, or train again"
