"""Loops for tests of the native backend, straight from a function: nothing is hoisted out of them.

A function f(xs, constants, states) -> (results, next states), all (B, ...) but the constants of `onces`,
becomes one LoopProgram that keeps every result. It runs under the eager and the native Runner, side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steploop.backends import cpu, eager
from steploop.compiler.ir.graph import LoopInput, LoopProgram, Rows
from steploop.compiler.passes.rows import annotate
from steploop.compiler.program import Program
from steploop.compiler.schedule import Schedule, make_schedule
from steploop.compiler.span import Span
from steploop.compiler.trace import Leaf, Signature
from steploop.compiler.trace_step import trace_forward


@dataclass(eq=False)
class Case:
    """A loop with the values it runs on."""

    loop: LoopProgram
    steps: list[Tensor]  # (T, B, ...)
    constants: list[Tensor]  # (B, ...)
    onces: list[Tensor]
    states: list[Tensor]
    sizes: dict[str, int]


def make_case(
    function: Callable,
    steps: Sequence[Tensor],
    states: Sequence[Tensor],
    constants: Sequence[Tensor] = (),
    dynamic: Sequence[tuple[str, int, int]] = (),
    names: Sequence[str] = (),
) -> Case:
    """`function` may close over tensors that are the same for all rows. `names`: of the states."""
    names = list(names) or [f"s{i}" for i in range(len(states))]
    batch = steps[0].shape[1] if steps else states[0].shape[0]
    program = Program(
        run=function, root=function, key=None, state_names=names,
        x_names=[f"x{i}" for i in range(len(steps))], constant_names=[f"k{i}" for i in range(len(constants))],
        constant_batched=[True] * len(constants),
    )  # fmt: skip
    signature = Signature(
        [Leaf.of(x, True, per_step=True) for x in steps], [Leaf.of(c, True) for c in constants],
        [Leaf.of(s, True) for s in states], batch, frozenset(dynamic),
    )  # fmt: skip
    with torch.no_grad():
        trace = trace_forward(program, signature, True)
    step = trace.graph
    for node in step.graph.nodes:  # the capture drops copies, so a view may have become a copy
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default
    annotate(step)
    inputs = [LoopInput(n, "step", Rows(0), n.name) for n in step.xs]
    inputs += [LoopInput(n, "once", Rows(0), n.name) for n in step.constants]
    inputs += [LoopInput(n, "once", None, n.name) for n in step.captured]
    loop = LoopProgram(step.graph, step.batch, step.prevs, step.nexts, inputs, step.outputs, names)
    values = {"x": [s[0] for s in steps], "constant": list(constants), "state": list(states)}
    sizes = {
        str(symbol): values[kind][index].shape[dim]
        for symbol, (kind, index, dim) in step.symbols.items() if kind != "batch"
    }  # fmt: skip
    return Case(loop, list(steps), list(constants), trace.tensors, list(states), sizes)


def run(
    runner: Callable,
    case: Case,
    schedule: Schedule,
    down: bool = False,
    reset_to=None,
    span: Span | None = None,
):
    span = span or Span(schedule, 0, schedule.steps)
    packed = [schedule.pack(x)[span.first : span.first + span.total] for x in case.steps]
    inputs = [*packed, *(schedule.sort(c) for c in case.constants), *case.onces]
    states = [schedule.sort(s) for s in case.states]
    return runner(inputs, states, reset_to, span, down, case.sizes)


def both(case: Case, lengths=None, resets=None, down: bool = False):
    """(states, kept) under eager and under the native backend."""
    reasons = cpu.reasons_against(case.loop)
    assert not reasons, reasons
    time = case.steps[0].shape[0]
    schedule = make_schedule(time, case.states[0].shape[0], torch.device("cpu"), lengths, None, resets)
    back = None if resets is None else [torch.full_like(s, 0.5) for s in case.states]
    wanted = run(eager.Runner(case.loop), case, schedule, down, back)
    found = run(cpu.compile(case.loop), case, schedule, down, back)
    return wanted, found


def assert_same(case: Case, lengths=None, resets=None, down: bool = False, rtol=2e-6, atol=1e-6) -> None:
    (states, kept), (own_states, own_kept) = both(case, lengths, resets, down)
    labels = [f"state {n}" for n in case.loop.names] + [
        f"result {i}: {n.name} {n.args}" for i, n in enumerate(case.loop.kept)
    ]
    problems = []
    for label, a, b in zip(labels, [*states, *kept], [*own_states, *own_kept]):
        try:
            torch.testing.assert_close(b, a, rtol=rtol, atol=atol, equal_nan=True)
        except AssertionError as error:
            problems.append(f"{label}: {' '.join(str(error).split())[:300]}")
    assert not problems, "\n".join(problems)
