"""One step at a time without gradients, with as little as possible around it: what streams run.

A whole step is one straight line here: there is nothing to move out of a loop that runs once. Natively it is one
kernel call; otherwise one Python function of ATen calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from ..marks import wide
from . import capture_store, forward_mode
from .ambient import function_modes
from .batch import OncePiece
from .choices import choice, make_ready
from .guards import Kinds, kinds_guard
from .ir.graph import StepGraph, op_name
from .lower import copied
from .native_step import native
from .passes.manager import mixing_reasons
from .program import Call, Program
from .recording import CudaRecorder, Recording, reasons_against, settings, types_of

GlobalStateGuard: Any
try:
    from torch._C._dynamo.guards import GlobalStateGuard
except ImportError:  # not a public interface
    GlobalStateGuard = None

dispatch_modes = torch._C._len_torch_dispatch_stack
active_modes = torch._C._len_torch_function_stack
_STRIDED = torch.strided


class StreamStep:
    """A capture prepared for single steps of `batch` rows.

    take(xs, states, mask, resets, back) -> (outputs, states), or None where it does not apply: then the caller
    takes the usual way. If it no longer `holds`, because a shape, a setting or something that the step depends on has
    changed, the caller makes a new one for the next steps. mask, resets: (batch,) bool on the device, or None; back:
    what resets put the states back to.

    No output shares memory with anything else. States may: a list of states that it returned belongs to it for as long
    as it is given back as that same list, and what it holds is written to by the step after the next.
    """

    def __init__(self, program: Program, call: Call, backend: str):
        self.program = program
        with torch.no_grad():
            self.capture, self.dependencies = capture_store.find(program, call, partial(make_ready, program, backend))
        self.batch = call.batch
        self.device = call.device
        self.holds = True
        self.types = [(x.shape[1:], x.dtype) for x in call.xs]
        self.out_spec = self.capture.out_spec
        self.sizes = self.capture.sizes(call)
        self.constants = call.constants
        self._same_settings = _settings_guard(self.device)
        self._same_kinds = kinds_guard([x[0] for x in call.xs])
        self._unchanged = self.dependencies.unchanged
        self._same_constants = Kinds(call.constants).unchanged if call.constants else None
        stepping = choice(backend).stepping() if self.device.type == "cpu" else None
        self._run: Any = None if stepping is None else native(self, call, stepping)
        if self._run is None:
            self._run = straight = _Straight(self, call)
            if self.device.type == "cuda" and backend == "auto" and not reasons_against(straight.calls):
                self._run = _Recorded(self, straight, CudaRecorder(self.device))

    def take(
        self, xs: Sequence[Tensor], states: Sequence[Tensor], mask: Tensor | None = None, resets: Tensor | None = None,
        back: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], list[Tensor]] | None:  # fmt: skip
        # (written for few calls of Python functions: they are what a small step takes longest for)
        if not self._same_settings() or not self._unchanged():
            self.holds = False
        elif self._same_constants is not None and not self._same_constants():
            self.holds = False
        elif not self._same_kinds(*xs) and not all(map(self._is_like, xs, self.types)):
            self.holds = False
        if not self.holds:
            return None
        if mask is None and resets is None:
            return self._run.take(xs, states)
        return self._run.with_marks(xs, states, mask, resets, back)

    def fork(self) -> StreamStep:
        """Another one for the same steps, which shares no memory of states with it."""
        twin = copy(self)
        twin._run = self._run.fork(twin)
        return twin

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor is of the kind, and on the device, that it was made for."""
        return type(tensor) is Tensor and tensor.layout is _STRIDED and tensor.device == self.device

    def _is_like(self, x: Tensor, kind: tuple[torch.Size, torch.dtype]) -> bool:
        return self.takes(x) and x.shape == kind[0] and x.dtype is kind[1]

    def captured(self) -> list[Tensor]:
        return self.capture.tensors(self.dependencies)


class _Checked(StreamStep):
    """The same for STEPLOOP_CHECK=1: after each step its capture, and what it read of weights, are looked at."""

    def __init__(self, program: Program, call: Call, backend: str):
        super().__init__(program, call, backend)
        self.call = call

    def take(self, *given: Any) -> tuple[list[Tensor], list[Tensor]] | None:
        done = super().take(*given)
        if done is not None:
            capture_store.check_kept(self.program, self.call, self.capture, self.dependencies)
            self._run.check()
        return done


def quick_settings(device: torch.device) -> tuple[Any, ...]:
    """What `dependencies.ambient` tells, on one device and without autocast, for which no StreamStep is made."""
    autocast = torch.is_autocast_enabled(device.type)
    default = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    return torch.is_grad_enabled(), autocast, *default, torch.get_num_threads(), function_modes()


def _settings_guard(device: torch.device) -> Callable[[], bool]:
    """Whether the settings are those of now, and tensors are their numbers alone: none dual, of torch.func, or seen by
    a tracer. (Whether torch.jit traces, a stream asks itself.)"""
    settings, modes = quick_settings(device), function_modes()
    unchanged = None if GlobalStateGuard is None else GlobalStateGuard().check

    def same() -> bool:
        if forward_ad._current_level >= 0 or peek_interpreter_stack() is not None:
            return False
        if dispatch_modes() > 0:
            return False
        if unchanged is None:
            return quick_settings(device) == settings
        # (it knows nothing of modes but whether they are switched off)
        return unchanged() and ((not modes and not active_modes()) or function_modes() == modes)

    return same


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
    step = (_Checked if capture_store.checking() else StreamStep)(program, call, backend)
    return step if step.capture.forward.graph.batch is not None or step.capture.batch == call.batch else None


