"""One run of an executable, span by span of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from . import blocks
from .ir.graph import Rows, expression, size_at
from .problem import BatchedPart, LoopPart
from .rowwise import Rowwise
from .schedule import Schedule
from .span import Cuttable, Span, Unpacked

if TYPE_CHECKING:
    from .execute import Executable


@dataclass(eq=False)
class Run:
    """What a run gives: `wanted` per step (packed or stacked), `finals` (B, ...), `summed` over all steps.

    edges: for every state that was asked for, its value (B, ...) before each span.
    """

    wanted: list[Tensor | Unpacked]
    finals: list[Tensor]
    summed: list[Tensor | None]
    edges: list[list[Tensor]] = field(default_factory=list)


class SpanRunner:
    """Runs the pieces and loops of an executable, one after the other, for each span."""

    def __init__(
        self, executable: Executable, given: dict[fx.Node, Any], initial: dict[fx.Node, Tensor],
        reset_to: dict[fx.Node, Tensor], schedule: Schedule, sizes: dict[str, int],
    ):  # fmt: skip
        self.e, self.schedule, self.sizes = executable, schedule, sizes
        self.problem = executable.problem
        self.reset_to = reset_to
        self.current = dict(initial)
        self.once_values: dict[fx.Node, Tensor] = {n: t for n, t in given.items() if not n.meta["varies"]}
        self.sequences = {n: t for n, t in given.items() if n.meta["varies"]}
        self.stacked = self.problem.batch is None

    def begin(self, outward: Sequence[fx.Node] = (), held: dict[Any, Any] | None = None) -> SpanRunner:
        """Makes what is the same at every step."""
        self.outward = {n: self._blank(n) for n in outward if n in self.e.only_given and self._scatters()}
        self.places: dict[fx.Node, Tensor] = {}
        self.own: dict[fx.Node, Tensor] = {}
        self.once_values.update(zip(self.e.once.nodes, self._once(held)))
        return self

    def replay(self, span: Span, states: dict[fx.Node, Tensor]) -> list[tuple[Tensor, bool]]:
        self.current = states
        self.own = {n: self._with_a_step_before(n, span) for n in self.problem.wanted}
        values = self._span(span, whole=False)
        found = [(self._per_step(node, values), self.own[node]) for node in self.problem.wanted]
        return [(value, value.data_ptr() == own.data_ptr()) for value, own in found]

    def _with_a_step_before(self, node: fx.Node, span: Span) -> Tensor:
        """Memory for the values of a span, after room for those of the step before it."""
        batch, shape = self.schedule.batch, self._shape(node)[1:]
        value = node.meta["val"]
        return blocks.empty((batch + span.total, *shape), value.dtype, value.device)[batch:]

    def run(
        self, longest: int | None, outward: Sequence[fx.Node], held: dict[Any, Any] | None, edges: Sequence[fx.Node]
    ) -> Run:
        e = self.begin(outward, held).e
        spans = e.spans(self.schedule, longest)
        placed = [] if len(spans) == 1 else [n for n in self.problem.wanted if n not in self.outward]
        self.places = {n: self._allocate(n) for n in placed}
        wanted: list[Tensor | Unpacked] = []
        sums: list[Any] = [None] * len(self.problem.summed)
        before: list[list[Tensor]] = [[] for _ in edges]
        for span in spans:
            for kept, prev in zip(before, edges):
                kept.append(self.current[prev])
            values = self._span(span, whole=len(spans) == 1)
            self._collect(wanted, span, values, whole=len(spans) == 1)
            for i, node in enumerate(self.problem.summed):
                part = self._sum(node, values)
                # Not in place: two of the sums may be one tensor, or views of one.
                sums[i] = part if sums[i] is None else sums[i] + part
            self._advance(values)
            del values
        return Run(wanted, [self.current[s.prev] for s in self.problem.finals], sums, before)

    def _once(self, held: dict[Any, Any] | None) -> Sequence[Tensor]:
        """What is the same at every step: from an earlier piece of the call, if its rows stood in the same order."""
        e, order = self.e, self.schedule.order
        if held is not None and e in held:
            before, values = held.pop(e)
            if (order is None) == (before is None) and (order is None or torch.equal(order, before)):
                held[e] = before, values
                return values
            del values
        values = self._timed(None, e.once, self.sizes, [self.once_values[n] for n in e.once.reads])
        if held is not None:
            held[e] = order, values
        return values

    def _timed(self, part: BatchedPart | LoopPart | None, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function that runs a part of the partition (None: what is the same at every step)."""
        clock = self.e.clock
        return function(*arguments) if clock is None else clock.time(part, function, *arguments)

    def _collect(
        self, wanted: list[Tensor | Unpacked], span: Span, values: dict[fx.Node, Tensor], whole: bool
    ) -> None:
        """Writes what is wanted of a span into its place among all steps."""
        parts = [self._per_step(node, values) for node in self.problem.wanted]
        if whole:
            wanted.extend(parts)
            return
        for part, node in zip(parts, self.problem.wanted):
            if node in self.outward:
                continue
            rows = node.meta["rows"]
            if rows is not None and rows.outer != 1:
                rows = rows.at(self.sizes)
                rows.split(self.places[node]).narrow(rows.dim + 1, span.first, span.total).copy_(rows.split(part))
                continue
            place = self._place(node, span)
            if place.data_ptr() != part.data_ptr():
                place.copy_(part)
        if not wanted:
            made: dict[fx.Node, Any] = {**self.places, **self.outward}
            wanted.extend(made[n] for n in self.problem.wanted)

    def _scatters(self) -> bool:
        return self.schedule.source is not None and self.schedule.repeat is None

    def _blank(self, node: fx.Node) -> Unpacked:
        return Unpacked(self.schedule.blank(self._shape(node)[1:], node.meta["val"].dtype))

    def _allocate(self, node: fx.Node) -> Tensor:
        """Memory for a value of all steps."""
        shape = self._shape(node)
        if node.meta["rows"] is None:
            shape = [self.schedule.steps, *shape]
        return blocks.empty(shape, node.meta["val"].dtype, node.meta["val"].device)

    def _shape(self, node: fx.Node) -> list[int]:
        """The shape of a value of all steps; of a single one where values are stacked, with room for all rows."""
        rows = self.schedule.batch if node.meta["rows"] is None else self.schedule.total
        sizes = {**self.sizes, str(self.problem.batch): rows}
        return [size_at(expression(s), sizes) for s in node.meta["val"].shape]

    def _place(self, node: fx.Node, span: Span) -> Tensor:
        """Where the values of a span stand among those of all steps; they are one piece unless rows are in several."""
        rows, whole = node.meta["rows"], self.places[node]
        if rows is None:
            return whole[span.start : span.stop]
        rows = rows.at(self.sizes)
        return rows.narrow(whole, span.first, span.total)

    def _memory(self, loop: LoopPart, span: Span) -> list[Tensor | Unpacked | None]:
        """Places for the kept values of a loop that are wanted, where a span of them is one piece of memory."""
        found = []
        for node in self.e.widened[loop].kept:
            rows = node.meta["rows"]
            fits = node in self.places and node.meta["varies"] and rows is not None and (rows.dim, rows.outer) == (0, 1)
            place = self._place(node, span) if fits else self.own.get(node)
            found.append(self.outward.get(node, place))
        return found

    # -- one span ------------------------------------------------------------------------------------------

    def _span(self, span: Span, whole: bool) -> dict[fx.Node, Tensor]:
        self.rowwise = rowwise = Rowwise(span, self.current)
        rowwise.reset_to, rowwise.down, rowwise.stacked = self.reset_to, self.e.down, self.stacked
        rowwise.long_product = self.e.long_product
        values = dict(self.once_values)
        for node, sequence in self.sequences.items():
            as_it_is = isinstance(sequence, Tensor) if whole else False
            as_it_is |= isinstance(sequence, Unpacked) and node in self.e.in_place
            values[node] = sequence if as_it_is else self._cut(sequence, node, span)
        self.after: dict[fx.Node, Tensor] = {}
        for segment in self.e.partition.segments:
            if isinstance(segment, LoopPart):
                self._timed(segment, self._loop, segment, span, values)
            elif segment in self.e.pieces:
                piece = self.e.pieces[segment]
                results = self._timed(segment, piece, rowwise, self.sizes, [values[n] for n in piece.reads])
                values.update(zip(piece.results, results))
        return values

    def _cut(self, sequence: Tensor | Cuttable, node: fx.Node, span: Span) -> Any:
        if not isinstance(sequence, Tensor):
            return sequence.cut(span)
        rows = node.meta["rows"]
        if rows is None:
            return sequence[span.start : span.stop]
        rows = rows.at(self.sizes)
        return rows.narrow(sequence, span.first, span.total)

    def _loop(self, loop: LoopPart, span: Span, values: dict[fx.Node, Tensor]) -> None:
        states = [self.current[s.prev] for s in loop.states]
        reset_to = None
        if self.reset_to and loop.states:
            reset_to = [self.reset_to[s.prev] for s in loop.states]
        inputs = [values[n] for n in self.e.widened[loop].inputs]
        runner = self.e.runners[loop]
        into: tuple[Any, ...] = ()
        if (self.places or self.outward or self.own) and runner.writes_into:
            into = (self._memory(loop, span),)
        after, kept = runner(inputs, states, reset_to, span, self.e.down, self.sizes, *into)
        for state, value in zip(loop.states, after):
            self.after[state.prev] = value
        for node, value in zip(self.e.widened[loop].kept, kept):
            # Outside its loop a sum over rows is one over the rows of all steps.
            values[node] = value.sum(0) if node.meta["contracted"] is True else value

    def _advance(self, values: dict[fx.Node, Tensor]) -> None:
        """Moves every state to its value after the span."""
        delayed = {s.prev: s for s in self.e.partition.delayed.values()}
        for state in {s.prev: s for s in [*self.problem.finals, *delayed.values()]}.values():
            if state.prev not in self.after:
                self.after[state.prev] = self.rowwise.finish(state.prev, self._per_step(state.next, values))
        self.current.update(self.after)

    def _per_step(self, node: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor:
        value = values[node]
        return value if node.meta["varies"] else self.rowwise.spread(value, node)

    def _sum(self, node: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor:
        """The sum over the steps of a span; pieces give row sums and sums over rows already summed."""
        value, rows = values[node], node.meta["rows"]
        if any(node in getattr(p, "row_sums", ()) for p in self.e.pieces.values()):
            return value
        if not node.meta["varies"]:
            value = self.rowwise.spread(value, node)
        elif node.meta.get("contracted") is True:
            return value
        if self.stacked or rows is None:
            return value.sum(0)
        return self._sum_rows(value, rows)

    def _sum_rows(self, value: Tensor, rows: Rows) -> Tensor:
        rows = rows.at(self.sizes)
        if rows.dim == 0 and rows.outer == 1:
            return self.rowwise.sum_rows(value, rows.inner)
        return self.rowwise.sum_rows(value.movedim(rows.dim, 0), rows.inner).movedim(0, rows.dim)
