"""Batches of sequences of unequal lengths: buckets of fixed sizes, or padding to the longest; and their waste.

An example is one sequence (a tensor (T, ...), a list of numbers, an array), or a tuple of them, such as (source,
target). `waste` is the share of positions that are padding: 0 where nothing is.

    buckets = bucket_by_length(dataset, [(5, 10), (10, 15), (20, 25), (40, 50)])
    loader = DataLoader(dataset, batch_sampler=buckets.sampler(64), collate_fn=buckets.collate)

    lengths = lengths_of(dataset)
    loader = DataLoader(dataset, batch_sampler=LengthBatchSampler(lengths, 64), collate_fn=pad_to_longest)

Buckets were needed where every length was a graph of its own. Here a Loop runs any length, and `lengths=` runs no
padding at all; docs/legacy.md compares the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import InputError, describe, message
from .samplers import BucketBatchSampler

Size = tuple[int, ...]


class Padded(NamedTuple):
    """values: (T, B, ...), padded at the end.  lengths: (B,) int64."""

    values: Tensor
    lengths: Tensor

    @property
    def waste(self) -> float:
        """The share of (T, B) that is padding."""
        return waste_of(int(self.lengths.sum()), self.values.shape[0] * self.values.shape[1])


def waste_of(filled: int, total: int) -> float:
    """The share of `total` positions that is not filled; 0 of none."""
    return 1 - filled / total if total else 0.0


def lengths_of(dataset: Sequence[Any]) -> Tensor:
    """(N, sequences of an example) int64: the length of every sequence."""
    lengths = [[len(part) for part in _parts(dataset[i])] for i in range(len(dataset))]
    if len({len(row) for row in lengths}) > 1:
        raise InputError(
            message(
                "The examples do not all have the same number of sequences.",
                expected=f"{len(lengths[0])} in each, as in the first",
                found=str(sorted({len(row) for row in lengths})),
            )
        )
    parts = len(lengths[0]) if lengths else 1
    return torch.tensor(lengths, dtype=torch.int64, device="cpu").reshape(len(lengths), parts)


def pad_to_longest(examples: Sequence[Any], pad: float = 0) -> Any:
    """A batch, padded to its longest example: a Padded, or a tuple of one for each sequence of an example.

    A collate_fn for DataLoader. pad: what stands after a sequence's end.
    """
    return _padded(examples, None, pad)


def bucket_by_length(dataset: Sequence[Any], buckets: Sequence[int | Size], pad: float = 0) -> Buckets:
    """Which example goes into which bucket: the first one that holds it.

    dataset: examples by index.  buckets: sizes, from the smallest to the largest: a number, or for examples of
        several sequences a tuple with one for each, such as (source, target).
    pad: what stands after a sequence's end.
    Returns Buckets; examples that the last bucket does not hold are in its `left_out`, and in no bucket.
    Raises InputError for sizes that do not fit the examples, or are not in order.
    """
    sizes = [size if isinstance(size, tuple) else (size,) for size in map(_as_size, buckets)]
    lengths = lengths_of(dataset)
    _check(sizes, lengths)
    indices: list[list[int]] = [[] for _ in sizes]
    left_out: list[int] = []
    for index, row in enumerate(lengths.tolist()):
        found = next((k for k, size in enumerate(sizes) if _holds(size, row)), None)
        (left_out if found is None else indices[found]).append(index)
    return Buckets(sizes, lengths, indices, left_out, pad)


@dataclass
class Buckets:
    """The examples of a dataset by bucket.

    sizes:    each bucket's, one number for each sequence of an example.  lengths: (N, sequences).
    indices:  the examples in each bucket.  left_out: those that are too long for every bucket.
    """

    sizes: list[Size]
    lengths: Tensor = field(repr=False)
    indices: list[list[int]] = field(repr=False)
    left_out: list[int] = field(repr=False)
    pad: float = 0

    @property
    def waste(self) -> float:
        """The share of padding over all buckets, every example once."""
        filled, total = (sum(column) for column in zip(*map(self._positions, range(len(self.sizes)))))
        return waste_of(filled, total)

    @property
    def waste_by_bucket(self) -> list[float]:
        """The share of padding in each bucket."""
        return [waste_of(*self._positions(k)) for k in range(len(self.sizes))]

    def _positions(self, bucket: int) -> tuple[int, int]:
        """Filled positions, and all."""
        indices = self.indices[bucket]
        return int(self.lengths[indices].sum()), len(indices) * sum(self.sizes[bucket])

    def sampler(self, batch_size: int, **options: Any) -> BucketBatchSampler:
        """Batches of one bucket each, for DataLoader(batch_sampler=...). options: of BucketBatchSampler."""
        return BucketBatchSampler(self.indices, batch_size, **options)

    def bucket_of(self, examples: Sequence[Any]) -> int:
        """The number of the smallest bucket that holds them all. InputError if none does."""
        longest = lengths_of(examples).amax(0).tolist()
        for k, size in enumerate(self.sizes):
            if _holds(size, longest):
                return k
        raise InputError(
            message(
                "An example is too long for every bucket.",
                expected=f"at most {self.sizes[-1]}",
                found=str(tuple(longest)),
                fix="buckets.left_out has the indices of those; buckets.sampler leaves them out",
            )
        )

    def collate(self, examples: Sequence[Any]) -> Any:
        """A batch, padded to the size of its bucket: a Padded, or a tuple of them. A collate_fn for DataLoader."""
        return _padded(examples, self.sizes[self.bucket_of(examples)], self.pad)


def _as_size(size: Any) -> Any:
    return tuple(size) if isinstance(size, (tuple, list)) else size


def _holds(size: Size, lengths: Sequence[int]) -> bool:
    return all(length <= most for length, most in zip(lengths, size))


def _check(sizes: list[Size], lengths: Tensor) -> None:
    count = lengths.shape[1] if len(lengths) else len(sizes[0]) if sizes else 0
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for size in sizes for n in size)
    if not sizes or not whole or any(len(size) != count for size in sizes):
        raise InputError(
            message(
                "buckets: not the sizes of these examples.",
                expected=f"one size or more, of {count} whole numbers each",
                found=repr(sizes),
            )
        )
    if any(not _holds(larger, smaller) for smaller, larger in zip(sizes, sizes[1:])):
        raise InputError(
            message(
                "buckets: not from the smallest to the largest.",
                expected="each at least as large as the one before, in every number",
                found=repr(sizes),
            )
        )


def _parts(example: Any) -> tuple[Any, ...]:
    parts = example if isinstance(example, tuple) else (example,)
    for part in parts:
        if not hasattr(part, "__len__") or isinstance(part, (str, dict)):
            raise InputError(
                message(
                    "An example is no sequence.",
                    expected="a tensor (T, ...), a list of numbers, or a tuple of those",
                    found=describe(part),
                )
            )
    return parts


def _padded(examples: Sequence[Any], size: Size | None, pad: float) -> Any:
    if not examples:
        raise InputError(message("A batch of no examples.", expected="one or more", found="none"))
    parts = list(zip(*map(_parts, examples)))
    made = tuple(_pad(part, None if size is None else size[k], pad) for k, part in enumerate(parts))
    return made if isinstance(examples[0], tuple) else made[0]


def _pad(sequences: Sequence[Any], size: int | None, pad: float) -> Padded:
    tensors = [s if isinstance(s, Tensor) else torch.from_numpy(np.asarray(s)) for s in sequences]
    # shape[0]: the len() of a tensor is a Python function, which would take as long as the padding itself.
    lengths = torch.tensor([t.shape[0] for t in tensors], dtype=torch.int64, device="cpu")
    some = next((t for t in tensors if t.shape[0]), tensors[0])  # an empty list says neither its dtype nor its shape
    tensors = [t if t.shape[0] else some[:0] for t in tensors]
    values = pad_sequence(tensors, padding_value=pad)
    if size is not None and size > values.shape[0]:
        more = values.new_full((size - values.shape[0], *values.shape[1:]), pad)
        values = torch.cat([values, more])
    return Padded(values, lengths)
