"""Makes a capture: traces a step, sees to it that nothing else happened, and notes what the trace has read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import MismatchError
from .capture import Capture, ProgramFacts, hint, symbol_values
from .dependencies import Dependencies
from .few_rows import does_the_same, essence
from .free_numbers import FreeNumber, NotFree
from .memory_operator import calls_in, must_inline, tracing
from .partition import needed_nodes, recurrent_components
from .passes.manager import find_mixing, simplify
from .problem import problem_of
from .program import Call, Program, roots_of
from .reads import Reads
from .recorder import Recorder
from .refusals import KEEP
from .side_effects import Snapshot
from .stages import aside
from .trace import Observed, Signature, Trace
from .trace_step import FixedBatch, trace_forward
from .two_runs import SideEffect, check_same, check_same_constants
from .walk import Number


def snapshot(program: Program) -> Snapshot:
    with _disable_current_modes():
        return Snapshot([root for root, *_ in roots_of(program)])


def make(
    program: Program, signature: Signature, call: Call, known: Sequence[Reads], free: Sequence[Number],
    fixed: bool = False,
) -> tuple[Capture, Dependencies]:  # fmt: skip
    """A new capture, and the walk that goes with it. free: the floats that are to be inputs, as far as they can be.

    known: what other captures of the program have read; where that is the same, they share the object.
    fixed: for this number of rows alone.
    """
    while True:
        try:
            return _Maker(program, signature, call, list(free), fixed).make(known)
        except NotFree as error:
            left = [number for number in free if number.path not in error.paths]
            free = left if len(left) < len(free) else []
        except Exception:
            if not free:
                raise
            free = []  # the step may do with a float what no symbol can do


@dataclass(eq=False)
class _Maker:
    program: Program
    signature: Signature
    call: Call
    free: list[Number]
    fixed: bool = False
    by_tracing: set[str] = field(default_factory=set)

    def make(self, known: Sequence[Reads]) -> tuple[Capture, Dependencies]:
        program, signature = self.program, self.signature
        inline: set[int] = set()
        trace, symbolic, recorder = self._first_trace(inline)
        while more := _memories_in_loops(trace, program) - inline:
            inline |= more
            trace, symbolic, recorder = self._first_trace(inline)
        if signature.batch in (0, 1) and symbolic:
            # The step may look at the batch size: what it does with so few rows is what counts here.
            simplify(trace.graph)
            if not does_the_same(trace, signature, signature.batch, inline, program, self.free):
                trace, recorder = self._watched(self._fixed_trace)
                symbolic = False
        sizes = {k: hint(v) for k, v in symbol_values(trace, self.call).items()}
        floats = {number.path: number.value for number in self.free}
        if symbolic and signature.batch not in (0, 1) and not trace.holds_for(sizes, floats):
            # torch takes another way for few rows (a convolution does): a capture for B as small as this one.
            signature.batch_hint = cast(int, signature.batch)
            trace, symbolic, recorder = self._first_trace(inline)
        if self.free:
            self._check_free(trace, symbolic, inline)
        simplify(trace.graph)
        dependencies = read_by(program, recorder, known)
        return Capture(
            program=ProgramFacts.of(program), signature=signature, symbolic=symbolic, forward=trace,
            reads=dependencies.reads, key=dependencies.key, floats=settled_floats(dependencies, self.free),
            facts=dependencies.facts,
            slots=settle(trace, dependencies), pinned=dependencies.pinned,
            batch=None if symbolic or signature.batch is None else signature.batch, inline=frozenset(inline),
            by_tracing=frozenset(self.by_tracing),
        ), dependencies  # fmt: skip

    def _first_trace(self, inline: set[int]) -> tuple[Trace, bool, Recorder]:
        """A trace with a symbolic batch, or with the real one where the step fixes it."""

        def symbolic(observed: Observed) -> Trace:
            with tracing(inline) as memory:
                trace = trace_forward(self.program, self.signature, True, observed)
            trace.keep_alive.extend(memory.calls)
            return trace

        if self.signature.batch is not None and not self.fixed:
            try:
                trace, recorder = self._watched(symbolic)
                return trace, True, recorder
            except FixedBatch:
                pass
            except (SideEffect, NotFree):
                raise
            except Exception:
                # A closed-over tensor with a batch axis, say. If it is a real mistake, the message about real
                # sizes is the better one.
                pass
        trace, recorder = self._watched(self._fixed_trace)
        return trace, False, recorder

    def _check_free(self, trace: Trace, symbolic: bool, inline: set[int]) -> None:
        """The step must do with the floats what it did with symbols: it may ask what they are."""
        with aside(), tracing(inline) as memory:
            plain = trace_forward(self.program, self.signature, symbolic, Observed())
        plain.keep_alive.extend(memory.calls)
        # (what takes a symbol may stand there in its form with a tensor, see `traced_as.BY_TENSOR`)
        tensor = torch.ops.aten.scalar_tensor.default
        calls = [[_named(target) for target, _ in t.numbers if target is not tensor] for t in (trace, plain)]
        one, other = ([number for _, floats in t.numbers for number in floats] for t in (trace, plain))
        if calls[0] != calls[1] or not np.allclose(one, other, rtol=1e-12, atol=0.0, equal_nan=True):
            raise NotFree({number.path for number in self.free})

    def _fixed_trace(self, observed: Observed) -> Trace:
        """With the real batch size rows can't be told apart: remembering operations run step by step."""
        return trace_forward(self.program, self.signature, False, observed)

    def _watched(self, trace: Callable[[Observed], Trace]) -> tuple[Trace, Recorder]:
        """A trace of a step without side effects, and without numbers that differ from one run to the next."""
        before = snapshot(self.program)
        seed = torch.initial_seed()
        recorder = Recorder()
        try:
            first = trace(Observed(recorder, self.free))
        except Exception:
            with _disable_current_modes():
                before.restore()
            raise
        with _disable_current_modes():
            changed = checked(before, recorder, seed)
        if changed:
            self._first_step_for_real(before, changed)
            return self._watched_again(trace)
        if before.drawn():
            # Some thread drew a number; if it was the step, a second run comes out otherwise.
            again = trace(Observed(Recorder(), self.free))
            check_same(first, again)
            check_same_constants(first, again)
        return first, recorder

    def _watched_again(self, trace: Callable[[Observed], Trace]) -> tuple[Trace, Recorder]:
        """Once more, after the step's first run for real has kept what it keeps. What changes now is kept for each type
        of tensor that the step meets, and the tracer's is forgotten."""
        before, recorder, seed = snapshot(self.program), Recorder(), torch.initial_seed()
        first = trace(Observed(recorder, self.free))
        with _disable_current_modes():
            if changed := checked(before, recorder, seed):
                before.restore()
                self.by_tracing |= set(changed)
        return first, recorder

    def _first_step_for_real(self, before: Snapshot, changed: list[str]) -> None:
        """A step may compute a value once and keep it: then its first step changes something, and no later one does."""
        before.restore()
        if not _real(self.call):
            raise side_effect_of(changed)
        call = self.call
        xs = [x[0] if call.steps else x.new_zeros(x.shape[1:]) for x in call.xs]
        try:
            with _disable_current_modes(), torch.random.fork_rng(devices=[]):
                self.program.run(xs, call.constants, call.initial)
                between = snapshot(self.program)
                self.program.run(xs, call.constants, call.initial)
                again = between.changes()
        except Exception:
            before.restore()
            raise side_effect_of(changed) from None
        if again:
            before.restore()
            raise side_effect_of(changed)


