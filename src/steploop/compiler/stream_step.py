"""One step at a time without gradients, with as little as possible around it: what streams run.

A whole step is one straight line here: there is nothing to move out of a loop that runs once. Natively it is one
kernel call; otherwise one Python function of ATen calls.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from itertools import starmap
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from ..errors import BuildError
from . import captures, forward_mode
from .batch import OncePiece
from .captured import Capture
from .dependencies import function_modes
from .guards import same_content
from .ir.graph import Rows
from .lower import copied, lower_forward
from .ops.table import is_view
from .partition import Loop, extract
from .passes.manager import mixing_reasons
from .program import Call, Program
from .recording import CudaRecorder, Recording, reasons_against, settings, types_of

is_jit_tracing = torch._C._is_tracing
dispatch_modes = torch._C._len_torch_dispatch_stack
_STRIDED = torch.strided


class StreamStep:
    """A capture prepared for single steps of `batch` rows.

    __call__(xs, states) -> (outputs, states), or None where it does not apply (any more): gradients are on, a
    shape, a setting or something that the step depends on has changed. Then the caller takes the usual way, and
    makes a new StreamStep for the next steps.
    """

    def __init__(self, program: Program, call: Call, backend: str):
        self.program = program
        with torch.no_grad():
            self.capture, self.dependencies = captures.find(program, call)
        self.batch = call.batch
        self.device = call.device
        self.settings = quick_settings(self.device)
        self.types = [(x.shape[1:], x.dtype) for x in call.xs]
        self.out_spec = self.capture.out_spec
        self.sizes = self.capture.sizes(call)
        self.constants = call.constants
        self._run = _native(self, call) if backend != "eager" and self.device.type == "cpu" else None
        if self._run is None:
            self._run = _Straight(self, call)
            if self.device.type == "cuda" and backend == "auto" and not reasons_against(self._run.calls):
                self._run = _Recorded(self, self._run, CudaRecorder(self.device))

    def __call__(self, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]] | None:
        if torch.is_grad_enabled() or quick_settings(self.device) != self.settings or not self.dependencies.unchanged():
            return None
        for x, (shape, dtype) in zip(xs, self.types):
            if not self.takes(x) or x.shape != shape or x.dtype is not dtype:
                return None
        return self._run(xs, states)

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor is of the kind, and on the device, that it was made for."""
        return type(tensor) is Tensor and tensor.layout is _STRIDED and tensor.device == self.device

    def captured(self) -> list[Tensor]:
        return self.capture.tensors(self.dependencies)


def quick_settings(device: torch.device) -> tuple[Any, ...]:
    """What `dependencies.ambient` tells, on one device and without autocast, for which no StreamStep is made; and
    whether tensors may be more than their numbers: dual, those of torch.func, or seen by a tracer."""
    autocast = torch.is_autocast_enabled(device.type)
    watched = (
        forward_ad._current_level >= 0
        or peek_interpreter_stack() is not None
        or is_jit_tracing()
        or dispatch_modes() > 0
    )
    modes = function_modes()
    return autocast, torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), modes, watched


def prepare(program: Program, call: Call, backend: str) -> StreamStep | None:
    """A StreamStep for calls like this one, or None where there is none."""
    tensors = [*call.xs, *call.initial, *call.constants]
    device = call.device
    if backend not in ("auto", "cpu", "eager") or any(t.device != device or type(t) is not Tensor for t in tensors):
        return None
    if device.type not in ("cpu", "cuda"):
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled(device.type) or forward_mode.active():
        return None  # casts stand in the captured graph; running it under autocast would cast again
    step = StreamStep(program, call, backend)
    return step if step.capture.forward.graph.batch is not None or step.capture.batch == call.batch else None


