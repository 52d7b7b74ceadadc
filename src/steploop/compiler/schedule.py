"""Which rows run at which step: holes, unequal lengths and reversed order become one list of packed rows.

A masked step is as if it were not there, so the valid steps of every row move together (holes become right
padding), rows are sorted by how many steps they have, and step p runs rows 0 .. sizes[p]-1 of that order.
Values per step are stored packed: all rows of step 0, then of step 1, and so on; N rows in all. Pieces that
are batched over time run on these N rows, so no masked step is ever computed or read.

Steps that mix rows can't be moved in time: their schedule keeps the real time and names the valid rows of
each step (`members`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from ..marks import valid_at
from . import blocks
from .span import Unpacked

_CPU = torch.device("cpu")


@dataclass(eq=False)
class Schedule:
    """The packed rows of one call.

    steps, batch: number of running steps P and of rows B (1 where there is no batch axis).
    sizes: rows that run at each step; offsets: where each step starts among the N packed rows (P + 1 entries).
    order: (B,) caller's row of each sorted row, None when it is the same.
    source: (N,) index t * B + b of each packed row in the caller's sequence, None when it is the same.
    previous: (N,) where the value of the previous step of the row is, in the B initial rows followed by the N
        packed rows; None when all rows run all steps (then it is a shift by B).
    last: (B,) where the last value of each sorted row is, in the same numbering; None likewise.
    resets: (N,) bool or None; `marks` is the same on the CPU, where it can be looked at without waiting for a device.
    members: for steps that mix rows, the sorted rows of each step; None where they are rows 0 .. size-1.
    time: T of the caller's sequence.
    """

    steps: int
    batch: int
    sizes: list[int]
    offsets: list[int]
    time: int
    device: torch.device = _CPU
    order: Tensor | None = None
    source: Tensor | None = None
    previous: Tensor | None = None
    last: Tensor | None = None
    resets: Tensor | None = None
    members: list[Tensor] | None = None
    repeat: Tensor | None = None
    marks: Tensor | None = None

    @property
    def total(self) -> int:
        return self.offsets[-1]

    @property
    def full(self) -> bool:
        """Every row runs every step."""
        return self.previous is None

    @cached_property
    def row(self) -> Tensor:
        """(N,) the sorted row of each packed row."""
        if self.members is not None:
            return torch.cat(self.members) if self.members else torch.empty(0, dtype=torch.long, device=self.device)
        sizes = torch.tensor(self.sizes, dtype=torch.long, device="cpu")
        starts = torch.tensor(self.offsets[:-1], dtype=torch.long, device="cpu")
        row = torch.arange(self.total, device="cpu") - torch.repeat_interleave(starts, sizes)
        return row.to(self.device)

    @cached_property
    def step(self) -> Tensor:
        """(N,) the running step of each packed row."""
        return self._step_on_cpu.to(self.device)

    @cached_property
    def _step_on_cpu(self) -> Tensor:
        sizes = torch.tensor(self.sizes, dtype=torch.long, device="cpu")
        return torch.repeat_interleave(torch.arange(self.steps, device="cpu"), sizes)

    @cached_property
    def reset_steps(self) -> list[bool]:
        """Whether any row is reset before each step."""
        if self.marks is None:
            return [False] * self.steps
        hit = torch.zeros(self.steps, dtype=torch.bool, device="cpu")
        hit[self._step_on_cpu[self.marks]] = True
        return hit.tolist()

    def on(self, device: torch.device) -> Schedule:
        """The same schedule with its indices on a device."""
        if device == self.device:
            return self

        def moved(index: Tensor | None) -> Tensor | None:
            return None if index is None else index.to(device)

        members = self.members
        if members:  # one copy instead of one for every step
            members = list(torch.cat(members).to(device).split(self.sizes))
        return replace(
            self, device=device, order=moved(self.order), source=moved(self.source), previous=moved(self.previous),
            last=moved(self.last), resets=moved(self.resets), repeat=moved(self.repeat), members=members,
        )  # fmt: skip

    def sort(self, value: Tensor) -> Tensor:
        """(B, ...) in the caller's row order -> sorted."""
        return value if self.order is None else value.index_select(0, self.order)

    def unsort(self, value: Tensor) -> Tensor:
        if self.order is None:
            return value
        return torch.empty_like(value).index_copy_(0, self.order, value)

    def flat(self, sequence: Tensor) -> Tensor:
        """(T, B, ...) -> (T * B, ...)"""
        return sequence.reshape(self.time * self.batch, *sequence.shape[2:])

    def pack(self, sequence: Tensor) -> Tensor:
        """(T, B, ...) -> (N, ...); only valid steps are read."""
        flat = self.flat(sequence)
        return flat if self.source is None else flat.index_select(0, self.source)

    def unpack(self, packed: Tensor | Unpacked) -> Tensor:
        """(N, ...) -> (T, B, ...), zero at masked steps, or the last valid value where `repeat` says so."""
        if isinstance(packed, Unpacked):
            return packed.values.reshape(self.time, self.batch, *packed.values.shape[1:])
        shape = (self.time, self.batch, *packed.shape[1:])
        if self.source is None:
            return packed.reshape(shape)
        if self.repeat is not None:
            padded = torch.cat([packed, packed.new_zeros(1, *packed.shape[1:])])
            return padded.index_select(0, self.repeat).reshape(shape)
        return self._spread(packed).reshape(shape)

    def _spread(self, packed: Tensor) -> Tensor:
        """(N, ...) -> (T * B, ...), zero where no row runs."""
        return self.blank(packed.shape[1:], packed.dtype).index_copy_(0, cast(Tensor, self.source), packed)

    def blank(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """(T * B, *shape), zero where no row runs, and not yet written elsewhere."""
        flat = blocks.empty((self.time * self.batch, *shape), dtype, self.device)
        return flat.index_fill_(0, self.missing, 0)

    @cached_property
    def missing(self) -> Tensor:
        """Where in the caller's sequence no row runs."""
        runs = torch.zeros(self.time * self.batch, dtype=torch.bool, device=self.device)
        return (~runs.index_fill_(0, cast(Tensor, self.source), True)).nonzero()[:, 0]

    def given(self, sequence: Tensor) -> Tensor | Unpacked:
        """(T, B, ...) -> (N, ...), or the sequence as it is, to be packed where it is read."""
        flat = self.flat(sequence)
        return flat if self.source is None else Unpacked(flat)

    def pack_cotangent(self, sequence: Tensor) -> Tensor:
        """The transpose of `unpack`."""
        if self.repeat is None or self.source is None:
            return self.pack(sequence)
        flat = self.flat(sequence)
        packed = flat.new_zeros(self.total + 1, *flat.shape[1:])
        return packed.index_add_(0, self.repeat, flat)[: self.total]

    def unpack_cotangent(self, packed: Tensor) -> Tensor:
        """The transpose of `pack`."""
        shape = (self.time, self.batch, *packed.shape[1:])
        if self.source is None:
            return packed.reshape(shape)
        return self._spread(packed).reshape(shape)


def make_schedule(
    time: int,
    batch: int,
    device: torch.device,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    repeat: bool = False,
    mixes_rows: bool = False,
) -> Schedule:
    """The schedule of a call; see `Call` for the arguments.

    It is made on the CPU, where its sizes have to be known, and its indices are moved to the device at the end.
    """
    valid = valid_at(time, lengths, mask)
    if valid is None or bool(valid.all()):
        schedule = _full(time, batch, reverse)
    elif mixes_rows:
        schedule = _in_real_time(valid, reverse, repeat)
    else:
        schedule = _compact(valid, reverse, repeat)
    if resets is not None and bool((resets := resets.cpu()).any()):
        # Native loops read them as bytes that stand one after the other.
        schedule.resets = schedule.marks = schedule.pack(resets).contiguous()
    return schedule.on(device)


def _offsets(sizes: list[int]) -> list[int]:
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    return offsets


def _full(time: int, batch: int, reverse: bool) -> Schedule:
    source = None
    if reverse:
        source = torch.arange(time * batch, device="cpu").view(time, batch).flip(0).reshape(-1)
    sizes = [batch] * time
    return Schedule(time, batch, sizes, _offsets(sizes), time, source=source)


def _compact(valid: Tensor, reverse: bool, repeat: bool) -> Schedule:
    time, batch = valid.shape
    running = valid.flip(0) if reverse else valid
    counts = running.sum(0)
    order = torch.argsort(counts, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(batch, device="cpu")
    sorted_counts = counts[order]
    steps = int(sorted_counts[0]) if batch else 0
    sizes = (sorted_counts[None, :] > torch.arange(steps, device="cpu")[:, None]).sum(1)
    offsets = torch.zeros(steps + 1, dtype=torch.long, device="cpu")
    torch.cumsum(sizes, 0, out=offsets[1:])
    position = running.cumsum(0) - 1  # running step of each valid (t, b); of the last valid one elsewhere
    step_of, row_of = position[running], rank[None, :].expand(time, batch)[running]
    packed = offsets[step_of] + row_of
    caller = torch.arange(time * batch, device="cpu").view(time, batch)
    caller = (caller.flip(0) if reverse else caller)[running]
    total = int(offsets[-1])
    source = torch.empty(total, dtype=torch.long, device="cpu")
    source[packed] = caller
    previous = torch.empty(total, dtype=torch.long, device="cpu")
    previous[packed] = torch.where(step_of == 0, row_of, batch + offsets[(step_of - 1).clamp(min=0)] + row_of)
    rows = torch.arange(batch, device="cpu")
    last = torch.where(
        sorted_counts == 0, rows, batch + offsets[(sorted_counts - 1).clamp(min=0)] + rows
    )
    index = None
    if repeat:
        held = torch.where(position < 0, total, offsets[position.clamp(min=0)] + rank)
        index = (held.flip(0) if reverse else held).reshape(-1)
    return Schedule(
        steps, batch, sizes.tolist(), offsets.tolist(), time,
        order=order, source=source, previous=previous, last=last, repeat=index,
    )


def _in_real_time(valid: Tensor, reverse: bool, repeat: bool) -> Schedule:
    time, batch = valid.shape
    running = valid.flip(0) if reverse else valid
    sizes = running.sum(1).tolist()
    offsets = _offsets(sizes)
    total = offsets[-1]
    number = torch.full((time, batch), -1, dtype=torch.long, device="cpu")
    number[running] = torch.arange(total, device="cpu")
    held = torch.cummax(number, 0).values  # packed row of the last valid step up to and including t
    before = torch.cat([torch.full((1, batch), -1, device="cpu"), held[:-1]]) if time else held
    rows = torch.arange(batch, device="cpu")
    previous = torch.where(before < 0, rows, batch + before)[running]
    final = held[-1] if time else torch.full((batch,), -1, device="cpu")
    last = torch.where(final < 0, rows, batch + final)
    caller = torch.arange(time * batch, device="cpu").view(time, batch)
    source = (caller.flip(0) if reverse else caller)[running]
    index = None
    if repeat:
        index = torch.where(held < 0, total, held)
        index = (index.flip(0) if reverse else index).reshape(-1)
    members = [step.nonzero()[:, 0] for step in running]
    return Schedule(
        time, batch, sizes, offsets, time, source=source, previous=previous, last=last, members=members, repeat=index,
    )
