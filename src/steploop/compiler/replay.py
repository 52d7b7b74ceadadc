"""Wide values that the backward needs and the forward does not keep: made again, a span of steps at a time.

A state that is a matrix has many more numbers than what changes it at a step: an outer product, a decay. To keep it of
every step costs more than to make it. So the forward keeps what is narrow, and of such states only the value before
every span of about sqrt(T) steps (checkpoints in time: Griewank & Walther 2000; Chen et al. 2016). When the backward
comes to a span, it first runs the steps of the span once more from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from .absorb import is_light_product
from .execute import Executable, Replayer
from .ir.edit import remove_dead
from .ir.graph import GRADIENTS, Rows, StepGraph
from .lower import SPREAD, Saving, as_input, copied, improved, row_bytes
from .memory_operator import is_memory
from .ops.table import operation_of
from .passes.manager import mixing_reasons
from .problem import Problem, StateNodes
from .show_loops import show_loops
from .span import Span
from .stages import note

WIDE = 4096  # bytes of a row's value that may be worth making again
LEAST_SPAN = 4
REPLAY_FROM = 256 << 20  # bytes of all steps' wide values from which on save="auto" makes them again


def span_steps(steps: int) -> int:
    """Steps of a span: as many values at the edges as inside one span."""
    return max(LEAST_SPAN, math.isqrt(steps))


# -- what is made again --------------------------------------------------------------------------------------


def with_replay(step: StepGraph, saving: Saving) -> Saving:
    """The saving without the wide values that can be made again of narrow ones; as it was, where there are none."""
    if step.batch is None or mixing_reasons(step) or any(map(is_memory, step.graph.nodes)):
        return saving
    wide = [n for n in saving.nodes if _may_be_made_again(n, step)]
    while wide:
        search = _Search(step, saving, set(wide))
        failed = [n for n in wide if not search.reaches(n)]
        if not failed:
            return search.saving(wide)
        wide = [n for n in wide if n not in failed]
    return saving


def _may_be_made_again(node: fx.Node, step: StepGraph) -> bool:
    call = node.op == "call_function" and node not in step.outputs
    return call and node.meta["rows"] == Rows(0) and row_bytes(node) >= WIDE


class _Search:
    """Follows wide values back to what is known: narrow values that are kept, inputs, and states before the step."""

    def __init__(self, step: StepGraph, known: Saving, wide: set[fx.Node]):
        self.step, self.known, self.wide = step, known, wide
        self.narrow = set(known.nodes) - wide
        self.edges = {i for i in known.prevs if step.nexts[i] in wide}
        self.prevs: set[int] = set()
        self.read: set[fx.Node] = set()  # known values that are narrow, one by one

    def reaches(self, node: fx.Node) -> bool:
        """Whether all that a value is made of is known, or cheap to make."""
        stack, seen = list(node.all_input_nodes), {node}
        if not _is_cheap(node):
            return False
        while stack:
            source = stack.pop()
            if source in seen or source in self.wide or not source.meta["varies"]:
                continue
            seen.add(source)
            if source in self.narrow:
                self.read.add(source)
            elif source.op == "placeholder":
                if not self._is_given(source):
                    return False
            elif _is_cheap(source):
                stack.extend(source.all_input_nodes)
            else:
                return False
        return True

    def _is_given(self, source: fx.Node) -> bool:
        if source not in self.step.prevs:
            self.read.add(source)
            return True
        index = self.step.prevs.index(source)
        following = self.step.nexts[index]
        if following in self.wide:
            self.edges.add(index)
        elif following in self.narrow:
            self.prevs.add(index)
            self.read.add(source)
        return following in self.wide or following in self.narrow

    def saving(self, wide: list[fx.Node]) -> Saving:
        if SPREAD * sum(map(row_bytes, self.read)) > sum(map(row_bytes, wide)):
            return self.known
        nodes = [n for n in self.known.nodes if n not in self.wide]
        return Saving(sorted({*self.known.prevs, *self.prevs}), nodes, wide, sorted(self.edges))


def _is_cheap(node: fx.Node) -> bool:
    known = operation_of(node)
    if known.random or not isinstance(node.meta["val"], Tensor):
        return False
    return known.pointwise or known.cheap or known.row_pass or is_light_product(node)


# -- how ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class ReplayPlan:
    """The executable that makes the wide values again.

    known: placeholders of what was kept, in the order of `Saving.nodes`.
    edges: of the states that are kept between spans, their values before the step.
    """

    step: StepGraph
    executable: Executable
    known: list[fx.Node]
    edges: list[fx.Node]


def lower_replay(step: StepGraph, saving: Saving, names: Sequence[str], choose: Callable[..., Any]) -> ReplayPlan:
    own, (known, again) = copied(step, saving.nodes, saving.again)
    for role in ("ct_outputs", "ct_nexts", *GRADIENTS):
        setattr(own, role, [])
    own.outputs, own.nexts = again, []
    known = [as_input(own, node) for node in known]
    remove_dead(own)
    nexts = {i: saving.again.index(step.nexts[i]) for i in saving.edges}  # each is one of the outputs

    def problem() -> Problem:
        states = [StateNodes(own.prevs[i], own.outputs[at], names[i]) for i, at in nexts.items()]
        return Problem(own.graph, own.batch, states, list(own.outputs), [], [], mixing_reasons(own))

    executable = Executable(improved(own, problem, "again"), choose)
    note("loops of what is made again", lambda: show_loops(own, executable.partition, executable.runners))
    return ReplayPlan(own, executable, known, [own.prevs[i] for i in saving.edges])


@dataclass(eq=False)
class Replay:
    """One backward pass: the wide values of the span that it is at.

    edges: (spans, B, ...) for each state of the plan, its value before every span.
    """

    plan: ReplayPlan
    runner: Replayer
    edges: list[Tensor]
    spans: list[Span]
    _number: int = -1
    _values: list[tuple[Tensor, bool]] = field(default_factory=list)

    def values(self, span: Span) -> list[tuple[Tensor, bool]]:
        """See `execute.Replayer`."""
        number = self.number(span)
        if number != self._number:
            self._values = []  # the memory of the last span is free
            states = {prev: edge[number] for prev, edge in zip(self.plan.edges, self.edges)}
            self._number, self._values = number, self.runner(span, states)
        return self._values

    def number(self, span: Span) -> int:
        return next(i for i, s in enumerate(self.spans) if (s.start, s.stop) == (span.start, span.stop))


@dataclass(eq=False)
class Again:
    """A wide value after every step."""

    replay: Replay
    index: int

    def cut(self, span: Span) -> Tensor:
        return self.replay.values(span)[self.index][0]


@dataclass(eq=False)
class AgainBefore:
    """A wide state before every step. index: of its value after the step; state: of its edges."""

    replay: Replay
    index: int
    state: int
    reset_to: Tensor | None

    def cut(self, span: Span) -> Tensor:
        after, room = self.replay.values(span)[self.index]
        edge = self.replay.edges[self.state][self.replay.number(span)]
        if not room or not span.schedule.full or span.total == 0 or span.hits is not None:
            return span.delay(after, edge, self.reset_to, False)
        before = after.as_strided(after.shape, after.stride(), after.storage_offset() - edge.numel())
        before[: span.schedule.batch].copy_(edge)
        return before
