"""Runs a partition over a schedule: what is the same at every step once, then span by span of time the
batched pieces and the loops in order.

A span holds some steps; values per step exist for one span at a time, except those that are wanted. One span
that covers everything is the usual case; shorter ones bound the memory of what a backward pass recomputes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from . import blocks
from .absorb import absorb
from .batch import OncePiece, Piece, Rowwise, StackedPiece
from .ir.graph import Rows, expression, op_name, size_at
from .memory_operator import SequenceRunner
from .partition import Batched, Loop, Partition
from .patience import long_part
from .schedule import Schedule, Span, Unpacked

# Bytes of batched values that a span may hold before it is cut shorter: what stays in the caches between a
# batched piece and a native loop, and much more where every span costs a Python loop's overhead.
MEMORY_PER_NATIVE_SPAN = 24 << 20
MEMORY_PER_SPAN = 32 << 20
LEAST_STEPS = 16


@dataclass(eq=False)
class Run:
    """What a run gives: `wanted` per step (packed or stacked), `finals` (B, ...), `summed` over all steps.

    edges: for every state that was asked for, its value (B, ...) before each span.
    """

    wanted: list[Tensor | Unpacked]
    finals: list[Tensor]
    summed: list[Tensor | None]
    edges: list[list[Tensor]] = field(default_factory=list)


class Cuttable(Protocol):
    """Values per step that are made or copied where they are read."""

    def cut(self, span: Span) -> Tensor | Shifted: ...


# Makes the wanted values of one span from the states before it (by their prevs), each with whether there is room in
# memory for one more step before them.
Replayer = Callable[[Span, dict[fx.Node, Tensor]], list[tuple[Tensor, bool]]]


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
        schedule = span.schedule
        if self.values is None:
            return self  # only the first value is known, which is all that a sequence form needs
        if span.total == 0:
            return self.values[:0]
        first, batch = span.first, schedule.batch
        if schedule.full:
            fresh = first == 0
            if fresh:
                found = torch.cat([self.edge, self.values[: span.total - batch]])
            else:
                found = self.values.narrow(0, first - batch, span.total)
        else:
            fresh = True
            index = schedule.previous[first : first + span.total]
            found = self.values.index_select(0, (index - batch).clamp(min=0))
            start = (index < batch).nonzero()[:, 0]
            found.index_copy_(0, start, self.edge.index_select(0, index[start]))
        return span.reset(found, self.reset_to, fresh)


Given = dict[fx.Node, Tensor | Cuttable]


@dataclass(eq=False)
class Executable:
    """A partition with its pieces printed and its loops compiled.

    choose: gives a compiled loop for a LoopProgram, or for what a function gives that makes it wider (`absorb`).
    down: runs from the last step to the first.
    clock: while a profile is made, what times each part: `clock.time(part, function, *arguments)`.
    """

    partition: Partition
    choose: Callable[[Any, Callable[..., Any]], Any]
    down: bool = False
    runners: dict[Loop, Any] = field(default_factory=dict)
    clock: Any = None
    _settled: bool = False

    def __post_init__(self) -> None:
        problem = self.partition.problem
        self.problem = problem
        self.ran: dict[Loop, Loop] = {}  # each loop with what it absorbed
        self.absorbed: set[fx.Node] = set()
        for segment in self.partition.loops:
            self._choose(segment)
        self.once = OncePiece([n for n in self.partition.once if n not in self.absorbed], problem.batch)
        self.batched = {s: self._left(s) for s in self.partition.segments if isinstance(s, Batched)}
        later = self._later_uses()
        self.pieces = {s: self._piece(nodes, later[s]) for s, nodes in self.batched.items() if nodes}
        self.in_place = self._read_in_place()
        self.only_given = self._only_given()
        self.bytes_per_row = self._bytes_per_row()

    @cached_property
    def long_product(self) -> Any:
        products = (runner.product for runner in self.runners.values())
        return next((p for p in products if p is not None), None)

    @property
    def building(self) -> bool:
        """Whether a kernel is still being built."""
        return any(runner.building for runner in self.runners.values())

    def settle(self) -> None:
        """Waits for the kernels: afterwards it is known what runs each loop."""
        if self._settled:
            return
        with long_part("building native loops"):
            for runner in self.runners.values():
                runner.settle()
        self._settled = True

    @property
    def stops(self) -> bool:
        """Whether next to nothing runs at steps before which all rows have ended (`Problem.ends`)."""
        others = [n for loop, r in self.runners.items() if not r.stops for n in loop.nodes]
        products = any(op_name(n) in ("mm", "bmm", "addmm") for n in others)
        return not products and any(r.stops for r in self.runners.values())

    def _choose(self, loop: Loop) -> None:
        wider: Loop | None = None

        def widen(products: bool, operations: bool) -> Any:
            nonlocal wider
            wider = absorb(loop, self.partition, self.absorbed, products, operations)
            return None if wider is None else wider.program

        runner = self.runners[loop] = self.choose(loop.program, widen)
        same = wider is None or getattr(runner, "loop", None) is not wider.program
        self.ran[loop] = loop if same else wider
        self.absorbed |= {*self.ran[loop].nodes} - {*loop.nodes} - self.ran[loop].also_outside

    def _left(self, segment: Batched) -> list[fx.Node]:
        return [n for n in segment.nodes if n not in self.absorbed]

    def _piece(self, nodes: list[fx.Node], results: list[fx.Node]) -> Any:
        if self.problem.batch is None:
            return StackedPiece(nodes, results, self.partition.delayed)
        return Piece(nodes, results, set(self.problem.summed), self.problem.batch, self.partition.delayed)

    def _read_in_place(self) -> set[fx.Node]:
        """Sequences that only loops read which take rows from where the caller has them."""
        problem, found = self.problem, set()
        for loop, ran in self.ran.items():
            if self.runners[loop].reads_in_place:
                found.update(n for n in ran.inputs if n.op == "placeholder" and n.meta["varies"])
        found -= {*problem.wanted, *problem.summed, *self.partition.delayed, *(s.next for s in problem.states)}
        for loop, ran in self.ran.items():
            if not self.runners[loop].reads_in_place:
                found.difference_update(ran.inputs)
        return found.difference(*(p.reads for p in self.pieces.values()))

    def _only_given(self) -> set[fx.Node]:
        """Values of loops that nobody but the caller reads, which can be written to where the caller has them."""
        problem = self.problem
        found: set[fx.Node] = set()
        for loop, runner in self.runners.items():
            if runner.writes_into:
                found.update(n for n in self.ran[loop].kept if n.meta["varies"] and n.meta["rows"] == Rows(0))
        in_loops = {state.prev for loop in self.runners for state in loop.states}
        found -= {*problem.summed, *(s.next for s in self.partition.delayed.values())}
        # The last values of those are the state after a span.
        found -= {s.next for s in problem.finals if s.prev not in in_loops}
        return found.difference(*(r.inputs for r in self.ran.values()), *(p.reads for p in self.pieces.values()))

    def _later_uses(self) -> dict[Any, list[fx.Node]]:
        """For each segment: its values that something after it reads."""
        problem = self.problem
        results: set[fx.Node] = {*problem.wanted, *problem.summed, *(s.next for s in problem.finals)}
        results |= {s.next for s in self.partition.delayed.values()}  # the next span goes on from them
        found = {}
        reads: set[fx.Node] = set(results)
        for segment in reversed(self.partition.segments):
            if isinstance(segment, Loop):
                reads.update(self.ran[segment].inputs)
            else:
                inside = set(self.batched[segment])
                found[segment] = [n for n in self.batched[segment] if n in reads]
                for n in inside:
                    sources = [self.partition.delayed[n].next] if n in self.partition.delayed else n.all_input_nodes
                    reads.update(i for i in sources if i not in inside)
        # Values of later segments may feed delays in earlier ones only through states, which are read as nexts.
        return found

    def _bytes_per_row(self) -> int:
        total = 0
        nodes = {n for left in self.batched.values() for n in left}
        nodes |= {n for loop in self.ran.values() for n in loop.kept}
        for node in nodes - set(self.problem.wanted):
            value = node.meta.get("val")
            if isinstance(value, Tensor) and node.meta["rows"] is not None:
                size = value.element_size()
                for dim, s in enumerate(value.shape):
                    if dim != node.meta["rows"].dim:
                        size *= int(s) if not isinstance(s, torch.SymInt) else 1
                inner = node.meta["rows"].inner
                total += size * node.meta["rows"].outer * (inner if isinstance(inner, int) else 1)
        return total

    def spans(self, schedule: Schedule, longest: int | None) -> list[Span]:
        steps = schedule.steps
        if longest is None:
            per_step = max(1, self.bytes_per_row * max(1, schedule.batch))
            native = all(r.writes_into for r in self.runners.values())
            longest = max(LEAST_STEPS, (MEMORY_PER_NATIVE_SPAN if native else MEMORY_PER_SPAN) // per_step)
        whole = any(isinstance(r, SequenceRunner) for r in self.runners.values())
        if whole or self.problem.batch is None or steps <= longest * 3 // 2:
            return [Span(schedule, 0, steps)]
        count = -(-steps // longest)
        edges = [steps * i // count for i in range(count + 1)]
        spans = [Span(schedule, a, b) for a, b in zip(edges, edges[1:])]
        return spans[::-1] if self.down else spans

    def run(
        self,
        given: Given,
        initial: dict[fx.Node, Tensor],
        reset_to: dict[fx.Node, Tensor],
        schedule: Schedule,
        sizes: dict[str, int],
        longest: int | None = None,
        outward: Sequence[fx.Node] = (),
        held: dict[Any, Any] | None = None,
        edges: Sequence[fx.Node] = (),
    ) -> Run:
        """given: placeholders -> packed sequences (or stacked) and constants, in the schedule's row order.
        initial, reset_to: by the states' prev.  longest: steps of a span, None: by memory.
        outward: wanted values that may be given `Unpacked`.  held: see `Call`.  edges: see `Run`, by their prevs."""
        self.settle()
        # Autocast has had its say when the step was captured.
        with torch.no_grad(), torch._C._DisableAutocast():
            return _Runner(self, given, initial, reset_to, schedule, sizes).run(longest, outward, held, edges)

    def replayer(
        self, given: Given, reset_to: dict[fx.Node, Tensor], schedule: Schedule, sizes: dict[str, int]
    ) -> Replayer:
        """What runs single spans, in any order; within another executable's run. The arguments are those of `run`."""
        self.settle()
        return _Runner(self, given, {}, reset_to, schedule, sizes).begin().replay