def checked(before: Snapshot, recorder: Recorder, seed: int) -> list[str]:
    """The Python values that a trace has changed. Raises for what no step may do even once."""
    before.put_back_recomputed()
    changed = before.changes()
    tensors = [c for c in changed if c.startswith("the tensor ")]
    moved = before.resumed(recorder.resumed) + recorder.assigned()
    if recorder.refused is not None or tensors or moved or seed != torch.initial_seed():
        before.restore()
    if recorder.refused is not None:
        raise SideEffect(str(recorder.refused))
    if seed != torch.initial_seed():
        raise SideEffect("the step calls torch.manual_seed, which would happen once. Seed before the call.")
    if tensors:
        raise SideEffect(f"the step changes {', '.join(tensors)} in place. {KEEP}")
    if moved:
        raise side_effect_of(moved)
    return changed


def side_effect_of(changed: Sequence[str]) -> SideEffect:
    return SideEffect(
        f"the step changes a Python value: {', '.join(changed)}. A step is captured once and not run again, so the "
        "change would happen once instead of at every step. Keep what changes from step to step in an "
        'sl.State (self.count = sl.State(init=0)), or use backend="reference".'
    )


def _named(target: Any) -> Any:
    """An operation without the kinds of its arguments."""
    return getattr(target, "overloadpacket", target)


