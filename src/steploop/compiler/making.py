"""Makes a capture: traces a step, sees to it that nothing else happened, and notes what the trace has read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import MismatchError, StepError
from .capture import FixedBatch, trace_forward, trace_joint
from .captured import Capture, Facts, hint, lock, sizes_of
from .dependencies import Dependencies, Number
from .free_numbers import FreeNumber, NotFree
from .ir.graph import Size, expression
from .memory_operator import calls_in, must_inline, tracing
from .ops.table import operation_of
from .partition import needed_nodes, problem_of, recurrent_components
from .passes.histories import use_whole_histories
from .passes.manager import find_mixing, simplify
from .patience import long_part
from .program import Call, Program, name_of
from .reads import Reads
from .recorder import Recorder
from .refusals import KEEP
from .side_effects import Snapshot
from .stages import aside
from .trace import Leaf, Observed, Signature, Trace


class SideEffect(StepError):
    """The step changed something in Python."""


_DRAW = (
    "A number from Python's or numpy's random generator, or from the clock, is drawn once when the step is captured. "
    "Draw it with torch (torch.rand) inside the step, or pass it in as a sequence."
)


def roots_of(program: Program) -> list[tuple[Any, str, Any, Any]]:
    """Where the walk over what a step depends on begins: (value, path, what holds it, where in that)."""
    return [(program.root, "", None, None), *((held[i], name, held, i) for held, i, name in program.statics)]


def _snapshot(program: Program) -> Snapshot:
    with _disable_current_modes():
        return Snapshot([root for root, *_ in roots_of(program)])


def make(
    program: Program, signature: Signature, call: Call, known: Sequence[Reads], free: Sequence[Number]
) -> tuple[Capture, Dependencies]:
    """A new capture, and the walk that goes with it. free: the floats that are to be inputs, as far as they can be.

    known: what other captures of the program have read; where that is the same, they share the object.
    """
    while True:
        try:
            return _Maker(program, signature, call, list(free)).make(known)
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
            if not _like(trace, signature, signature.batch, inline, program, self.free):
                trace, recorder = self._watched(self._fixed_trace)
                symbolic = False
        sizes = {k: hint(v) for k, v in sizes_of(trace, self.call).items()}
        floats = {number.path: number.value for number in self.free}
        if symbolic and signature.batch not in (0, 1) and not trace.holds_for(sizes, floats):
            # torch takes another way for few rows (a convolution does): a capture for B as small as this one.
            signature.batch_hint = signature.batch
            trace, symbolic, recorder = self._first_trace(inline)
        if self.free:
            self._check_free(trace, symbolic, inline)
        simplify(trace.graph)
        dependencies = read_by(program, recorder, known)
        return Capture(
            program=Facts.of(program), signature=signature, symbolic=symbolic, forward=trace, reads=dependencies.reads,
            key=dependencies.key, floats=_settled_floats(dependencies, self.free), facts=dependencies.facts,
            slots=_settle(trace, dependencies), pinned=dependencies.pinned,
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

        if self.signature.batch is not None:
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
        calls = [[(target, len(floats)) for target, floats in t.numbers] for t in (trace, plain)]
        floats = [[number for _, floats in t.numbers for number in floats] for t in (trace, plain)]
        if calls[0] != calls[1] or not np.allclose(*floats, rtol=1e-12, atol=0.0, equal_nan=True):
            raise NotFree({number.path for number in self.free})

    def _fixed_trace(self, observed: Observed) -> Trace:
        """With the real batch size rows can't be told apart: remembering operations run step by step."""
        return trace_forward(self.program, self.signature, False, observed)

    def _watched(self, trace: Callable[[Observed], Trace]) -> tuple[Trace, Recorder]:
        """A trace of a step without side effects, and without numbers that differ from one run to the next."""
        before = _snapshot(self.program)
        seed = torch.initial_seed()
        recorder = Recorder()
        try:
            first = trace(Observed(recorder, self.free))
        except Exception:
            with _disable_current_modes():
                before.restore()
            raise
        with _disable_current_modes():
            changed = _checked(before, recorder, seed)
        if changed:
            self._first_step_for_real(before, changed)
            return self._watched_again(trace)
        if before.drawn():
            # Some thread drew a number; if it was the step, a second run comes out otherwise.
            again = trace(Observed(Recorder(), self.free))
            _check_same(first, again)
            _check_same_constants(first, again)
        return first, recorder

    def _watched_again(self, trace: Callable[[Observed], Trace]) -> tuple[Trace, Recorder]:
        """Once more, after the step's first run for real has kept what it keeps. What changes now is kept for each type
        of tensor that the step meets, and the tracer's is forgotten."""
        before, recorder, seed = _snapshot(self.program), Recorder(), torch.initial_seed()
        first = trace(Observed(recorder, self.free))
        with _disable_current_modes():
            if changed := _checked(before, recorder, seed):
                before.restore()
                self.by_tracing |= set(changed)
        return first, recorder

    def _first_step_for_real(self, before: Snapshot, changed: list[str]) -> None:
        """A step may compute a value once and keep it: then its first step changes something, and no later one does."""
        before.restore()
        if not _real(self.call):
            raise _changes(changed)
        call = self.call
        xs = [x[0] if call.steps else x.new_zeros(x.shape[1:]) for x in call.xs]
        try:
            with _disable_current_modes(), torch.random.fork_rng(devices=[]):
                self.program.run(xs, call.constants, call.initial)
                between = _snapshot(self.program)
                self.program.run(xs, call.constants, call.initial)
                again = between.changes()
        except Exception:
            before.restore()
            raise _changes(changed) from None
        if again:
            before.restore()
            raise _changes(changed)


