"""PackedSequence in and out: padded for the loop, packed again exactly as the input was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from .errors import InputError, message


def unpack(xs: tuple[Any, ...], lengths: Any) -> tuple[tuple[Any, ...], Tensor, PackedSequence]:
    """PackedSequences padded to (T, B, ...), and lengths (B,), both in the caller's order."""
    if lengths is not None:
        raise InputError(
            message(
                "`lengths=` was given with a PackedSequence, which carries its own.",
                expected="one of the two",
                fix="leave out lengths=",
            )
        )
    packed = [x for x in xs if isinstance(x, PackedSequence)]
    first = packed[0]
    for other in packed[1:]:
        if not _same_rows(first, other):
            raise InputError(
                message(
                    "Two PackedSequences of one call have different lengths or orders.",
                    expected=f"batch_sizes {first.batch_sizes.tolist()}",
                    found=f"batch_sizes {other.batch_sizes.tolist()}",
                    fix="pack both with the same lengths and the same enforce_sorted",
                )
            )
    padded = []
    own_lengths = None
    for x in xs:
        if isinstance(x, PackedSequence):
            x, own_lengths = pad_packed_sequence(x)
        padded.append(x)
    return tuple(padded), own_lengths, first


def _same_rows(a: PackedSequence, b: PackedSequence) -> bool:
    orders = [p.sorted_indices for p in (a, b)]
    if (orders[0] is None) != (orders[1] is None):
        return False
    same = a.batch_sizes.tolist() == b.batch_sizes.tolist()
    return same and (orders[0] is None or bool((orders[0] == orders[1]).all()))


def pack(output: Tensor, like: PackedSequence, lengths: Tensor) -> PackedSequence:
    """A (T, B, ...) output packed in the order of `like`."""
    if like.sorted_indices is not None:
        output = output.index_select(1, like.sorted_indices)
        lengths = lengths[like.sorted_indices.cpu()]
    data, _ = torch._VF._pack_padded_sequence(output, lengths, False)
    return PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)
