"""Operations that remember as single calls of a step graph, and how one runs for a whole sequence at once.

While a step is traced, a remembering operation (`memory.Memory`) is one opaque call that takes its inputs and
states and gives its outputs and new states; its gradient is one call as well. If such a call turns out to be
alone in its component, nothing that it reads depends on it: then its component is not looped over but handed
to the operation's sequence form. Otherwise the step is captured again with the operation's one-step form
inlined.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .ir.graph import Rows
from .ops.rules import CONTRACTED, Mixed
from .ops.table import add

_CALLS: weakref.WeakValueDictionary[int, MemoryCall] = weakref.WeakValueDictionary()
_handles = itertools.count(1)
# The operations to be inlined in the running trace, and the calls made so far; None outside a trace.
_tracing: ContextVar[Trace | None] = ContextVar("steploop_memory_trace", default=None)


@dataclass(eq=False)
class Trace:
    """Remembering operations in one trace.

    inline: operations (by id) whose one-step form is traced instead; inlined: the classes of those that were.
    """

    inline: set[int]
    calls: list[MemoryCall] = field(default_factory=list)
    inlined: list[str] = field(default_factory=list)


@contextmanager
def tracing(inline: set[int]) -> Iterator[Trace]:
    """Makes remembering operations opaque, but for those (by id) that are to be inlined."""
    trace = Trace(inline)
    token = _tracing.set(trace)
    try:
        yield trace
    finally:
        _tracing.reset(token)


# Whether every remembering operation is traced by its one-step form: a program that leaves this process can't take a
# call with it whose whole-sequence form is Python.
_step_by_step: ContextVar[bool] = ContextVar("steploop_memory_step_by_step", default=False)


@contextmanager
def step_by_step() -> Iterator[None]:
    """Inlines all remembering operations in the traces that are made meanwhile."""
    token = _step_by_step.set(True)
    try:
        yield
    finally:
        _step_by_step.reset(token)


def all_step_by_step() -> bool:
    return _step_by_step.get()


@dataclass(eq=False)
class MemoryCall:
    """One call of a remembering operation inside a step.

    run: (xs, constants, prevs) -> (outputs, nexts), the one-step form on flat lists.
    sequence: (xs, constants, states, reset_to, lengths, resets, T) -> (outputs, states), the sequence form on flat
        lists, (T, B, ...) each.
    xs, constants, states: how many tensors of each kind; then come the operation's parameters.
    frames: the form that `history_products` puts in the place of `sequence` where it can, for operations that
        have one: its first output is the frames of all steps, once for each row, (B, ...).
    whole: whether the first output is that.
    """

    op: Any
    run: Callable[..., tuple[list[Tensor], list[Tensor]]]
    sequence: Callable[..., tuple[list[Tensor], list[Tensor]]]
    xs: int
    constants: int
    states: int
    outputs: int = 0
    handle: int = 0
    frames: Callable[..., tuple[list[Tensor], list[Tensor]]] | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        self.handle = next(_handles)
        _CALLS[self.handle] = self

    def split(self, tensors: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        a, b = self.xs, self.xs + self.constants
        c = b + self.states
        return list(tensors[:a]), list(tensors[a:b]), list(tensors[b:c]), list(tensors[c:])

    def with_frames(self) -> MemoryCall:
        """The same call with the frames of all steps as its first output, and one output more."""
        assert self.frames is not None
        counts = (self.xs, self.constants, self.states, self.outputs + 1)
        return MemoryCall(self.op, self.run, self.frames, *counts, whole=True)


def call_memory(
    op: Any, run: Callable[..., Any], sequence: Callable[..., Any], frames: Callable[..., Any] | None,
    xs: list[Tensor], constants: list[Tensor], prevs: list[Tensor],
) -> tuple[list[Tensor], list[Tensor]] | None:
    """The outputs and new states of one opaque call; None where the one-step form is to be run instead."""
    trace = _tracing.get()
    if trace is None or id(op) in trace.inline or all_step_by_step():
        if trace is not None:
            trace.inlined.append(type(op).__name__)
        return None
    call = MemoryCall(op, run, sequence, len(xs), len(constants), len(prevs), frames=frames)
    trace.calls.append(call)
    parameters = [p for p in op.parameters() if p.requires_grad]
    with torch.no_grad():
        outputs, _ = run([x.detach() for x in xs], constants, [p.detach() for p in prevs])
    call.outputs = len(outputs)
    results = torch.ops.steploop.memory([*xs, *constants, *prevs, *parameters], call.handle)
    return list(results[: call.outputs]), list(results[call.outputs :])


def calls_in(graph: fx.Graph) -> list[MemoryCall]:
    """The calls that a graph refers to, so that their owners can keep them alive."""
    return [_CALLS[n.args[1]] for n in graph.nodes if n.target is torch.ops.steploop.memory.default]


def call_of(node: fx.Node) -> MemoryCall:
    """The call that a node of a step graph is, forward or backward."""
    return _CALLS[node.args[2 if node.target is torch.ops.steploop.memory_backward.default else 1]]


def is_whole(node: fx.Node) -> bool:
    """Whether a value is given once for each row and all steps together, although it depends on sequences."""
    if node.target is not operator.getitem or node.args[1] != 0:
        return False
    source = node.args[0]
    return source.target is torch.ops.steploop.memory.default and call_of(source).whole


def is_memory(node: fx.Node) -> bool:
    return node.target in (torch.ops.steploop.memory.default, torch.ops.steploop.memory_backward.default)


def operation_name(node: fx.Node) -> str:
    """The class of the operation that a memory call runs."""
    backward = node.target is torch.ops.steploop.memory_backward.default
    name = type(call_of(node).op).__name__
    return f"{name}_backward" if backward else name


def own_prevs(node: fx.Node) -> set[fx.Node]:
    """The states among the inputs of an operation's call: its sequence form needs only their first values."""
    if not is_memory(node):
        return set()
    backward = node.target is torch.ops.steploop.memory_backward.default
    return set(call_of(node).split(node.args[1 if backward else 0])[2])


