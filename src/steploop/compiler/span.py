"""Some steps of a schedule, one after the other: what a piece or a loop runs at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .schedule import Schedule


@dataclass(eq=False)
class Span:
    """Steps start .. stop-1 of a schedule: what a loop runs in one go.

    Values per step given with a span are the packed rows first .. first + total - 1, and `rows` of them.
    """

    schedule: Schedule
    start: int
    stop: int

    @property
    def first(self) -> int:
        return self.schedule.offsets[self.start]

    @property
    def total(self) -> int:
        return self.schedule.offsets[self.stop] - self.first

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.stop == self.schedule.steps

    @property
    def sizes(self) -> list[int]:
        return self.schedule.sizes[self.start : self.stop]

    @cached_property
    def row(self) -> Tensor:
        return self.schedule.row[self.first : self.first + self.total]

    @cached_property
    def previous(self) -> Tensor:
        """(total,) where each row's previous value is, in the B rows before the span followed by its own rows."""
        batch = self.schedule.batch
        if self.schedule.full:
            return torch.arange(self.total, device=self.schedule.device)
        index = cast(Tensor, self.schedule.previous)[self.first : self.first + self.total]
        inside = index >= batch + self.first
        return torch.where(inside, index - self.first, self.row)

    @cached_property
    def last(self) -> Tensor:
        """(B,) where each row's value after the span is, in the same numbering."""
        batch = self.schedule.batch
        held = torch.arange(batch, device=self.schedule.device)
        return held.scatter_reduce(0, self.row, torch.arange(self.total, device=held.device) + batch, "amax")

    @cached_property
    def dense(self) -> Tensor:
        """(total,) where each row stands in (steps of the span, B)."""
        step = self.schedule.step[self.first : self.first + self.total] - self.start
        return step * self.schedule.batch + self.row

    @cached_property
    def following(self) -> Tensor:
        """(total,) where each row's next value is, in the B rows after the span followed by its own rows."""
        batch = self.schedule.batch
        index = self.row.clone()
        inside = self.previous >= batch
        own = torch.arange(self.total, device=index.device)[inside] + batch
        return index.index_copy_(0, self.previous[inside] - batch, own)

    def delay(self, values: Tensor, edge: Tensor, reset_to: Tensor | None, down: bool) -> Tensor:
        """The value of a state at the neighbouring step of each packed row, earlier or (down) later.

        values: packed, after each step in running direction.  edge: (B, ...) before the first of them.
        Upwards a row that is reset reads reset_to; downwards a row that was reset passes reset_to on.
        """
        if self.total == 0:
            return values
        if down:
            values = self.reset(values, reset_to, fresh=False)
            if self.schedule.full:
                return torch.cat([values[self.schedule.batch :], edge])
            return torch.cat([edge, values]).index_select(0, self.following)
        if self.schedule.full:
            values = torch.cat([edge, values[: self.total - self.schedule.batch]])
        else:
            values = torch.cat([edge, values]).index_select(0, self.previous)
        return self.reset(values, reset_to, fresh=True)

    def reset(self, values: Tensor, reset_to: Tensor | None, fresh: bool) -> Tensor:
        """The values with reset_to in the rows that are reset: few, as a rule. fresh: they may be overwritten."""
        if reset_to is None or self.hits is None:
            return values
        values = values if fresh else values.clone()
        return values.index_copy_(0, self.hits, reset_to.index_select(0, self.row.index_select(0, self.hits)))

    def finish(self, values: Tensor, edge: Tensor, reset_to: Tensor | None, down: bool) -> Tensor:
        """(B, ...): a state after the span, from its packed values and its value before."""
        if self.total == 0:
            return edge
        batch = self.schedule.batch
        if not down:
            if self.schedule.full:
                return values[self.total - batch :]
            return torch.cat([edge, values]).index_select(0, self.last)
        values = self.reset(values, reset_to, fresh=False)
        if self.schedule.full:
            return values[:batch]
        return torch.cat([edge, values]).index_select(0, self.first_of_row)

    @cached_property
    def first_of_row(self) -> Tensor:
        """(B,) where the first value of each row is, in the B rows beside the span followed by its own rows."""
        rows = torch.arange(self.schedule.batch, device=self.schedule.device)
        own = torch.arange(self.total, device=rows.device) + self.schedule.batch
        return rows.scatter_reduce(0, self.row, own, "amin", include_self=False)

    @cached_property
    def resets(self) -> Tensor | None:
        resets = self.schedule.resets
        return None if resets is None else resets[self.first : self.first + self.total]

    @cached_property
    def hits(self) -> Tensor | None:
        """Where in the span rows are reset; None where none is."""
        marks = self.schedule.marks
        if marks is None:
            return None
        hits = marks[self.first : self.first + self.total].nonzero()[:, 0]
        return hits.to(self.schedule.device) if len(hits) else None


@dataclass(eq=False)
class Unpacked:
    """A sequence as the caller has it, (T * B, ...): every span reads or writes its own rows there."""

    values: Tensor

    def cut(self, span: Span) -> Tensor:
        return self.values.index_select(0, cast(Tensor, span.schedule.source)[span.first : span.first + span.total])

    def put(self, span: Span, packed: Tensor) -> Unpacked:
        self.values.index_copy_(0, cast(Tensor, span.schedule.source)[span.first : span.first + span.total], packed)
        return self


class Cuttable(Protocol):
    """Values per step that are made or copied where they are read."""

    def cut(self, span: Span) -> Tensor | Shifted: ...


@dataclass(eq=False)
class Shifted:
    """The values of a state before every step, given by those after it; nothing is copied before it is read.

    values: (N, ...) packed (or stacked), None where nothing reads them.
    edge: (B, ...) before the first step.  reset_to: (B, ...) or None.
    """

    values: Tensor | None
    edge: Tensor
    reset_to: Tensor | None

    def cut(self, span: Span) -> Tensor | Shifted:
        schedule, values = span.schedule, self.values
        if values is None:
            return self  # only the first value is known, which is all that a sequence form needs
        if span.total == 0:
            return values[:0]
        first, batch = span.first, schedule.batch
        if schedule.full:
            fresh = first == 0
            if fresh:
                found = torch.cat([self.edge, values[: span.total - batch]])
            else:
                found = values.narrow(0, first - batch, span.total)
        else:
            fresh = True
            index = cast(Tensor, schedule.previous)[first : first + span.total]
            found = values.index_select(0, (index - batch).clamp(min=0))
            start = (index < batch).nonzero()[:, 0]
            found.index_copy_(0, start, self.edge.index_select(0, index[start]))
        return span.reset(found, self.reset_to, fresh)