class _Runner:
    def __init__(self, executable: Executable, given, initial, reset_to, schedule: Schedule, sizes):
        self.e, self.schedule, self.sizes = executable, schedule, sizes
        self.problem = executable.problem
        self.reset_to = reset_to
        self.current = dict(initial)
        self.once_values: dict[fx.Node, Tensor] = {n: t for n, t in given.items() if not n.meta["varies"]}
        self.sequences = {n: t for n, t in given.items() if n.meta["varies"]}
        self.stacked = self.problem.batch is None

    def begin(self, outward: Sequence[fx.Node] = (), held: dict[Any, Any] | None = None) -> _Runner:
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
        wanted: list[Tensor] = []
        sums: list[Tensor | None] = [None] * len(self.problem.summed)
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

    def _timed(self, part: Batched | Loop | None, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function that runs a part of the partition (None: what is the same at every step)."""
        clock = self.e.clock
        return function(*arguments) if clock is None else clock.time(part, function, *arguments)

    def _collect(self, wanted: list[Tensor], span: Span, values: dict[fx.Node, Tensor], whole: bool) -> None:
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
            wanted.extend({**self.places, **self.outward}[n] for n in self.problem.wanted)

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

    def _memory(self, loop: Loop, span: Span) -> list[Tensor | Unpacked | None]:
        """Places for the kept values of a loop that are wanted, where a span of them is one piece of memory."""
        found = []
        for node in self.e.ran[loop].kept:
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
            if isinstance(segment, Loop):
                self._timed(segment, self._loop, segment, span, values)
            elif segment in self.e.pieces:
                piece = self.e.pieces[segment]
                results = self._timed(segment, piece, rowwise, self.sizes, [values[n] for n in piece.reads])
                values.update(zip(piece.results, results))
        return values

    def _cut(self, sequence: Tensor | Cuttable, node: fx.Node, span: Span) -> Tensor:
        if not isinstance(sequence, Tensor):
            return sequence.cut(span)
        rows = node.meta["rows"]
        if rows is None:
            return sequence[span.start : span.stop]
        rows = rows.at(self.sizes)
        return rows.narrow(sequence, span.first, span.total)

    def _loop(self, loop: Loop, span: Span, values: dict[fx.Node, Tensor]) -> None:
        states = [self.current[s.prev] for s in loop.states]
        reset_to = None
        if self.reset_to and loop.states:
            reset_to = [self.reset_to[s.prev] for s in loop.states]
        inputs = [values[n] for n in self.e.ran[loop].inputs]
        runner = self.e.runners[loop]
        into = ()
        if (self.places or self.outward or self.own) and runner.writes_into:
            into = (self._memory(loop, span),)
        after, kept = runner(inputs, states, reset_to, span, self.e.down, self.sizes, *into)
        for state, value in zip(loop.states, after):
            self.after[state.prev] = value
        for node, value in zip(self.e.ran[loop].kept, kept):
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