class _WithMarks:
    """Rows that start anew, and rows that take no part, around a step of whole tensors."""

    mixes = False  # whether one row sees others

    def check(self) -> None:
        """What was made of weights and constants is made anew at each step: nothing can be old."""

    def take(self, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        raise NotImplementedError

    def with_marks(
        self, xs: Sequence[Tensor], states: Sequence[Tensor], mask: Tensor | None, resets: Tensor | None,
        back: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]] | None:  # fmt: skip
        """None where what stands in the rows that take no part might be seen."""
        if mask is not None and self.mixes:
            return None
        start = states
        if resets is not None:
            start = [torch.where(wide(resets, s), b, s) for s, b in zip(states, back)]
        try:
            outputs, nexts = self.take(xs, start)
        except Exception:
            if mask is None:
                raise
            return None  # it may have been such a row
        if mask is not None:
            outputs = [torch.where(wide(mask, o), o, torch.zeros_like(o)) for o in outputs]
            nexts = [torch.where(wide(mask, n), n, s) for n, s in zip(nexts, states)]
        return outputs, nexts


class _Straight(_WithMarks):
    """The step as one function of ATen calls."""

    def __init__(self, step: StreamStep, call: Call):
        own, _ = copied(step.capture.forward.graph)
        self.mixes = bool(mixing_reasons(own)) or own.batch is None
        self.step, self.sizes, self.constants = step, step.sizes, call.constants
        self.calls = [n for n in own.graph.nodes if n.op == "call_function"]
        self.piece = OncePiece(self.calls, own.batch)
        given = [*own.xs, *own.constants, *own.prevs, *own.captured]
        place = {n: i for i, n in enumerate([*given, *self.piece.nodes])}
        self.reads = [place[n] for n in self.piece.reads]
        self.outputs, self.nexts = [place[n] for n in own.outputs], [place[n] for n in own.nexts]
        self.shared = _shared(own)

    def take(self, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        values = [*xs, *self.constants, *states, *self.step.captured()]
        values.extend(self.piece(self.sizes, [values[i] for i in self.reads]))
        results = [values[i].clone() if s else values[i] for i, s in zip([*self.nexts, *self.outputs], self.shared)]
        count = len(self.nexts)
        return results[count:], results[:count]

    def fork(self, step: StreamStep) -> _Straight:
        twin = copy(self)
        twin.step = step
        return twin


def _shared(step: StepGraph) -> list[bool]:
    """For the states after a step, then its outputs: whether one may lie in memory that others have.

    Whoever writes into an output must not write into a state or a weight, nor the next x into a state."""
    given = {n for n in step.graph.nodes if n.op == "placeholder"}
    found: list[bool] = []
    for node, prev in [*zip(step.nexts, step.prevs), *((n, None) for n in step.outputs)]:
        memory = _memory_of(node)
        found.append(memory in given and node is not prev)  # (a state that is not written stays where it is)
        given.add(memory)
    return found


def _memory_of(node: Any) -> Any:
    """The node whose memory a node's value may lie in."""
    while node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        views = schema is None or any(r.alias_info is not None for r in schema.returns) or op_name(node) in _MAY_VIEW
        if not views or not node.all_input_nodes:
            return node
        node = node.all_input_nodes[0]
    return node


_MAY_VIEW = {"_unsafe_view", "contiguous", "flatten", "reshape", "resolve_conj", "resolve_neg", "to", "type_as"}


class _Recorded(_WithMarks):
    """The same, recorded at its second step. Weights and constants are read where they are, not copied: where they
    have moved, it is recorded anew, some times, and then runs as it is."""

    MOST = 8  # recordings

    def __init__(self, step: StreamStep, straight: _Straight, recorder: Any):
        self.step, self.straight, self.recorder = step, straight, recorder
        self.mixes = straight.mixes
        self.recording: Any = None  # a `Recording`
        self.key: Any = None
        self.place = recorder.place()
        self.left = self.MOST

    def take(self, xs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        read = [*self.step.captured(), *self.straight.constants]
        key = (*map(Tensor.data_ptr, read), types_of([*xs, *states]), settings())
        place = self.recorder.place()
        if place != self.place:
            self.recorder.follow(self.place)
            self.place = place
        if key != self.key:
            first, self.key, self.recording = self.key is None, key, None
            if first or self.left == 0:
                return self.straight.take(xs, states)
        if self.recording is None and not self._record(xs, states):
            return self.straight.take(xs, states)
        self.recording.load([*xs, *states])
        self.recording.launch()
        results = self.recording.give()
        count = len(self.straight.outputs)
        return results[:count], results[count:]

    def fork(self, step: StreamStep) -> _Recorded:
        return _Recorded(step, self.straight.fork(step), CudaRecorder(step.device))

    def _record(self, xs: Sequence[Tensor], states: Sequence[Tensor]) -> bool:
        if self.left == 0 or not self.recorder.possible():
            return False
        self.left -= 1
        width = len(xs)

        def function(inputs: list[Tensor]) -> list[Tensor]:
            outputs, nexts = self.straight.take(inputs[:width], inputs[width:])
            return [*outputs, *nexts]

        try:
            self.recording = Recording(self.recorder, function, [*xs, *states])
        except Exception:  # what can't be recorded can still be run
            self.left = 0
        return self.recording is not None
