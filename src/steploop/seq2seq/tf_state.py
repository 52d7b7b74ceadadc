"""States of a decoder as TF1 has them: tensors, LSTMStateTuples, tuples of layers; and as our Loops do.

A cell's `state_size` has the structure of its TF state, with a number of features in the place of each tensor.
Behind it stand the cell's States, in order: a TF tensor is one of them, or several side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InputError, StateError, describe, message
from ..step import Step, states_below


class LSTMStateTuple(NamedTuple):
    """The state of an LSTM: c before h."""

    c: Any
    h: Any


def state_names(cell: Step) -> list[str]:
    """The paths of the cell's States, in the order in which TF flattens its state."""
    return [name for name, _ in states_below(cell)]


def state_widths(cell: Step) -> list[int]:
    """The number of features of each of them. InputError for a State that is no vector."""
    widths = []
    for name, state in states_below(cell):
        if state.unsized or len(state.shape) != 1:
            raise InputError(
                message(
                    f"{type(cell).__name__} has a State '{name}' that is no vector.",
                    expected="States (B, features): TF1's states have two axes",
                    found=f"sl.State({'...' if state.unsized else ', '.join(map(str, state.shape))})",
                )
            )
        widths.append(state.shape[0])
    return widths


def state_size(cell: Step) -> Any:
    """The cell's own `state_size`; for any other Step one number, or a tuple with one per State."""
    size = getattr(cell, "state_size", None)
    if size is None:
        widths = state_widths(cell)
        size = widths[0] if len(widths) == 1 else tuple(widths)
    return size


def output_size(cell: Step) -> int:
    """The number of features of what the cell returns. InputError where the cell does not say it."""
    for name in ("output_size", "proj_size", "hidden_size"):
        size = getattr(cell, name, None)
        if size:
            return size
    raise InputError(
        message(
            f"{type(cell).__name__} does not say how many features it returns.",
            expected="an attribute output_size",
            fix="self.output_size = ...  in the cell's __init__",
        )
    )


def zero_state(cell: Step, batch_size: int, dtype: torch.dtype | None = None) -> Any:
    """A TF state of zeros, on the device of the cell's parameters."""
    device = next((p.device for p in cell.parameters()), torch.device("cpu"))
    return pytree.tree_map(lambda n: torch.zeros(batch_size, n, dtype=dtype, device=device), state_size(cell))


def pack(cell: Step, values: Sequence[Tensor]) -> Any:
    """The TF state that the values of the cell's States (B, features) make up."""
    sizes, structure = pytree.tree_flatten(state_size(cell))
    widths, rest = state_widths(cell), list(values)
    leaves = []
    for size in sizes:
        count = _how_many(widths, size)
        part, rest, widths = rest[:count], rest[count:], widths[count:]
        leaves.append(part[0] if count == 1 else torch.cat(part, -1))
    return pytree.tree_unflatten(leaves, structure)


def unpack(cell: Step, state: Any) -> list[Tensor]:
    """The values of the cell's States in a TF state, or in a dict of them by path. StateError where it does
    not fit."""
    if isinstance(state, Mapping):
        names = state_names(cell)
        if set(names) != set(state):
            raise StateError(_does_not_fit(cell, sorted(state)))
        return [state[name] for name in names]
    sizes, leaves = pytree.tree_leaves(state_size(cell)), pytree.tree_leaves(state)
    fits = len(sizes) == len(leaves) and all(
        isinstance(leaf, Tensor) and leaf.dim() == 2 and leaf.shape[1] == size for leaf, size in zip(leaves, sizes)
    )
    if not fits:
        raise StateError(_does_not_fit(cell, [describe(leaf) for leaf in leaves]))
    values: list[Tensor]
    widths, values = state_widths(cell), []
    for leaf, size in zip(leaves, sizes):
        count = _how_many(widths, size)
        values += leaf.split(widths[:count], -1) if count > 1 else [leaf]
        widths = widths[count:]
    return values


def _how_many(widths: list[int], size: int) -> int:
    """How many of the States stand side by side in a tensor of `size` features."""
    count, total = 1, widths[0]
    while total < size:
        total += widths[count]
        count += 1
    return count


def _does_not_fit(cell: Step, found: list[str]) -> str:
    return message(
        f"The initial state is not one of {type(cell).__name__}.",
        expected=f"tensors (B, features) with features as in {state_size(cell)}",
        found="; ".join(found) or "nothing",
        fix="the state that the encoder returned, or steploop.seq2seq.tf_cells.zero_state(cell, batch_size)",
    )