def _checked(before: Snapshot, recorder: Recorder, seed: int) -> list[str]:
    """The Python values that a trace has changed. Raises for what no step may do even once."""
    before.put_back_recomputed()
    changed = before.changes()
    tensors = [c for c in changed if c.startswith("the tensor ")]
    moved = before.resumed(recorder.resumed)
    if recorder.refused is not None or tensors or moved or seed != torch.initial_seed():
        before.restore()
    if recorder.refused is not None:
        raise SideEffect(str(recorder.refused))
    if seed != torch.initial_seed():
        raise SideEffect("the step calls torch.manual_seed, which would happen once. Seed before the call.")
    if tensors:
        raise SideEffect(f"the step changes {', '.join(tensors)} in place. {KEEP}")
    if moved:
        raise _changes(moved)
    return changed


def _changes(changed: Sequence[str]) -> SideEffect:
    return SideEffect(
        f"the step changes a Python value: {', '.join(changed)}. A step is captured once and not run again, so the "
        "change would happen once instead of at every step. Keep what changes from step to step in an "
        'sl.State (self.count = sl.State(init=0)), or use backend="reference".'
    )


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


def _settle(trace: Trace, dependencies: Dependencies) -> list[Any]:
    """The slots of a trace's tensors; the trace itself forgets them."""
    number = {id(t): i for i, t in enumerate(dependencies.tensors)}
    trace.tensors = [t if isinstance(t, FreeNumber) else number.get(id(t), t) for t in trace.tensors]
    return trace.tensors


def _settled_floats(dependencies: Dependencies, free: Sequence[Number]) -> list[float | None]:
    paths = {number.path for number in free}
    return [None if number.path in paths else number.value for number in dependencies.floats]


# -- the gradient ----------------------------------------------------------------------------------------------


def with_joint(capture: Capture, dependencies: Dependencies) -> Dependencies:
    """Captures the gradient too, if it has not been. Gives the walk that the captured tensors are found in."""
    with lock:
        if capture.joint is not None:
            return dependencies
        with long_part(f"capturing {name_of(dependencies.program)} with its gradient"):
            return _add_joint(capture, dependencies)


def _add_joint(capture: Capture, dependencies: Dependencies) -> Dependencies:
    program = dependencies.program
    tensors = [t for t, s in zip(capture.tensors(dependencies), capture.slots) if not isinstance(s, FreeNumber)]
    free = capture.free(dependencies)
    before, recorder, seed = _snapshot(program), Recorder(), torch.initial_seed()
    try:
        joint = _joint(capture, program, tensors, set(capture.inline), Observed(recorder, free))
        opaque = {id(call.op) for call in calls_in(joint.graph.graph)}
        if opaque and find_mixing(joint.graph):
            # Where gradients mix rows, everything may have to be one loop.
            joint = _joint(capture, program, tensors, opaque | set(capture.inline), Observed(recorder, free))
    except Exception:
        with _disable_current_modes():
            before.restore()
        raise
    with _disable_current_modes():
        if changed := _checked(before, recorder, seed):
            before.restore()
            if not capture.by_tracing.issuperset(changed):
                raise _changes(changed)
    _check_same(capture.forward, joint)
    joint.keep_alive.extend(use_whole_histories(joint.graph))
    return _with_more_reads(capture, dependencies, joint, recorder)


