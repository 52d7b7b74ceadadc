"""One step at a time without gradients, with as little as possible around it: what streams run.

A whole step is one straight line here: there is nothing to move out of a loop that runs once. Natively it is one
kernel call; otherwise one Python function of ATen calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..errors import BuildError
from . import captures
from .batch import OncePiece
from .captures import Capture
from .dependencies import function_modes
from .graph import Rows
from .lower import copied, lower_forward, mixing_reasons
from .partition import Loop
from .program import Call, Program

_version = attrgetter("_version")
_STRIDED = torch.strided


class StreamStep:
    """A capture prepared for single steps of `batch` rows.

    __call__(xs, states) -> (outputs, states), or None where it does not apply (any more): gradients are on, a
    shape, a setting or something that the step depends on has changed. Then the caller takes the usual way, and
    makes a new StreamStep for the next steps.
    """

    def __init__(self, program: Program, call: Call, native: bool):
        self.program = program
        with torch.no_grad():
            self.capture, self.dependencies = captures.find(program, call)
        self.batch = call.batch
        self.settings = quick_settings()
        self.types = [(x.shape[1:], x.dtype) for x in call.xs]
        self.out_spec = self.capture.out_spec
        self.sizes = self.capture.sizes(call)
        self.constants = call.constants
        self._run = _native(self, call) if native else None
        if self._run is None:
            self._run = _straight(self, call)

    def __call__(self, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]] | None:
        if torch.is_grad_enabled() or quick_settings() != self.settings or not self.dependencies.unchanged():
            return None
        for x, (shape, dtype) in zip(xs, self.types):
            if type(x) is not Tensor or x.shape != shape or x.dtype is not dtype:
                return None
            if not x.is_cpu or x.layout is not _STRIDED:
                return None
        return self._run(xs, states)

    def captured(self) -> list[Tensor]:
        return self.capture.tensors(self.dependencies)


def quick_settings() -> tuple[Any, ...]:
    """What `dependencies.ambient` tells, on the CPU and without autocast, for which no StreamStep is made."""
    autocast = torch.is_autocast_enabled("cpu")
    return autocast, torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), function_modes()


def prepare(program: Program, call: Call, backend: str) -> StreamStep | None:
    """A StreamStep for calls like this one, or None where there is none."""
    tensors = [*call.xs, *call.initial, *call.constants]
    if backend not in ("auto", "cpu", "eager") or any(t.device.type != "cpu" or type(t) is not Tensor for t in tensors):
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None  # casts stand in the captured graph; running it under autocast would cast again
    step = StreamStep(program, call, native=backend != "eager")
    return step if step.capture.forward.graph.batch is not None or step.capture.batch == call.batch else None


def _straight(step: StreamStep, call: Call) -> Any:
    """The step as one function of ATen calls."""
    own, _ = copied(step.capture.forward.graph)
    mixing_reasons(own)
    piece = OncePiece([n for n in own.graph.nodes if n.op == "call_function"], own.batch)
    given = [*own.xs, *own.constants, *own.prevs, *own.captured]
    place = {n: i for i, n in enumerate([*given, *piece.nodes])}
    reads = [place[n] for n in piece.reads]
    outputs, nexts = [place[n] for n in own.outputs], [place[n] for n in own.nexts]
    sizes, constants = step.sizes, call.constants

    def run(xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        values = [*xs, *constants, *states, *step.captured()]
        values.extend(piece(sizes, [values[i] for i in reads]))
        return [values[i] for i in outputs], [values[i] for i in nexts]

    return run


def _native(step: StreamStep, call: Call) -> Any:
    """The step as one kernel call; None where the native backend does not take it."""
    plans = step.capture.plans
    if "stream" not in plans:
        plans["stream"] = _native_plan(step.capture)
    found = plans["stream"]
    if found is None or found[0].executable.runners[found[1]].left_to_torch(step.sizes):
        return None
    return _Native(step, *found, call)


def _native_plan(capture: Capture) -> tuple[Any, Loop] | None:
    from .pipeline import backend_module

    native = backend_module("cpu")
    graph = capture.forward.graph
    if native is None or graph.batch is None or mixing_reasons(graph):
        return None
    refused: list[Any] = []

    def choose(program: Any, _widen: Any) -> Any:
        if native.reasons_against(program):
            refused.append(program)
            return None
        try:
            return native.compile(program)
        except BuildError:
            refused.append(program)
            return None

    with torch.no_grad():
        plan = lower_forward(graph, [], capture.program.state_names, choose, one_loop=True)
    loops = plan.executable.partition.loops
    if refused or len(loops) != 1 or len(plan.executable.partition.segments) != 1:
        return None
    return (plan, loops[0]) if _plain(plan, loops[0]) else None


def _plain(plan: Any, loop: Loop) -> bool:
    """Whether every output and every state comes out of the loop with its rows in front."""
    kept = set(loop.kept)
    outputs = all(n in kept and n.meta["rows"] == Rows(0) for n in plan.step.outputs)
    states = {s.prev for s in loop.states}
    return outputs and all(p in states for p in plan.step.prevs)


class _Native:
    def __init__(self, step: StreamStep, plan: Any, loop: Loop, call: Call):
        from ..backends.cpu.stepper import Stepper

        self.step, self.plan, self.loop = step, plan, loop
        self.constants = dict(zip(plan.step.constants, call.constants))
        xs = [loop.inputs.index(x) if x in loop.inputs else -1 for x in plan.step.xs]
        order = {s.prev: i for i, s in enumerate(loop.states)}
        states = [order[p] for p in plan.step.prevs]
        outputs = [loop.kept.index(n) for n in plan.step.outputs]
        runner = plan.executable.runners[loop]
        self.watched = [*step.captured(), *call.constants]
        # Changes of tensors made in inference mode are not counted: they are laid out anew at every step.
        self.uncounted = any(t.is_inference() for t in self.watched)
        self.versions = self._current()
        self.stepper = Stepper(runner, self._constants(), xs, states, outputs, step.batch, step.sizes)
        self.run = self.stepper.run

    def _current(self) -> list[int]:
        if self.uncounted:
            return []
        return [*map(Tensor.data_ptr, self.watched), *map(_version, self.watched)]

    def _constants(self) -> list[Tensor | None]:
        """The loop's inputs that are the same at every step, in their places."""
        once = self.plan.executable.once
        values = dict(zip(self.plan.step.captured, self.step.captured()))
        values.update(self.constants)
        values.update(zip(once.nodes, once(self.step.sizes, [values[n] for n in once.reads])))
        return [values.get(n) for n in self.loop.inputs]

    def __call__(self, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        current = self._current()
        if self.uncounted or current != self.versions:
            self.stepper.set_constants(self._constants())
            self.versions = current
        return self.run(xs, states)
