"""The compiler from end to end: the only module that knows all stages.

    Program, Call --captures--> forward and joint StepGraph --simplify--> --rows--> --partition-->
        Executable (pieces batched over time, compiled loops) --loop_operator--> one operator call
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from . import capture_store, forward_mode
from .capture import Capture, hint, lock
from .choices import chooser, make_ready
from .dependencies import Dependencies
from .invocation import Invocation, hints_of
from .ir.graph import Rows, StepGraph
from .layout import Layout
from .loop_operator import LoopFunction, traced
from .lower import (
    SAVE_LIMIT,
    ForwardPlan,
    Needs,
    Saving,
    choose_saved,
    copied,
    lower_backward,
    lower_forward,
    row_bytes,
)
from .masking import check_rows_apart, masked_call
from .passes.histories import use_whole_histories
from .passes.manager import mixing_reasons
from .program import Call, Program, Result
from .recorder import working
from .replay import REPLAY_FROM, ReplayPlan, lower_replay, with_replay
from .trace import Trace
from .trace_step import keep_with_trace


def run(program: Program, call: Call, *, backend: str = "auto", save: str = "auto") -> Result:
    """Runs a call that nobody else traces. Differentiable; see `Loop` for what the arguments mean."""
    prepare = partial(make_ready, program, backend)
    program, call = batch_guessed(program, call, prepare)
    capture, dependencies = capture_store.find(program, call, prepare)
    if needs_masks(program, call, capture):
        return run_masked(program, call, backend, save)
    tensors = tensors_of(call, capture, dependencies)
    if forward_mode.active():
        forward_mode.refuse_tangents(named_tensors(call, capture, dependencies))
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if training:
        capture, dependencies = capture_store.with_gradient(program, call, capture, dependencies)
        if needs_masks(program, call, capture):
            return run_masked(program, call, backend, save)
        tensors = tensors_of(call, capture, dependencies, joint=True)
    if (recorder := working()) is not None:
        recorder.inner.append(capture.reads)  # the outer step's capture must know when this one no longer holds
    nested = traced(tensors)
    invocation = invocation_of(capture, call, backend, save, training, nested, tensors)
    if nested:
        keep_with_trace(invocation)
    batch = 1 if call.batch is None else call.batch
    if nested:
        results = torch.ops.steploop.inner_loop(tensors, invocation.key, call.steps, batch)
    elif training:
        results = LoopFunction.apply(invocation, call.steps, batch, *tensors)  # type: ignore[no-untyped-call]
    else:
        results = invocation.run(tensors, invocation.schedule(tensors, call.steps, batch), batch, call.held)
    count, states = invocation.forward.outputs, len(call.initial)
    return Result(list(results[:count]), list(results[count : count + states]), capture.out_spec)


def wants_gradients(program: Program, call: Call, backend: str) -> tuple[bool, bool]:
    """(whether anything that a call reads requires a gradient, whether its step draws random numbers)."""
    capture, dependencies = capture_store.find(program, call, partial(make_ready, program, backend))
    training = any(t.requires_grad for t in tensors_of(call, capture, dependencies))
    seeded = torch.Tag.nondeterministic_seeded
    return training, any(seeded in getattr(n.target, "tags", ()) for n in capture.forward.graph.graph.nodes)


def stops(program: Program, call: Call, backend: str, save: str) -> bool:
    """Whether a call without gradients does next to nothing at steps before which all rows have ended."""
    capture, dependencies = capture_store.find(program, call, partial(make_ready, program, backend))
    tensors = tensors_of(call, capture, dependencies)
    policy = policy_of(capture, save, False, 0, tensors)
    invocation = invocation_of(capture, call, backend, policy, False, False, tensors)
    return invocation.forward.executable.stops


def batch_guessed(
    program: Program, call: Call, before_making: Callable[[], None] | None = None
) -> tuple[Program, Call]:
    """A scan does not say where its batch is. If every leaf has the same first axis and rows turn out to be
    independent along it, that axis is the batch, and the outside pieces run on all rows of all steps at once."""
    if program.batched or not call.initial:
        return program, call
    firsts = {hint(t.shape[1]) if t.dim() > 1 else None for t in call.xs}
    firsts |= {hint(t.shape[0]) if t.dim() > 0 else None for t in call.initial}
    if len(firsts) != 1 or not (size := firsts.pop()) or size < 2:
        return program, call
    guess = program.kept.rowwise or _with_batch(program)
    program.kept.rowwise = guess
    guessed = replace(call, batch=call.initial[0].shape[0])
    try:
        capture, _ = capture_store.find(guess, guessed, before_making)
    except Exception:
        return program, call  # the plain way has the better message, or works
    if capture.made.rowwise is None:
        capture.made.rowwise = _is_rowwise(capture)
    return (guess, guessed) if capture.made.rowwise else (program, call)


def _with_batch(program: Program) -> Program:
    def run(*leaves: Any) -> Any:
        results = program.run(*leaves)
        guess.out_spec = program.out_spec
        return results

    guess = replace(program, run=run, batched=True)
    return guess


def _is_rowwise(capture: Capture) -> bool:
    graph = capture.forward.graph
    if graph.batch is None or mixing_reasons(graph):
        return False
    return all(n.meta["rows"] == Rows(0) for n in [*graph.outputs, *graph.nexts])


def is_ragged(call: Call) -> bool:
    return call.lengths is not None or call.mask is not None or call.resets is not None


def needs_masks(program: Program, call: Call, capture: Capture) -> bool:
    """Whether rows that take no part must be masked, as the capture can't run on fewer rows."""
    if capture.forward.graph.batch is not None or not is_ragged(call) or not program.batched:
        return False
    check_rows_apart(program, call, capture)
    return True