def _real(call: Call) -> bool:
    """Whether a call has tensors with values: under an outer trace it has none."""
    tensors = (*call.xs, *call.constants, *call.initial)
    return not any(isinstance(t, (FakeTensor, FunctionalTensor)) or t.is_meta for t in tensors)


# -- what was read ---------------------------------------------------------------------------------------------


def read_by(program: Program, recorder: Recorder, known: Sequence[Reads]) -> Dependencies:
    """The walk over what a traced step can have read."""
    reads = recorder.reads()
    while True:
        with _disable_current_modes():
            dependencies = Dependencies(roots_of(program), reads)
        functions, loose = recorder.unmet(dependencies.codes)
        paths = _contents_read(recorder, dependencies)
        more = recorder.reads(dependencies.codes, functions=functions | reads.functions, loose=loose, contents=paths)
        if more == reads:
            break
        reads = more
    same = next((r for r in known if r == reads), None)
    if same is not None:
        dependencies.reads = same
    dependencies.program = program
    program.kept.walks[dependencies.reads] = dependencies
    return dependencies


def _contents_read(recorder: Recorder, dependencies: Dependencies) -> frozenset[str]:
    place = {id(t): i for i, t in enumerate(dependencies.tensors)}
    return frozenset(dependencies.paths[place[id(t)]] for t in recorder.tensors if id(t) in place)


def settle(trace: Trace, dependencies: Dependencies) -> list[Any]:
    """The slots of a trace's tensors; the trace itself forgets them."""
    number = {id(t): i for i, t in enumerate(dependencies.tensors)}
    slots: list[Any] = [t if isinstance(t, FreeNumber) else number.get(id(t), t) for t in trace.tensors]
    trace.tensors = slots
    return slots


def settled_floats(dependencies: Dependencies, free: Sequence[Number]) -> list[float | None]:
    paths = {number.path for number in free}
    return [None if number.path in paths else number.value for number in dependencies.floats]


def check_kept(program: Program, call: Call, capture: Capture, dependencies: Dependencies) -> None:
    """MismatchError where a kept capture is not what a new one would be."""
    if not _real(call):
        return
    signature = replace(capture.signature, batch=hint(call.batch) if call.batch is not None else None)
    fresh, walk = make(program, signature, call, [capture.reads], capture.free(dependencies))
    kept = essence(capture.forward, None), list(map(id, capture.tensors(dependencies)))
    new = essence(fresh.forward, None), list(map(id, fresh.tensors(walk)))
    made = [i for i, s in enumerate(capture.slots) if not isinstance(s, int)]
    for ids in (kept[1], new[1]):
        ids[:] = [v for i, v in enumerate(ids) if i not in made]
    if kept != new and capture.symbolic == fresh.symbolic:
        raise MismatchError(
            f"a capture of {type(program.root).__name__} was used again, and a new one is another:\n"
            f"kept: {kept}\nnew:  {new}\nThis is a mistake of steploop: please report it with the step."
        )


# -- the parts of the graph that remember ----------------------------------------------------------------------


def _memories_in_loops(trace: Trace, program: Program) -> set[int]:
    """Remembering operations (by id) that must run step by step: something they read depends on them."""
    graph = trace.graph
    if not calls_in(graph.graph):
        return set()
    simplify(graph)
    if graph.batch is None or find_mixing(graph):
        return {id(call.op) for call in calls_in(graph.graph)}
    problem = problem_of(graph)
    return must_inline(graph.graph, recurrent_components(problem, needed_nodes(problem)))
