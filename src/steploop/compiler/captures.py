"""Captures that are kept, and when one may be used again.

A capture belongs to a step (or a function's code), to what the step depended on, to the settings of torch,
and to the shapes of its inputs. The batch size is free; another axis becomes free when a second size of it
is seen, so a new size captures anew at most once per axis.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import StepError
from .capture import FixedBatch, Leaf, Signature, Trace, trace_forward, trace_joint
from .dependencies import Dependencies, ambient, same_states
from .memory_operator import calls_in, must_inline, tracing
from .partition import Problem, State, needed_nodes, recurrent_components
from .program import Call, Program
from .refusals import KEEP
from .rows import annotate
from .simplify import simplify
from .whole_histories import use_whole_histories


def hint(size: Any) -> int:
    """The size of an axis; under another trace the size it was seen with, without fixing it."""
    node = getattr(size, "node", None)
    return int(size) if node is None else int(node.hint)


@dataclass(frozen=True)
class Facts:
    """What a capture knows of its Program: not the Program itself, which would keep the user's step alive."""

    state_names: list[str]
    x_names: list[str]
    constant_names: list[str]
    constant_batched: list[bool]
    batched: bool

    @staticmethod
    def of(program: Program) -> Facts:
        return Facts(program.state_names, program.x_names, program.constant_names, program.constant_batched,
                     program.batched)  # fmt: skip


@dataclass(eq=False)
class Capture:
    """A captured step. `joint` is made when a gradient is first asked for.

    It is kept under its step and must not keep that alive: it refers to the step's tensors by number alone.

    slots: for every captured tensor its number in the walk, or the tensor itself where the walk has not met
    it (a constant that the step makes).
    pinned: objects that its key names by their id.
    batch: the only B it holds for, or None.
    """

    program: Facts
    signature: Signature
    symbolic: bool
    forward: Trace
    slots: list[int | Tensor]
    pinned: list[Any]
    batch: int | None
    inline: frozenset[int] = frozenset()
    joint: Trace | None = None
    joint_slots: list[int | Tensor] = field(default_factory=list)
    plans: dict[Hashable, Any] = field(default_factory=dict)
    one_row: bool | None = None

    @property
    def out_spec(self) -> Any:
        return self.forward.out_spec

    def tensors(self, dependencies: Dependencies, joint: bool = False) -> list[Tensor]:
        """The captured tensors, as they are now."""
        slots = self.joint_slots if joint else self.slots
        return [dependencies.tensors[s] if isinstance(s, int) else s for s in slots]

    def sizes(self, call: Call) -> dict[str, int]:
        return sizes_of(self.forward, call)

    def require_joint(self, dependencies: Dependencies) -> Trace:
        with lock:
            if self.joint is None:
                self.joint = self._trace_joint(dependencies)
        return self.joint

    def _joint(self, dependencies: Dependencies, tensors: list[Tensor], inline: set[int]) -> Trace:
        if self.symbolic:
            with tracing(inline) as memory:
                joint = trace_joint(dependencies.program, self.signature, True, tensors)
            joint.keep_alive.extend(memory.calls)
        else:  # as in `_fixed_trace`
            joint = trace_joint(dependencies.program, self.signature, False, tensors)
        simplify(joint.graph)
        return joint

    def _trace_joint(self, dependencies: Dependencies) -> Trace:
        tensors = self.tensors(dependencies)
        with _Unchanged(dependencies):
            joint = self._joint(dependencies, tensors, set(self.inline))
            opaque = {id(call.op) for call in calls_in(joint.graph.graph)}
            if opaque and annotate(joint.graph):
                # Where gradients mix rows, everything may have to be one loop.
                joint = self._joint(dependencies, tensors, opaque | set(self.inline))
        _check_same(self.forward, joint)
        joint.keep_alive.extend(use_whole_histories(joint.graph))
        self.joint_slots = _settle(joint, dependencies)
        return joint


