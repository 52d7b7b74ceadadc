"""Batches of examples of like lengths, shuffled: the same in every process and for every seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..errors import InputError, describe, message

T = TypeVar("T")


class _BatchSampler(Sampler[list[int]]):
    """For DataLoader(batch_sampler=...). All processes make the same batches and take turns in taking them.

    batch_size: examples in a batch.  shuffle: in another order in every epoch, see `set_epoch`; else as they are.
    seed:       with the epoch it decides the order; the same in all processes.
    drop_last:  leave out what does not fill a batch, and batches that do not go round among the processes. Else
                the last batches are smaller, and the first ones are given out again until every process has as
                many.
    rank, replicas: this process, and how many there are; None: what torch.distributed says, or one.

    Raises InputError for a batch_size below 1 or a rank that is none of the replicas.
    """

    def __init__(
        self,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int | None = None,
        replicas: int | None = None,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(message("batch_size is a whole number >= 1.", found=describe(batch_size)))
        self.batch_size, self.shuffle, self.seed, self.drop_last = batch_size, shuffle, seed, drop_last
        self.rank, self.replicas = _process(rank, replicas)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Of the next iteration; call it before every epoch, in every process, as for DistributedSampler."""
        self.epoch = epoch

    def _make(self, generator: torch.Generator) -> list[list[int]]:
        """All batches of an epoch, in order of their lengths or buckets."""
        raise NotImplementedError

    def batches(self) -> list[list[int]]:
        """This process's batches of the current epoch."""
        generator = torch.Generator().manual_seed(self._seed_of_epoch())
        made = self._make(generator)
        if self.drop_last:
            made = [batch for batch in made if len(batch) == self.batch_size]
        if self.shuffle:
            made = [made[k] for k in torch.randperm(len(made), generator=generator, device="cpu").tolist()]
        share = len(made) // self.replicas if self.drop_last else -(-len(made) // self.replicas)
        wanted = share * self.replicas
        if made:
            made = (made * (wanted // len(made) + 1))[:wanted]
        return made[self.rank :: self.replicas]

    def _seed_of_epoch(self) -> int:
        return (self.seed * 1_000_003 + self.epoch) % 2**63

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches())

    def __len__(self) -> int:
        return len(self.batches())

    def _order(self, count: int, generator: torch.Generator) -> list[int]:
        return torch.randperm(count, generator=generator, device="cpu").tolist() if self.shuffle else list(range(count))


def _with_the_options_of_all(kind: type[T]) -> type[T]:
    """Ends a sampler's docstring with what `_BatchSampler` says of its arguments (python -OO leaves no docstrings)."""
    if kind.__doc__ and _BatchSampler.__doc__:
        kind.__doc__ += _BatchSampler.__doc__.split("\n\n", 1)[1]
    return kind


@_with_the_options_of_all
class LengthBatchSampler(_BatchSampler):
    """Batches of examples of nearly the same length, to be padded to the longest of each (`pad_to_longest`).

    The examples, in random order, are cut into pools; each pool is sorted by length and cut into batches; the
    batches are given out in random order. Of several sequences a pool is sorted by the first one's length, cut into
    slabs of some batches, and each of those is sorted by the next one's.

    lengths: (N,) or (N, sequences): of every example (`lengths_of(dataset)`); a list will do.
    pool:    batches in a pool. The larger, the less padding, and the less random a batch is.
    The other arguments are those of every sampler here:
    """

    def __init__(self, lengths: Any, batch_size: int, *, pool: int = 50, **options: Any) -> None:
        super().__init__(batch_size, **options)
        lengths = torch.as_tensor(lengths, dtype=torch.int64 if len(lengths) == 0 else None)
        if lengths.dim() not in (1, 2) or lengths.is_floating_point():
            raise InputError(
                message(
                    "lengths: not one of every example.",
                    expected="(N,) or (N, sequences) integers",
                    found=describe(lengths),
                    fix="lengths_of(dataset)",
                )
            )
        self.lengths = lengths if lengths.dim() == 2 else lengths.unsqueeze(1)
        self.pool = pool

    def _make(self, generator: torch.Generator) -> list[list[int]]:
        order, columns = self._order(len(self.lengths), generator), self.lengths.t().tolist()
        batches = []
        for pool in _cut(order, self.pool * self.batch_size):
            batches += _cut(_sorted(pool, columns, self.batch_size), self.batch_size)
        return batches

    @property
    def waste(self) -> float:
        """The share of padding in this process's batches of the current epoch, each padded to its longest."""
        filled = total = 0
        for batch in self.batches():
            lengths: Tensor = self.lengths[batch]
            filled += int(lengths.sum())
            total += int(lengths.amax(0).sum()) * len(batch)
        return 1 - filled / total if total else 0.0


@_with_the_options_of_all
class BucketBatchSampler(_BatchSampler):
    """Batches of one bucket each.

    indices: the examples of each bucket, as `Buckets.indices`.
    The other arguments are those of every sampler here:
    """

    def __init__(self, indices: Sequence[Sequence[int]], batch_size: int, **options: Any) -> None:
        super().__init__(batch_size, **options)
        self.indices = indices

    def _make(self, generator: torch.Generator) -> list[list[int]]:
        batches = []
        for bucket in self.indices:
            batches += _cut([bucket[k] for k in self._order(len(bucket), generator)], self.batch_size)
        return batches


def _sorted(pool: list[int], columns: list[list[int]], batch_size: int) -> list[int]:
    """A pool in an order in which neighbours are of like lengths in every column."""
    pool = sorted(pool, key=columns[0].__getitem__)
    if len(columns) == 1:
        return pool
    batches = -(-len(pool) // batch_size)
    slabs = max(1, round(batches ** (1 / len(columns))))
    parts = _cut(pool, -(-batches // slabs) * batch_size or 1)
    return [index for part in parts for index in _sorted(part, columns[1:], batch_size)]


def _cut(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _process(rank: int | None, replicas: int | None) -> tuple[int, int]:
    """This process and how many there are."""
    distributed = torch.distributed
    running = distributed.is_available() and distributed.is_initialized()
    if replicas is None:
        replicas = distributed.get_world_size() if running else 1
    if rank is None:
        rank = distributed.get_rank() if running else 0
    if not 0 <= rank < replicas:
        raise InputError(
            message("rank is none of the replicas.", expected=f"0 <= rank < {replicas}", found=describe(rank))
        )
    return rank, replicas