def must_inline(graph: fx.Graph, loops: Sequence[Sequence[fx.Node]]) -> set[int]:
    """Operations (by id) that share a component with anything else, or whose constants differ from step to step."""
    found: set[int] = set()
    for node in graph.nodes:
        if node.target is torch.ops.steploop.memory.default:
            call = _CALLS[node.args[1]]
            if any(c.meta["varies"] for c in call.split(node.args[0])[1]):
                found.add(id(call.op))
    for component in loops:
        calls = [n for n in component if n.op == "call_function" and n.target is not operator.getitem]
        memories = [n for n in calls if n.target is torch.ops.steploop.memory.default]
        for node in memories:
            if len(calls) > 1 or not _unread(node, set(component)):
                found.add(id(_CALLS[node.args[1]].op))
    return found


def _unread(node: fx.Node, component: set[fx.Node]) -> bool:
    """Whether nobody but the call itself reads its states: the sequence form gives only their last values."""
    call = _CALLS[node.args[1]]
    prevs = call.split(node.args[0])[2]
    if any(u is not node for p in prevs for u in p.users if u.op == "call_function"):
        return False
    nexts = [u for u in node.users if u.target is operator.getitem and u.args[1] >= call.outputs]
    return not any(u.op == "call_function" for n in nexts for u in n.users)


# -- the operators -------------------------------------------------------------------------------------------

_library = torch.library.Library("steploop", "FRAGMENT")
_library.define("memory(Tensor[] tensors, int handle) -> Tensor[]")
_library.define("memory_backward(Tensor[] cotangents, Tensor[] tensors, int handle, bool[] needs) -> Tensor[]")


def _run_step(tensors: list[Tensor], handle: int) -> list[Tensor]:
    call = _CALLS[handle]
    xs, constants, prevs, _ = call.split(tensors)
    outputs, nexts = call.run(xs, constants, prevs)
    return [t.clone() for t in (*outputs, *nexts)]


def _run_backward(cotangents: list[Tensor], tensors: list[Tensor], handle: int, needs: list[bool]) -> list[Tensor]:
    raise AssertionError("a remembering operation was left opaque where it had to run step by step")


def _fake_backward(cotangents: list[Tensor], tensors: list[Tensor], handle: int, needs: list[bool]) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, n in zip(tensors, needs) if n]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, handle = inputs
    ctx.handle, ctx.needs = handle, [t.requires_grad for t in tensors]
    ctx.shapes = [(o.shape, o.dtype, o.device) for o in output]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    cotangents = [
        torch.zeros(shape, dtype=dtype, device=device) if g is None else g
        for g, (shape, dtype, device) in zip(gradients, ctx.shapes)
    ]
    found = iter(torch.ops.steploop.memory_backward(cotangents, list(ctx.saved_tensors), ctx.handle, ctx.needs))
    return [next(found) if n else None for n in ctx.needs], None


_library.impl("memory", _run_step, "CompositeExplicitAutograd")
_library.impl("memory_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("steploop::memory", _run_step, lib=_library)
torch.library.register_fake("steploop::memory_backward", _fake_backward, lib=_library)
torch.library.register_autograd("steploop::memory", _backward, setup_context=_setup, lib=_library)


def rows_rule(node: fx.Node, batch: Any) -> tuple[Any, ...]:
    """Rows stay apart in a remembering operation; axis 0 is the batch of everything that has one."""
    backward = node.target is torch.ops.steploop.memory_backward.default
    tensors = node.args[1] if backward else node.args[0]
    call = call_of(node)
    xs, constants, prevs, parameters = call.split(tensors)
    if any(n.meta["rows"] != Rows(0) for n in (*xs, *prevs)):
        raise Mixed("a remembering operation whose input has no batch axis in front")
    if not backward:
        return (Rows(0),) * len(node.meta["val"])
    kinds = [Rows(0)] * len(xs) + [n.meta["rows"] or CONTRACTED for n in constants]
    kinds += [Rows(0)] * len(prevs) + [CONTRACTED] * len(parameters)
    return tuple(kind for kind, needed in zip(kinds, node.args[3]) if needed)


add("memory memory_backward", rows=rows_rule)