def sizes_of(trace: Trace, call: Call) -> dict[str, Any]:
    """The values of the symbols of a trace in a call, by name."""
    found = {}
    for name, kind, index, dim in trace.symbols:
        if kind == "batch":
            found[name] = call.batch
        elif kind == "x":
            found[name] = call.xs[index].shape[dim + 1]
        elif kind == "constant":
            found[name] = call.constants[index].shape[dim]
        else:
            found[name] = call.initial[index].shape[dim]
    return found


_BY_ROOT: weakref.WeakKeyDictionary[Any, dict[Hashable, list[Capture]]] = weakref.WeakKeyDictionary()
_OTHERS: dict[Hashable, list[Capture]] = {}
captured = 0  # how many captures were made in this process; tests look at it
# torch's tracer patches classes while it runs: one trace at a time. A trace may start another (an inner loop).
lock = threading.RLock()


def dependencies_of(program: Program) -> Dependencies:
    """The walk, kept on the Program: in a table of this module it would keep its own key alive."""
    walk = program.__dict__.get("_walk")
    if walk is None or not walk.unchanged():
        walk = program.__dict__["_walk"] = Dependencies(program.root)
        walk.program = program
    return walk


def find(program: Program, call: Call) -> tuple[Capture, Dependencies]:
    """The capture for a call, made now if there is none."""
    dependencies = dependencies_of(program)
    settings = ambient()
    shapes = _quick_key(call)
    quick = program.__dict__.get("_quick")
    if quick is not None and quick[0] is dependencies and quick[1] == (settings, shapes):
        return quick[2], dependencies
    with lock:
        capture = _find(program, call, dependencies, settings)
    program.__dict__["_quick"] = (dependencies, (settings, shapes), capture)
    return capture, dependencies


def _quick_key(call: Call) -> Hashable:
    """Everything of a call's shapes; None where sizes are symbolic (they may not be compared)."""
    def key(t: Tensor) -> tuple:
        return (tuple(map(hint, t.shape)), t.dtype, t.device)

    return (
        tuple((k[0][1:], *k[1:]) for k in map(key, call.xs)), tuple(map(key, call.constants)),
        tuple(map(key, call.initial)),
        None if call.batch is None else hint(call.batch),
    )  # fmt: skip


def _find(program: Program, call: Call, dependencies: Dependencies, settings: Hashable) -> Capture:
    signature = signature_of(program, call)
    family = (dependencies.key, program.key, program.batched, settings, _kinds(signature))
    store = _store(program)
    known = store.setdefault(family, [])
    for capture in known:
        if _fits(capture, signature, call, program):
            return capture
    capture = _make(program, signature, known, dependencies, call)
    known.append(capture)
    return capture


def _store(program: Program) -> dict[Hashable, list[Capture]]:
    root = program.root
    if isinstance(root, types.FunctionType):
        return _BY_ROOT.setdefault(root.__code__, {})
    kept = getattr(root, "_kept", None)
    if isinstance(kept, dict):
        return kept.setdefault("captures", {})  # in the Step itself, so that they go when it goes
    if isinstance(root, nn.Module):
        return _BY_ROOT.setdefault(root, {})
    while len(_OTHERS) > 256:
        _OTHERS.pop(next(iter(_OTHERS)))
    return _OTHERS


def signature_of(program: Program, call: Call) -> Signature:
    def leaf(tensor: Tensor, batched: bool, per_step: bool) -> Leaf:
        shape = tuple(map(hint, tensor.shape[1:] if per_step else tensor.shape))
        return Leaf(shape, tensor.dtype, tensor.device, batched)

    batched = program.batched
    return Signature(
        [leaf(t, batched, True) for t in call.xs],
        [leaf(t, batched and b, False) for t, b in zip(call.constants, program.constant_batched)],
        [leaf(t, batched, False) for t in call.initial],
        hint(call.batch) if batched else None,
    )


def _groups(signature: Signature) -> list[tuple[str, int, Leaf]]:
    groups = (("x", signature.xs), ("constant", signature.constants), ("state", signature.states))
    return [(kind, i, leaf) for kind, group in groups for i, leaf in enumerate(group)]


def _kinds(signature: Signature) -> Hashable:
    return tuple((k, len(leaf.shape), leaf.dtype, leaf.device, leaf.batched) for k, _, leaf in _groups(signature))


