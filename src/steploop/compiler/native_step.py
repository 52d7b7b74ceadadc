"""One step at a time as one kernel call, and what sees to it that the kernel reads what the weights hold now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..errors import BuildError, MismatchError
from . import words
from .capture import Capture
from .extract import extract
from .guards import same_content
from .ir.graph import LoopProgram, Rows
from .lower import lower_forward
from .ops.table import is_view
from .passes.manager import mixing_reasons
from .problem import LoopPart
from .program import Call
from .words import Table

if TYPE_CHECKING:
    from ..backends.contract import Backend
    from .stream_step import StreamStep


def native(step: StreamStep, call: Call, backend: Backend) -> NativeStep | None:
    """The step as one kernel call; None where the backend does not take it."""
    streams = step.capture.made.streams
    if backend.name not in streams:
        streams[backend.name] = _native_plan(step.capture, backend)
    found = streams[backend.name]
    if found is None or found[2].left_to_torch(step.sizes):
        return None
    return NativeStep(step, *cast("tuple[Any, LoopPart, Any]", found), call, backend)


class _Refused(Exception):
    """A loop that the backend does not take."""


def _native_plan(capture: Capture, backend: Backend) -> tuple[Any, LoopPart, Any] | None:
    """The lowered step, its one loop and what runs that; None where the backend does not take it."""
    graph = capture.forward.graph
    if graph.batch is None or mixing_reasons(graph):
        return None

    def choose(program: Any, _widen: Any) -> Any:
        if backend.reasons_against(program):
            raise _Refused
        return backend.compile(program)

    try:
        with torch.no_grad():
            plan = lower_forward(graph, [], capture.program.state_names, choose, one_loop=True)
        plan.executable.settle()
    except (_Refused, BuildError):
        return None
    loops = plan.executable.partition.loops
    if len(loops) != 1 or len(plan.executable.partition.segments) != 1:
        return None
    if not _plain(plan, loops[0]):
        return None
    loop = _with_views(plan.executable, loops[0])
    if loop is not loops[0] and not backend.reasons_against(cast(LoopProgram, loop.program)):
        runner = backend.compile(cast(LoopProgram, loop.program))
        runner.settle()
        return plan, loop, runner
    return plan, loops[0], plan.executable.runners[loops[0]]


def _with_views(executable: Any, loop: LoopPart) -> LoopPart:
    """The loop together with the views of weights and constants that it reads: what it reads of them is then the user's
    own memory, and no copy that would be old when that changes."""
    views = [n for n in executable.once.nodes if is_view(n)]
    if not views:
        return loop
    wider = LoopPart([*views, *loop.nodes], loop.states)
    extract(wider, executable.partition.problem, executable.partition)
    return wider


def _plain(plan: Any, loop: LoopPart) -> bool:
    """Whether every output and every state comes out of the loop with its rows in front."""
    kept = set(loop.kept)
    outputs = all(n in kept and n.meta["rows"] == Rows(0) for n in plan.step.outputs)
    states = {s.prev for s in loop.states}
    return outputs and all(p in states for p in plan.step.prevs)


class NativeStep:
    """The step as one kernel call. The kernel reads weights and constants where the user has them.

    What is made of them once (the projection of a memory) is made again when one of its sources has changed. Not every
    change is counted by torch (one through `.data` or through numpy is not), so the sources are compared byte by byte.
    """

    def __init__(self, step: StreamStep, plan: Any, loop: LoopPart, runner: Any, call: Call, backend: Backend):
        self.step, self.plan, self.loop = step, plan, loop
        self.constants = dict(zip(plan.step.constants, call.constants))
        xs = [loop.inputs.index(x) if x in loop.inputs else -1 for x in plan.step.xs]
        order = {s.prev: i for i, s in enumerate(loop.states)}
        states = [order[p] for p in plan.step.prevs]
        outputs = [loop.kept.index(n) for n in plan.step.outputs]
        self.watched = [*step.captured(), *call.constants]
        self.places = self._places()
        self.stepper = backend.stepper(runner, self._constants(), xs, states, outputs, step.batch, step.sizes)
        self.run = self.stepper.run
        self._note_sources()

    def fork(self, step: StreamStep) -> NativeStep:
        twin = copy(self)
        twin.step, twin.stepper = step, self.stepper.fork()
        twin.run = twin.stepper.run
        return twin

    def _places(self) -> list[int]:
        return [*map(Tensor.data_ptr, self.watched)]

    def _note_sources(self) -> None:
        self.sources = self._sources()
        dense = [s for s in self.sources if s.is_dense]
        self.others = [s for s in self.sources if not s.is_dense]
        # (what lies in memory in pieces is looked at each time)
        self.bytes_differ = (lambda: 0) if self.others else _comparison(dense)

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

    def with_marks(
        self, xs: Sequence[Tensor], states: Sequence[Tensor], mask: Tensor | None = None, resets: Tensor | None = None,
        back: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], list[Tensor]] | None:  # fmt: skip
        # torch's stubs leave data_ptr without annotations.
        if [*map(Tensor.data_ptr, self.watched)] != self.places or self.bytes_differ() >= 0:  # type: ignore[no-untyped-call]
            self._look_again()
        return self.run(xs, states, mask, resets, back)

    def check(self) -> None:
        """MismatchError where the kernel reads what was made of weights or constants that have changed since."""
        for kept, now in zip(self.stepper.held, self.stepper.arranged(self._constants())):
            if kept is not None and not same_content(kept, now):
                raise MismatchError(
                    "a stream read an old copy of a weight or of a constant. This is a mistake of steploop: please "
                    "report it with the step."
                )

    take = with_marks  # marks are nothing that the kernel is not given anyway

    def _look_again(self) -> None:
        places = self._places()
        if places != self.places or not all(s.same() for s in self.sources):
            self.stepper.set_constants(self._constants())
            self.places = places
            self._note_sources()


class Source:
    """A tensor that something was made of, and what it held then."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.copy = tensor, tensor.detach().clone(memory_format=torch.contiguous_format)
        self.is_dense = words.compare is not None and tensor.is_contiguous() and not tensor.is_neg()
        self.size = tensor.numel() * tensor.element_size()

    def same(self) -> bool:
        return same_content(self.tensor, self.copy)


def _comparison(sources: Sequence[Source]) -> Callable[[], int]:
    """What gives -1 where these, which lie in memory in one piece, hold what they held."""
    found = [(s.tensor.data_ptr(), s.copy.data_ptr(), s.size) for s in sources if s.size]
    return Table(found).question() if found else lambda: -1
