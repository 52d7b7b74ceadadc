"""PackedSequence in and out: padded for the loop, packed again exactly as the input was. And the last outputs."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from .errors import InputError, message
from .marks import wide


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
    return tuple(padded), cast(Tensor, own_lengths), first


def _same_rows(a: PackedSequence, b: PackedSequence) -> bool:
    orders = [p.sorted_indices for p in (a, b)]
    if (orders[0] is None) != (orders[1] is None):
        return False
    same = a.batch_sizes.tolist() == b.batch_sizes.tolist()
    return same and (orders[0] is None or bool(cast(Tensor, orders[0] == orders[1]).all()))


def pack(output: Tensor, like: PackedSequence, lengths: Tensor) -> PackedSequence:
    """A (T, B, ...) output packed in the order of `like`."""
    if like.sorted_indices is not None:
        output = output.index_select(1, like.sorted_indices)
        lengths = lengths[like.sorted_indices.cpu()]
    data, _ = torch._VF._pack_padded_sequence(output, lengths, False)
    return PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)


def last_of(outputs: Any, lengths: Any, mask: Any, reverse: bool, batch_first: bool) -> Any:
    """(B, ...) for every (T, B, ...) of a pytree of outputs: the one at each row's last valid step in running order.

    A row without a valid step has zeros. lengths, mask: those of the call, and its options.
    """
    if mask is not None:
        mask = torch.as_tensor(mask)
        mask = mask.transpose(0, 1) if batch_first else mask

    def last(output: Any) -> Any:
        own = lengths
        if isinstance(output, PackedSequence):
            output, own = pad_packed_sequence(output)
        elif isinstance(output, Tensor) and batch_first:
            output = output.transpose(0, 1)
        return _last(output, own, mask, reverse) if isinstance(output, Tensor) else output

    return pytree.tree_map(last, outputs, is_leaf=lambda value: isinstance(value, PackedSequence))


def _last(output: Tensor, lengths: Any, mask: Tensor | None, reverse: bool) -> Tensor:
    steps = output.shape[0]
    if steps == 0:
        return output.new_zeros(output.shape[1:])
    lengths = None if lengths is None else torch.as_tensor(lengths, device=output.device)
    if mask is None:
        if reverse or lengths is None:  # padding is on the right
            return output[0 if reverse else -1]
        at = (lengths - 1).clamp(min=0)
    else:
        valid = mask.to(output.device)
        if lengths is not None:
            valid = valid & (torch.arange(steps, device=output.device)[:, None] < lengths)
        valid = valid.to(torch.uint8)
        at = valid.argmax(0) if reverse else steps - 1 - valid.flip(0).argmax(0)
    # A row without a valid step has zeros everywhere.
    at = wide(at.to(torch.int64).unsqueeze(0), output)
    return output.gather(0, at.expand(1, *output.shape[1:]))[0]