def _differences(a: Signature, b: Signature) -> set[tuple[str, int, int]]:
    found = set()
    for (kind, i, one), (_, _, two) in zip(_groups(a), _groups(b)):
        for dim, (m, n) in enumerate(zip(one.shape, two.shape)):
            if m != n and not (dim == 0 and one.batched):
                found.add((kind, i, dim))
    return found


def _fits(capture: Capture, signature: Signature, call: Call, program: Program) -> bool:
    if capture.batch is not None and capture.batch != signature.batch:
        return False
    differing = _differences(capture.signature, signature)
    if not differing <= capture.signature.dynamic:
        return False
    sizes = {k: hint(v) for k, v in sizes_of(capture.forward, call).items()}
    if any(size < 2 for name, size in sizes.items() if not _is_batch(capture, name)):
        return False
    if signature.batch == 1 and capture.batch is None and not _same_for_one_row(capture, program):
        return False
    if signature.batch in (0, 1) and capture.batch is None:
        likely = capture.signature.batch_hint
        sizes = {name: likely if _is_batch(capture, name) else size for name, size in sizes.items()}
    return capture.forward.holds_for(sizes) and (capture.joint is None or capture.joint.holds_for(sizes))


def _is_batch(capture: Capture, name: str) -> bool:
    return capture.forward.graph.batch is not None and str(capture.forward.graph.batch) == name


def _same_for_one_row(capture: Capture, program: Program) -> bool:
    """Whether the step does the same with one row as with several (it may look at the batch size)."""
    if capture.one_row is None:
        single = Signature(
            *([_one(leaf) for leaf in group] for group in
              (capture.signature.xs, capture.signature.constants, capture.signature.states)),
            1, capture.signature.dynamic,
        )  # fmt: skip
        try:
            with tracing(set(capture.inline)) as memory:
                trace = trace_forward(program, single, symbolic=False)
            trace.keep_alive.extend(memory.calls)
        except Exception:
            capture.one_row = False
        else:
            simplify(trace.graph)
            capture.one_row = _essence(trace.graph.graph) == _essence(capture.forward.graph.graph)
    return capture.one_row


def _one(leaf: Leaf) -> Leaf:
    shape = (1, *leaf.shape[1:]) if leaf.batched else leaf.shape
    return Leaf(shape, leaf.dtype, leaf.device, leaf.batched)


_SHAPING = {"view", "expand", "reshape", "_unsafe_view", "squeeze", "unsqueeze", "clone", "contiguous"}


def _essence(graph: fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes
            if n.op == "call_function" and getattr(getattr(n.target, "overloadpacket", None), "__name__", "")
            not in _SHAPING]  # fmt: skip


def _make(
    program: Program, signature: Signature, known: list[Capture], dependencies: Dependencies, call: Call
) -> Capture:
    global captured
    captured += 1
    if known:
        signature.dynamic = known[-1].signature.dynamic | frozenset(_differences(known[-1].signature, signature))
    inline: set[int] = set()
    trace, symbolic = _first_trace(program, signature, dependencies, inline)
    while more := _memories_in_loops(trace, program) - inline:
        inline |= more
        trace, symbolic = _first_trace(program, signature, dependencies, inline)
    if signature.batch == 1 and symbolic:
        # The step may look at the batch size: what it does with one row is what counts here.
        probe = Capture(Facts.of(program), signature, True, trace, [], [], None, frozenset(inline))
        simplify(trace.graph)
        if not _same_for_one_row(probe, program):
            trace, symbolic = _fixed_trace(program, signature), False
    sizes = {k: hint(v) for k, v in sizes_of(trace, call).items()}
    if symbolic and signature.batch not in (0, 1) and not trace.holds_for(sizes):
        # torch takes another way for few rows (a convolution does): a capture for B as small as this one.
        signature.batch_hint = signature.batch
        trace, symbolic = _first_trace(program, signature, dependencies, inline)
    simplify(trace.graph)
    slots = _settle(trace, dependencies)
    fixed = None if symbolic or signature.batch is None else signature.batch
    return Capture(
        Facts.of(program), signature, symbolic, trace, slots, dependencies.pinned, fixed, frozenset(inline)
    )