def _joint(
    capture: Capture, program: Program, tensors: list[Tensor], inline: set[int], observed: Observed
) -> Trace:
    if capture.symbolic:
        with tracing(inline) as memory:
            joint = trace_joint(program, capture.signature, True, capture.forward.graph, tensors, observed)
        joint.keep_alive.extend(memory.calls)
    else:  # as in `_fixed_trace`
        joint = trace_joint(program, capture.signature, False, capture.forward.graph, tensors, observed)
    simplify(joint.graph)
    return joint


def _with_more_reads(
    capture: Capture, dependencies: Dependencies, joint: Trace, recorder: Recorder
) -> Dependencies:
    """With a gradient the step may have read more than without: the capture is described anew by all of it."""
    old = capture.reads
    walk = read_by(dependencies.program, recorder, [old])
    if not walk.reads.within(old):
        reads = walk.reads.joined(old)
        with _disable_current_modes():
            walk = Dependencies(roots_of(dependencies.program), reads)
        walk.program = dependencies.program
        free = capture.free(dependencies)
        capture.earlier[old] = capture.slots
        capture.slots = _renumbered(capture.slots, dependencies, walk)
        capture.forward.tensors = capture.slots
        capture.reads, capture.key, capture.facts = reads, walk.key, walk.facts
        capture.floats, capture.pinned = _settled_floats(walk, free), walk.pinned
        walk.program.kept.walks[reads] = walk
        walk.program.kept.quick = None
    else:
        walk = dependencies
    capture.joint = joint
    capture.joint_slots = _settle(joint, walk)
    return walk


def _renumbered(slots: Sequence[Any], old: Dependencies, new: Dependencies) -> list[Any]:
    number = {id(t): i for i, t in enumerate(new.tensors)}
    found = [old.tensors[s] if isinstance(s, int) else s for s in slots]
    return [s if isinstance(s, FreeNumber) else number.get(id(s), s) for s in found]


def check_kept(program: Program, call: Call, capture: Capture, dependencies: Dependencies) -> None:
    """MismatchError where a kept capture is not what a new one would be."""
    if not _real(call):
        return
    signature = replace(capture.signature, batch=hint(call.batch) if call.batch is not None else None)
    fresh, walk = make(program, signature, call, [capture.reads], capture.free(dependencies))
    kept = _essence(capture.forward, None), list(map(id, capture.tensors(dependencies)))
    new = _essence(fresh.forward, None), list(map(id, fresh.tensors(walk)))
    made = [i for i, s in enumerate(capture.slots) if not isinstance(s, int)]
    for ids in (kept[1], new[1]):
        ids[:] = [v for i, v in enumerate(ids) if i not in made]
    if kept != new and capture.symbolic == fresh.symbolic:
        raise MismatchError(
            f"a capture of {type(program.root).__name__} was used again, and a new one is another:\n"
            f"kept: {kept}\nnew:  {new}\nThis is a mistake of steploop: please report it with the step."
        )


# -- few rows --------------------------------------------------------------------------------------------------


def same_for_few(capture: Capture, batch: int, program: Program, dependencies: Dependencies) -> bool:
    """Whether the step does the same with 0 rows, or with 1, as with several: it may look at the batch size."""
    if batch not in capture.like:
        free = capture.free(dependencies)
        capture.like[batch] = _like(capture.forward, capture.signature, batch, set(capture.inline), program, free)
    return capture.like[batch]


def _like(
    trace: Trace, signature: Signature, batch: int, inline: set[int], program: Program, free: Sequence[Number]
) -> bool:
    groups = (signature.xs, signature.constants, signature.states)
    few = Signature(*([_with_rows(leaf, batch) for leaf in group] for group in groups), batch, signature.dynamic)
    try:
        with aside(), tracing(inline) as memory:
            other = trace_forward(program, few, False, Observed(Recorder(), free))
        other.keep_alive.extend(memory.calls)
    except Exception:
        return False
    with aside():
        simplify(other.graph)
    return _essence(trace, batch) == _essence(other, batch)


