"""What is to be split into loops and what stands around them, and what it is split into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from .ir.graph import LoopProgram, StepGraph


@dataclass(eq=False)
class StateNodes:
    """A state of a (forward or backward) step: its value before the step, and the node that is its value after."""

    prev: fx.Node
    next: fx.Node
    name: str


@dataclass(eq=False)
class Problem:
    """What is to be partitioned: a graph with states, and what is wanted from it.

    wanted: values needed from every step.  summed: values of which the sum over all steps is needed.
    stepwise: nodes that can't be batched over time, with the reason.
    one_loop: everything that varies goes into one loop (rows that mix and are not all valid).
    ends: the state that ends a row, see `LoopProgram`.
    """

    graph: fx.Graph
    batch: Any
    states: list[StateNodes]
    wanted: list[fx.Node]
    summed: list[fx.Node]
    finals: list[StateNodes] = field(default_factory=list)
    stepwise: dict[fx.Node, str] = field(default_factory=dict)
    one_loop: bool = False
    ends: fx.Node | None = None


def problem_of(
    step: StepGraph, names: Sequence[str] = (), stepwise: dict[fx.Node, str] | None = None, one_loop: bool = False
) -> Problem:
    """A forward step as a problem: its outputs and states are wanted. names: of its states."""
    named = names or [""] * len(step.prevs)
    states = [StateNodes(p, n, name) for p, n, name in zip(step.prevs, step.nexts, named)]
    return Problem(step.graph, step.batch, states, list(step.outputs), [], list(states), stepwise or {}, one_loop)


def joint_problem_of(step: StepGraph) -> Problem:
    """A forward step and its gradient as one problem, to see what loops in either."""
    found = problem_of(step)
    pairs = zip(step.ct_nexts, step.grad_prevs)
    found.states += [StateNodes(c, g, "") for c, g in pairs if c is not None and g is not None]
    found.finals = found.states
    found.wanted += step.results("grad_xs", "grad_constants", "grad_captured")
    return found


@dataclass(eq=False)
class BatchedPart:
    """Calls that run once for all steps, delayed states (placeholders) among them."""

    nodes: list[fx.Node]


@dataclass(eq=False)
class LoopPart:
    """One component. nodes: its calls.  also_outside: those of them, views, that stand outside as well."""

    nodes: list[fx.Node]
    states: list[StateNodes]
    program: LoopProgram | None = None
    inputs: list[fx.Node] = field(default_factory=list)
    kept: list[fx.Node] = field(default_factory=list)
    also_outside: set[fx.Node] = field(default_factory=set)


@dataclass(eq=False)
class Partition:
    """`once`: calls that do not vary, run before everything. `segments`: BatchedPart and LoopPart, in order.

    delayed: for every state whose prev is read outside its loop, the node that stands for it there.
    """

    problem: Problem
    once: list[fx.Node]
    segments: list[BatchedPart | LoopPart]
    delayed: dict[fx.Node, StateNodes]

    @property
    def loops(self) -> list[LoopPart]:
        return [s for s in self.segments if isinstance(s, LoopPart)]