def _fixed_trace(program: Program, signature: Signature) -> Trace:
    """With the real batch size rows can't be told apart: remembering operations run step by step."""
    return trace_forward(program, signature, symbolic=False)


def _memories_in_loops(trace: Trace, program: Program) -> set[int]:
    """Remembering operations (by id) that must run step by step: something they read depends on them."""
    graph = trace.graph
    if not calls_in(graph.graph):
        return set()
    simplify(graph)
    if graph.batch is None or annotate(graph):
        return {id(call.op) for call in calls_in(graph.graph)}
    states = [State(p, n, name) for p, n, name in zip(graph.prevs, graph.nexts, program.state_names)]
    problem = Problem(graph.graph, graph.batch, states, list(graph.outputs), [], states)
    return must_inline(graph.graph, recurrent_components(problem, needed_nodes(problem)))


def _first_trace(
    program: Program, signature: Signature, dependencies: Dependencies, inline: set[int]
) -> tuple[Trace, bool]:
    """A trace with a symbolic batch, or with the real one where the step fixes it."""

    def symbolic() -> Trace:
        with tracing(inline) as memory:
            trace = trace_forward(program, signature, symbolic=True)
        trace.keep_alive.extend(memory.calls)
        return trace

    if signature.batch is not None:
        try:
            return _watched(symbolic, dependencies), True
        except FixedBatch:
            pass
        except SideEffect:
            raise
        except Exception:
            # A closed-over tensor with a batch axis, say. If it is a real mistake, the message about real
            # sizes is the better one.
            dependencies.changes()
    return _watched(lambda: _fixed_trace(program, signature), dependencies), False


def _watched(trace: Callable[[], Trace], dependencies: Dependencies) -> Trace:
    """A trace of a step without side effects, and without numbers that differ from one run to the next."""
    watch = _Unchanged(dependencies)
    with watch:
        first = trace()
    if watch.drawn:
        # Some thread drew a number; if it was the step, a second run comes out otherwise.
        with _Unchanged(dependencies):
            again = trace()
        _check_same(first, again)
        _check_same_constants(first, again)
    return first


def _settle(trace: Trace, dependencies: Dependencies) -> list[int | Tensor]:
    """The slots of a trace's tensors; the trace itself forgets them."""
    number = {id(t): i for i, t in enumerate(dependencies.tensors)}
    trace.tensors = [number.get(id(t), t) for t in trace.tensors]
    return trace.tensors


class SideEffect(StepError):
    """The step changed something in Python."""


_DRAW = (
    "A number from Python's or numpy's random generator, or from the clock, is drawn once when the step is captured. "
    "Draw it with torch (torch.rand) inside the step, or pass it in as a sequence."
)


class _Unchanged:
    """Checks that a capture left the user's objects as they were, and puts back what it changed."""

    def __init__(self, dependencies: Dependencies):
        self.dependencies = dependencies

    def __enter__(self) -> None:
        with _disable_current_modes():
            self.dependencies.watch()
            self.states = self.dependencies.random_states()
            self.seed = torch.initial_seed()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with _disable_current_modes():
            changed = self.dependencies.changes()
            self.drawn = not same_states(self.states, self.dependencies.random_states())
            seeded = self.seed != torch.initial_seed()
        if error is not None:
            return
        if seeded:
            raise SideEffect("the step calls torch.manual_seed, which would happen once. Seed before the call.")
        tensors = [c for c in changed if c.startswith("the tensor ")]
        if tensors:
            raise SideEffect(f"the step changes {', '.join(tensors)} in place. {KEEP}")
        if changed:
            names = ", ".join(dict.fromkeys(changed))
            raise SideEffect(
                f"the step changes a Python value: {names}. A step is captured once and not run again, so the "
                "change would happen once instead of at every step. Keep what changes from step to step in an "
                'sl.State (self.count = sl.State(init=0)), or use backend="reference".'
            )


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
    if not same or any(a is not b and not torch.equal(a, b) for a, b in pairs):
        raise SideEffect(f"two runs of the step did different things. {_DRAW}")