class _Straight:
    """The step as one function of ATen calls."""

    def __init__(self, step: StreamStep, call: Call):
        own, _ = copied(step.capture.forward.graph)
        mixing_reasons(own)
        self.step, self.sizes, self.constants = step, step.sizes, call.constants
        self.calls = [n for n in own.graph.nodes if n.op == "call_function"]
        self.piece = OncePiece(self.calls, own.batch)
        given = [*own.xs, *own.constants, *own.prevs, *own.captured]
        place = {n: i for i, n in enumerate([*given, *self.piece.nodes])}
        self.reads = [place[n] for n in self.piece.reads]
        self.outputs, self.nexts = [place[n] for n in own.outputs], [place[n] for n in own.nexts]

    def __call__(self, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        values = [*xs, *self.constants, *states, *self.step.captured()]
        values.extend(self.piece(self.sizes, [values[i] for i in self.reads]))
        return [values[i] for i in self.outputs], [values[i] for i in self.nexts]


class _Recorded:
    """The same, recorded at its second step. Weights and constants are read where they are, not copied: where they
    have moved, it is recorded anew, some times, and then runs as it is."""

    MOST = 8  # recordings

    def __init__(self, step: StreamStep, straight: _Straight, recorder: Any):
        self.step, self.straight, self.recorder = step, straight, recorder
        self.recording: Recording | None = None
        self.key: Any = None
        self.place = recorder.place()
        self.left = self.MOST

    def __call__(self, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        read = [*self.step.captured(), *self.straight.constants]
        key = (*map(Tensor.data_ptr, read), types_of([*xs, *states]), settings())
        place = self.recorder.place()
        if place != self.place:
            self.recorder.follow(self.place)
            self.place = place
        if key != self.key:
            first, self.key, self.recording = self.key is None, key, None
            if first or self.left == 0:
                return self.straight(xs, states)
        if self.recording is None and not self._record(xs, states):
            return self.straight(xs, states)
        self.recording.load([*xs, *states])
        self.recording.launch()
        results = self.recording.give()
        count = len(self.straight.outputs)
        return results[:count], results[count:]

    def _record(self, xs: Sequence[Tensor], states: Sequence[Tensor]) -> bool:
        if self.left == 0 or not self.recorder.possible():
            return False
        self.left -= 1
        width = len(xs)

        def function(inputs: list[Tensor]) -> list[Tensor]:
            outputs, nexts = self.straight(inputs[:width], inputs[width:])
            return [*outputs, *nexts]

        try:
            self.recording = Recording(self.recorder, function, [*xs, *states])
        except Exception:  # what can't be recorded can still be run
            self.left = 0
        return self.recording is not None


def _native(step: StreamStep, call: Call) -> Any:
    """The step as one kernel call; None where the native backend does not take it."""
    plans = step.capture.plans
    if "stream" not in plans:
        plans["stream"] = _native_plan(step.capture)
    found = plans["stream"]
    if found is None or found[2].left_to_torch(step.sizes):
        return None
    return _Native(step, *found, call)


def _native_plan(capture: Capture) -> tuple[Any, Loop, Any] | None:
    """The lowered step, its one loop and what runs that."""
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
    if not _plain(plan, loops[0]):
        return None
    loop = _with_views(plan.executable, loops[0])
    if loop is not loops[0] and not native.reasons_against(loop.program):
        return plan, loop, native.compile(loop.program)
    return plan, loops[0], plan.executable.runners[loops[0]]


def _with_views(executable: Any, loop: Loop) -> Loop:
    """The loop together with the views of weights and constants that it reads: what it reads of them is then the user's
    own memory, and no copy that would be old when that changes."""
    views = [n for n in executable.once.nodes if is_view(n)]
    if not views:
        return loop
    wider = Loop([*views, *loop.nodes], loop.states)
    extract(wider, executable.partition.problem, executable.partition)
    return wider


def _plain(plan: Any, loop: Loop) -> bool:
    """Whether every output and every state comes out of the loop with its rows in front."""
    kept = set(loop.kept)
    outputs = all(n in kept and n.meta["rows"] == Rows(0) for n in plan.step.outputs)
    states = {s.prev for s in loop.states}
    return outputs and all(p in states for p in plan.step.prevs)


class _Native:
    """The step as one kernel call. The kernel reads weights and constants where the user has them.

    What is made of them once (the projection of a memory) is made again when one of its sources has changed. Not every
    change is counted by torch (one through `.data` or through numpy is not), so the sources are compared byte by byte.
    """

    def __init__(self, step: StreamStep, plan: Any, loop: Loop, runner: Any, call: Call):
        from ..backends.cpu.stepper import Stepper

        self.step, self.plan, self.loop = step, plan, loop
        self.constants = dict(zip(plan.step.constants, call.constants))
        xs = [loop.inputs.index(x) if x in loop.inputs else -1 for x in plan.step.xs]
        order = {s.prev: i for i, s in enumerate(loop.states)}
        states = [order[p] for p in plan.step.prevs]
        outputs = [loop.kept.index(n) for n in plan.step.outputs]
        self.watched = [*step.captured(), *call.constants]
        self.places = self._places()
        self.stepper = Stepper(runner, self._constants(), xs, states, outputs, step.batch, step.sizes)
        self.run = self.stepper.run
        self._note_sources()

    def _places(self) -> list[int]:
        return [*map(Tensor.data_ptr, self.watched)]

    def _note_sources(self) -> None:
        sources = self._sources()
        self.dense = [s.memory for s in sources if s.memory is not None]
        self.others = [s for s in sources if s.memory is None]

    def _sources(self) -> list[Source]:
        """What the kernel reads a copy of, or something that was made of it."""
        given = dict(zip([*self.plan.step.captured, *self.plan.step.constants], self.watched))
        copied = [n for n, held in zip(self.loop.inputs, self.stepper.held) if held is not None and not (
            n in given and held.data_ptr() == given[n].data_ptr())]  # fmt: skip
        stack, found = copied, {}
        while stack:
            node = stack.pop()
            if node in given:
                found[node] = Source(given[node])
            else:
                stack.extend(node.all_input_nodes)
        return list(found.values())

    def _constants(self) -> list[Tensor | None]:
        """The loop's inputs that are the same at every step, in their places."""
        once = self.plan.executable.once
        values = dict(zip(self.plan.step.captured, self.step.captured()))
        values.update(self.constants)
        values.update(zip(once.nodes, once(self.step.sizes, [values[n] for n in once.reads])))
        return [values.get(n) for n in self.loop.inputs]

    def __call__(self, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        places = [*map(Tensor.data_ptr, self.watched)]
        if places != self.places or any(starmap(_memcmp, self.dense)) or not all(s.same() for s in self.others):
            self.stepper.set_constants(self._constants())
            self.places = places
            self._note_sources()
        return self.run(xs, states)


_memcmp = ctypes.CDLL(None).memcmp if os.name == "posix" else None
if _memcmp is not None:
    _memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Source:
    """A tensor that something was made of, and what it held then.

    memory: its address, that of the copy, and the bytes, where they can be compared as they lie.
    """

    def __init__(self, tensor: Tensor):
        self.tensor, self.copy = tensor, tensor.detach().clone(memory_format=torch.contiguous_format)
        self.memory: tuple[Any, ...] | None = None
        if _memcmp is not None and tensor.is_contiguous():
            # (the copy goes along: its memory must stay as long as its address is known)
            size = tensor.numel() * tensor.element_size()
            self.memory = _Address(tensor), _Address(self.copy), size

    def same(self) -> bool:
        return same_content(self.tensor, self.copy)


class _Address(ctypes.c_void_p):
    """The address of a tensor's numbers, which lives as long as the tensor."""

    def __init__(self, tensor: Tensor):
        super().__init__(tensor.data_ptr())
        self.tensor = tensor