def run_masked(program: Program, call: Call, backend: str, save: str) -> Result:
    """A step that fixes the batch can't run on fewer rows: masks become part of the step."""
    changed, changed_call, finish = masked_call(program, call)
    return finish(run(changed, changed_call, backend=backend, save=save))


def tensors_of(call: Call, capture: Capture, dependencies: Dependencies, joint: bool = False) -> list[Tensor]:
    marks = [m for m in (call.lengths, call.mask, call.resets) if m is not None]
    captured = capture.tensors(dependencies, joint)
    return [*call.xs, *call.constants, *call.initial, *(call.reset_to or []), *captured, *marks]


def named_tensors(call: Call, capture: Capture, dependencies: Dependencies) -> list[tuple[str, Tensor]]:
    """What a call reads, by names that the user knows."""
    facts = capture.program
    path = {id(t): p for t, p in zip(dependencies.tensors, dependencies.paths)}
    named = [(f"the sequence {n}", x) for n, x in zip(facts.x_names, call.xs)]
    named += [(f"the constant {n}", c) for n, c in zip(facts.constant_names, call.constants)]
    for values in (call.initial, call.reset_to or []):
        named += [(f"the state {n}", s) for n, s in zip(facts.state_names, values)]
    captured = capture.tensors(dependencies)
    return named + [(f"a tensor that the step reads: {path.get(id(t), 'one it makes')}", t) for t in captured]


def invocation_of(
    capture: Capture, call: Call, backend: str, save: str, training: bool, nested: bool, tensors: list[Tensor]
) -> Invocation:
    batch = 1 if call.batch is None else hint(call.batch)
    rows = hint(call.steps) * max(batch, 1)
    ragged = is_ragged(call)
    policy = policy_of(capture, save, training, rows, tensors, nested)
    key = (
        backend, policy, training, nested, ragged, call.reverse, call.on_masked, call.lengths is not None,
        call.mask is not None, call.resets is not None, _required(tensors) if training else None,
    )  # fmt: skip
    invocations = capture.made.invocations
    found = invocations.get(key)
    if found is None:
        with lock, _alone(), torch.no_grad():
            found = invocations[key] = compiled(capture, call, backend, policy, training, nested, tensors)
    return found


@contextmanager
def _alone() -> Iterator[None]:
    """Without the modes and transforms that are active around a call: they are for the user's code."""
    with _disable_current_modes(), torch._C._DisableFuncTorch(), torch._C.DisableTorchFunction():
        yield


def _required(tensors: Sequence[Tensor]) -> tuple[bool, ...]:
    return tuple(t.requires_grad for t in tensors)


def policy_of(
    capture: Capture, save: str, training: bool, rows: int, tensors: Sequence[Tensor], nested: bool = False
) -> str:
    """"states", "all" or "again", see `_chosen`."""
    if not training or save != "auto":
        return save
    key, known = _required(tensors), capture.made.bytes
    if key not in known:
        needs = _needs_of_capture(capture, tensors)
        assert capture.joint is not None
        with lock:
            found = _chosen(capture.joint.graph, needs, "again")
        known[key] = tuple(sum(map(row_bytes, nodes)) for nodes in (found.nodes, found.again))
    kept, again = (each * rows for each in known[key])
    if not nested and again > REPLAY_FROM and kept <= SAVE_LIMIT:
        return "again"
    return "all" if kept + again <= SAVE_LIMIT else "states"


def _needs_of_capture(capture: Capture, tensors: Sequence[Tensor]) -> Needs:
    assert capture.joint is not None
    joint = capture.joint.graph
    x, c, s, k = len(joint.xs), len(joint.constants), len(joint.prevs), len(joint.captured)
    flags = _required(tensors)
    resets = flags[x + c + s : x + c + 2 * s] if len(flags) >= x + c + 2 * s + k else ()
    at = x + c + s + len(resets)
    return Needs(flags[:x], flags[x : x + c], flags[x + c : x + c + s], resets or (False,) * s, flags[at : at + k])


