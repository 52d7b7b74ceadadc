"""Runs a partition over a schedule: what is the same at every step once, then span by span of time the
batched pieces and the loops in order.

A span holds some steps; values per step exist for one span at a time, except those that are wanted. One span
that covers everything is the usual case; shorter ones bound the memory of what a backward pass recomputes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from .absorb import absorb
from .batch import OncePiece, Piece
from .ir.graph import Rows, op_name
from .patience import long_part
from .problem import BatchedPart, LoopPart, Partition
from .schedule import Schedule
from .sequence_runner import SequenceRunner
from .span import Cuttable, Span
from .span_runner import Run, SpanRunner
from .stacked_piece import StackedPiece

# Bytes of batched values that a span may hold before it is cut shorter: what stays in the caches between a
# batched piece and a native loop, and much more where every span costs a Python loop's overhead.
MEMORY_PER_NATIVE_SPAN = 24 << 20
MEMORY_PER_SPAN = 32 << 20
LEAST_STEPS = 16


# Makes the wanted values of one span from the states before it (by their prevs), each with whether there is room in
# memory for one more step before them.
Replayer = Callable[[Span, dict[fx.Node, Tensor]], list[tuple[Tensor, bool]]]

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
    runners: dict[LoopPart, Any] = field(default_factory=dict)
    clock: Any = None
    _settled: bool = False

    def __post_init__(self) -> None:
        problem = self.partition.problem
        self.problem = problem
        self.widened: dict[LoopPart, LoopPart] = {}  # each loop with what it absorbed
        self.absorbed: set[fx.Node] = set()
        for segment in self.partition.loops:
            self._choose(segment)
        self.once = OncePiece([n for n in self.partition.once if n not in self.absorbed], problem.batch)
        self.batched = {s: self._left(s) for s in self.partition.segments if isinstance(s, BatchedPart)}
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

    def _choose(self, loop: LoopPart) -> None:
        wider: LoopPart | None = None

        def widen(products: bool, operations: bool) -> Any:
            nonlocal wider
            wider = absorb(loop, self.partition, self.absorbed, products, operations)
            return None if wider is None else wider.program

        runner = self.runners[loop] = self.choose(loop.program, widen)
        same = wider is None or getattr(runner, "loop", None) is not wider.program
        self.widened[loop] = loop if same or wider is None else wider
        self.absorbed |= {*self.widened[loop].nodes} - {*loop.nodes} - self.widened[loop].also_outside

    def _left(self, segment: BatchedPart) -> list[fx.Node]:
        return [n for n in segment.nodes if n not in self.absorbed]

    def _piece(self, nodes: list[fx.Node], results: list[fx.Node]) -> Any:
        if self.problem.batch is None:
            return StackedPiece(nodes, results, self.partition.delayed)
        return Piece(nodes, results, set(self.problem.summed), self.problem.batch, self.partition.delayed)

    def _read_in_place(self) -> set[fx.Node]:
        """Sequences that only loops read which take rows from where the caller has them."""
        problem = self.problem
        found: set[fx.Node] = set()
        for loop, ran in self.widened.items():
            if self.runners[loop].reads_in_place:
                found.update(n for n in ran.inputs if n.op == "placeholder" and n.meta["varies"])
        found -= {*problem.wanted, *problem.summed, *self.partition.delayed, *(s.next for s in problem.states)}
        for loop, ran in self.widened.items():
            if not self.runners[loop].reads_in_place:
                found.difference_update(ran.inputs)
        return found.difference(*(p.reads for p in self.pieces.values()))

    def _only_given(self) -> set[fx.Node]:
        """Values of loops that nobody but the caller reads, which can be written to where the caller has them."""
        problem = self.problem
        found: set[fx.Node] = set()
        for loop, runner in self.runners.items():
            if runner.writes_into:
                found.update(n for n in self.widened[loop].kept if n.meta["varies"] and n.meta["rows"] == Rows(0))
        in_loops = {state.prev for loop in self.runners for state in loop.states}
        found -= {*problem.summed, *(s.next for s in self.partition.delayed.values())}
        # The last values of those are the state after a span.
        found -= {s.next for s in problem.finals if s.prev not in in_loops}
        return found.difference(*(r.inputs for r in self.widened.values()), *(p.reads for p in self.pieces.values()))

    def _later_uses(self) -> dict[Any, list[fx.Node]]:
        """For each segment: its values that something after it reads."""
        problem = self.problem
        results: set[fx.Node] = {*problem.wanted, *problem.summed, *(s.next for s in problem.finals)}
        results |= {s.next for s in self.partition.delayed.values()}  # the next span goes on from them
        found = {}
        reads: set[fx.Node] = set(results)
        for segment in reversed(self.partition.segments):
            if isinstance(segment, LoopPart):
                reads.update(self.widened[segment].inputs)
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
        nodes |= {n for loop in self.widened.values() for n in loop.kept}
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
            return SpanRunner(self, given, initial, reset_to, schedule, sizes).run(longest, outward, held, edges)

    def replayer(
        self, given: Given, reset_to: dict[fx.Node, Tensor], schedule: Schedule, sizes: dict[str, int]
    ) -> Replayer:
        """What runs single spans, in any order; within another executable's run. The arguments are those of `run`."""
        self.settle()
        return SpanRunner(self, given, {}, reset_to, schedule, sizes).begin().replay