def _with_rows(leaf: Leaf, batch: int) -> Leaf:
    shape = (batch, *leaf.shape[1:]) if leaf.batched else leaf.shape
    return Leaf(shape, leaf.dtype, leaf.device, leaf.batched)


def _essence(trace: Trace, batch: int | None) -> list[Any]:
    """What a trace computes with so many rows (None: any): its calls with their arguments, but for those that only
    shape."""
    graph = trace.graph
    values = {s: sympy.Symbol("_".join(map(str, place))) for s, place in graph.symbols.items()}
    if graph.batch is not None and batch is not None:
        values[graph.batch] = sympy.Integer(batch)
    named: dict[fx.Node, Any] = {}
    calls: list[Any] = []

    def plain(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return named[argument]
        if isinstance(argument, Size):
            return str(argument.expr.xreplace(values))
        if isinstance(argument, (list, tuple)):
            return tuple(map(plain, argument))
        if isinstance(argument, torch.ScriptObject):  # Python makes a new name for it at every look
            return str(argument._type())
        return str(argument) if isinstance(argument, int) and not isinstance(argument, bool) else repr(argument)

    for node in graph.graph.nodes:
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        if node.op == "placeholder":
            named[node] = f"input {len(named)}"
        elif node.op == "call_function" and operation_of(node).view == "shape":
            named[node] = named[node.all_input_nodes[0]] if node.all_input_nodes else name
        elif node.op == "call_function" and name in ("permute", "transpose", "t"):
            order, source = _order_of_axes(node, name, values), named[node.args[0]]
            named[node] = source if order == sorted(order) else f"call {len(calls)}"
            calls += [("permute", source, order)] if order != sorted(order) else []
        elif node.op == "call_function":
            named[node] = f"call {len(calls)}"
            kwargs = tuple((k, plain(v)) for k, v in sorted(node.kwargs.items()))
            args = [a for i, a in enumerate(node.args) if i != _HANDLE_AT.get(node.target)]
            calls.append((str(node.target), plain(args), kwargs))
    return [*calls, *(named[n] for n in (*graph.outputs, *graph.nexts))]


# Which argument is the number of something made in the trace: a loop, or a remembering operation.
_HANDLE_AT = {
    torch.ops.steploop.inner_loop.default: 1, torch.ops.steploop.inner_loop_backward.default: 3,
    torch.ops.steploop.memory.default: 1, torch.ops.steploop.memory_backward.default: 2,
}  # fmt: skip


def _order_of_axes(node: fx.Node, name: str, values: dict[Any, Any]) -> list[int]:
    """The axes of a permutation, but for those of size 1: torch moves them otherwise where the batch is one."""
    rank = node.meta["val"].dim()
    order = list(range(rank))
    if name == "permute":
        order = [d % rank for d in node.args[1]]
    elif rank:
        a, b = (0, rank - 1) if name == "t" else (d % rank for d in node.args[1:3])
        order[a], order[b] = order[b], order[a]
    sizes = [sympy.sympify(expression(n)).xreplace(values) for n in node.args[0].meta["val"].shape]
    return [d for d in order if sizes[d] != 1]


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


# -- two runs --------------------------------------------------------------------------------------------------


def _check_same(forward: Trace, joint: Trace) -> None:
    """A second run of the step must do what the first did; otherwise Python decided differently."""
    for (one, first), (two, second) in zip(forward.numbers, joint.numbers):
        if one is not two:
            return  # with gradients some operations take another form; nothing can be said of what follows
        if repr(first) != repr(second):
            raise SideEffect(
                f"two runs of the step computed with different numbers ({one}): {first} and {second}. {_DRAW}"
            )


def _check_same_constants(first: Trace, again: Trace) -> None:
    """The same for tensors that the step made of Python's numbers, and for what it calls."""
    calls = [[target for target, _ in t.numbers] for t in (first, again)]
    pairs = list(zip(first.tensors, again.tensors))
    same = calls[0] == calls[1] and len(first.tensors) == len(again.tensors)
    if not same or any(a is not b and isinstance(a, Tensor) and not torch.equal(a, b) for a, b in pairs):
        raise SideEffect(f"two runs of the step did different things. {_DRAW}")