def compiled(
    capture: Capture, call: Call, backend: str, save: str, training: bool, nested: bool, tensors: list[Tensor]
) -> Invocation:
    trace = capture.joint if training else capture.forward
    assert trace is not None
    layout = layout_of(call, trace)
    graph = trace.graph if training else _batched_form(trace)
    mixing = bool(mixing_reasons(graph)) if graph.batch is not None else False
    one_loop = mixing and (call.lengths is not None or call.mask is not None)
    needs = needs_of(layout, tensors) if training else None
    # What is lowered does not depend on the direction, nor on masks, unless rows mix: calls share it.
    key, made = (backend, save, nested, one_loop, needs), capture.made.lowered
    lowered = made.get(key)
    if lowered is None:
        names = capture.program.state_names
        lowered = made[key] = Lowered(graph, names, backend, save, nested, one_loop, needs)
        if needs is not None and not nested and lowered.forward.executable.building:
            lowered.backward(needs, layout.resets)  # while the forward's kernels are being built
    return Invocation(
        trace, capture.program, layout, call.reverse, call.on_masked, training, nested, mixing, lowered,
        hints=hints_of(trace, capture.signature),
    )  # fmt: skip


def layout_of(call: Call, trace: Trace) -> Layout:
    return Layout(
        len(call.xs), len(call.constants), len(call.initial), len(call.reset_to or ()), len(trace.tensors),
        call.lengths is not None, call.mask is not None, call.resets is not None,
    )  # fmt: skip


def _batched_form(trace: Trace) -> StepGraph:
    """The graph of a forward trace for all steps at once. The trace keeps its own: a stream runs that step by step."""
    if trace.batched is None:
        trace.batched, _ = copied(trace.graph)
        trace.keep_alive.extend(use_whole_histories(trace.batched))
    return trace.batched


class Lowered:
    """The executables of a graph: forward, and backward for every set of gradients that is asked for.

    places: for each value that the backward needs, ("output", i) or ("saved", j) in what the forward gives.
    """

    def __init__(
        self, graph: Any, names: list[str], backend: str, save: str, nested: bool, one_loop: bool,
        needs: Needs | None,
    ):  # fmt: skip
        self.graph, self.names, self.one_loop, self.backend, self.save = graph, names, one_loop, backend, save
        self.choose = chooser(backend)
        self.saving: Saving | None = None
        self.places: list[tuple[str, int]] = []
        extra: list[fx.Node] = []
        if needs is not None:
            self.saving = _chosen(graph, needs, save)
            self.places, extra = _places(graph, self.saving)
        self.forward = self._forward([] if nested else extra)
        self.replay: ReplayPlan | None = None
        if self.saving is not None and self.saving.again:
            self.replay = lower_replay(graph, self.saving, names, self.choose)
        self._again: ForwardPlan | None = None
        self._backwards: dict[Any, Any] = {}

    def _forward(self, saved: list[fx.Node]) -> ForwardPlan:
        return lower_forward(self.graph, saved, self.names, self.choose, self.one_loop)

    def forward_again(self) -> ForwardPlan:
        """A forward that gives all that the backward needs, for calls that kept nothing."""
        if self._again is None:
            assert self.saving is not None
            with lock:
                self._again = self._forward(self.saving.nodes)
        return self._again

    def backward(self, needs: Needs, resets: bool) -> Any:
        key = (needs, resets and any(needs.reset_to))
        if key not in self._backwards:
            assert self.saving is not None
            with lock, torch.no_grad():
                self._backwards[key] = lower_backward(
                    self.graph, self.saving, needs, self.names, self.choose, self.one_loop, key[1]
                )
        return self._backwards[key]


def _chosen(graph: StepGraph, needs: Needs, policy: str) -> Saving:
    """policy: "states", "all", or "again": all but the wide values that can be made again."""
    if policy != "again":
        return choose_saved(graph, needs, policy)
    return with_replay(graph, choose_saved(graph, needs, "all"))


def needs_of(layout: Layout, tensors: Sequence[Tensor]) -> Needs:
    parts = layout.split([t.requires_grad for t in tensors])
    reset_to = tuple(parts["reset_to"]) or (False,) * layout.initial
    xs, constants, initial = (tuple(parts[n]) for n in ("xs", "constants", "initial"))
    return Needs(xs, constants, initial, reset_to, tuple(parts["captured"]))


def _places(graph: Any, saving: Saving) -> tuple[list[tuple[str, int]], list[fx.Node]]:
    """Where each saved value is found afterwards: a value that is an output of the step is not kept twice."""
    places: list[tuple[str, int]] = []
    extra: list[fx.Node] = []
    for node in saving.nodes:
        rows = node.meta["rows"]
        plain = graph.batch is None or (rows is not None and rows.dim == 0 and rows.plain)
        if node in graph.outputs and plain:
            places.append(("output", graph.outputs.index(node)))
        else:
            places.append(("saved", len(extra)))
            extra.append(node)
    return places, extra
