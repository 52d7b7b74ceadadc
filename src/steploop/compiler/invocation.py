"""What an operator call does: a captured step over the tensors of a call, forward and backward."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad

from ..errors import UnsupportedError
from . import forward_mode
from .capture import ProgramFacts, symbol_values
from .ir.graph import StepGraph, expression
from .layout import Layout, split_needs
from .lower import BackwardPlan, ForwardPlan, Needs, Saving
from .program import Call
from .replay import Again, AgainBefore, Replay, ReplayPlan, span_steps
from .schedule import Schedule, make_schedule
from .sequence_runner import autograd_in_kernels
from .span import Shifted
from .span_runner import Run
from .trace import Signature, Trace

# By key, as long as something else holds them.
HELD: weakref.WeakValueDictionary[int, Invocation] = weakref.WeakValueDictionary()
_handles = itertools.count(1)


def _by_itself(method: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a method without the modes that the caller has on the stack: `torch.set_default_device` is one of them, and
    would say where the tensors stand that are made here. What modes do to a step is part of its capture."""

    @functools.wraps(method)
    def run(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return method(*args)

    return run


@dataclass(eq=False)
class _Known:
    """The schedule of the last call. marks: copies of its lengths, mask and resets, on the CPU.

    What they hold counts, not which tensors they are: memory shared with numpy changes unseen by torch.
    """

    steps: int
    batch: int
    marks: list[Tensor | None]
    schedule: Schedule

    def fits(self, steps: int, batch: int, marks: list[Tensor | None]) -> bool:
        if (steps, batch) != (self.steps, self.batch):
            return False
        pairs: list[Any] = list(zip(self.marks, marks))
        same = all((a is None) == (b is None) for a, b in pairs)
        return same and all(a is None or torch.equal(a, b) for a, b in pairs)


@dataclass(eq=False)
class Invocation:
    """What an operator call does: a captured step with the options of the call.

    trace: what is run: the joint trace when training, else that of the forward.
    program: what is known of the step.
    lowered: the executables (`pipeline.Lowered`), shared with other calls of the capture.
    key: by which operators name it.
    hints: a size that each symbol of the trace may have.
    """

    trace: Trace
    program: ProgramFacts
    layout: Layout
    reverse: bool
    on_masked: str
    training: bool
    nested: bool
    mixing: bool
    lowered: Any
    key: int | str = 0
    hints: dict[str, int] = field(default_factory=dict)
    _schedule: _Known | None = None

    def __post_init__(self) -> None:
        if not self.key:
            self.key = next(_handles)
            HELD[self.key] = self

    @property
    def forward(self) -> ForwardPlan:
        return self.lowered.forward

    @property
    def stacked(self) -> bool:
        """Whether no batch axis is known."""
        return self.trace.graph.batch is None

    # -- running -------------------------------------------------------------------------------------------

    @_by_itself
    def schedule(self, tensors: Sequence[Tensor], steps: int, batch: int) -> Schedule:
        parts = self.layout.split(tensors)
        batch = 1 if self.stacked else batch
        # They are looked at on the CPU, for which each is moved there once a call.
        marks: list[Any] = [None if (m := parts[name]) is None else m.cpu() for name in ("lengths", "mask", "resets")]
        known = self._schedule  # read once: another thread may put its own there
        if known is not None and known.fits(steps, batch, marks):
            return known.schedule
        device = _device(parts)
        lengths, mask, resets = marks
        schedule = make_schedule(
            steps, batch, device, lengths, mask, resets, reverse=self.reverse, repeat=self.on_masked == "repeat",
            mixes_rows=self.mixing,
        )  # fmt: skip
        self._schedule = _Known(steps, batch, [None if m is None else m.detach().clone() for m in marks], schedule)
        return schedule

    @_by_itself
    def run(
        self, tensors: Sequence[Tensor], schedule: Schedule, batch: int, held: dict[Any, Any] | None = None
    ) -> list[Tensor]:
        """outputs (T, B, ...), final states (B, ...), saved values. held: see `Call`."""
        parts = self.layout.split(tensors)
        stacked = self.stacked
        nodes = self.forward.step.outputs[: self.forward.outputs]
        run = self._forward(parts, schedule, batch, self.forward, nodes, held)
        results: list[Any] = run.wanted
        outputs = [self._outward(v, n, schedule, stacked) for v, n in zip(results, nodes)]
        finals = run.finals if stacked else [schedule.unsort(s) for s in run.finals]
        if self.nested:
            return _apart([*outputs, *finals], tensors)
        saved = results[self.forward.outputs :]
        return _apart([*outputs, *finals, *saved, *map(torch.stack, run.edges)], tensors)

    def _forward(
        self, parts: dict[str, Any], schedule: Schedule, batch: int, plan: ForwardPlan, outward: Sequence[fx.Node] = (),
        held: dict[Any, Any] | None = None,
    ) -> Run:  # fmt: skip
        step = plan.step
        given = self._given(parts, schedule, step)
        initial = dict(zip(step.prevs, self._sorted(parts["initial"], schedule)))
        reset_to = {}
        if schedule.resets is not None:
            reset_to = dict(zip(step.prevs, self._sorted(parts["reset_to"], schedule)))
        longest, edges = None, []
        if plan is self.forward and self.lowered.replay is not None:
            longest, edges = span_steps(schedule.steps), [step.prevs[i] for i in self.lowered.saving.edges]
        return plan.executable.run(
            given, initial, reset_to, schedule, self._sizes(parts, batch), longest, outward, held, edges
        )

    def _sorted(self, values: list[Tensor], schedule: Schedule) -> list[Tensor]:
        return values if self.stacked else [schedule.sort(v) for v in values]

    def _given(self, parts: dict[str, Any], schedule: Schedule, step: Any) -> dict[fx.Node, Any]:
        stacked = step.batch is None
        xs: Iterable[Any]
        if stacked:
            xs = [x.flip(0) if self.reverse else x for x in parts["xs"]]
        else:
            xs = map(schedule.given, parts["xs"])
        batched = self.program.constant_batched
        constants = [
            c if stacked or not b else schedule.sort(c) for c, b in zip(parts["constants"], batched)
        ]
        given = dict(zip(step.xs, xs))
        given.update(zip(step.constants, constants))
        given.update(zip(step.captured, parts["captured"]))
        return given

    def _sizes(self, parts: dict[str, Any], batch: int) -> dict[str, int]:
        return symbol_values(self.trace, Call(parts["xs"], parts["constants"], parts["initial"], 0, batch))

    def _outward(self, value: Tensor, node: fx.Node, schedule: Schedule, stacked: bool) -> Tensor:
        if stacked:
            return value.flip(0) if self.reverse else value
        rows = node.meta["rows"]
        if rows is not None and rows.dim != 0:
            return value
        return schedule.unpack(value)

    # -- as an operator --------------------------------------------------------------------------------------

    def run_operator(self, tensors: Sequence[Tensor], steps: int, batch: int) -> list[Tensor]:
        if forward_mode.active() and not torch.is_inference_mode_enabled():
            with autograd_in_kernels(), forward_ad._set_fwd_grad_enabled(True):  # else a tensor hides its tangent
                forward_mode.refuse_tangents((f"tensor {i} of the operator", t) for i, t in enumerate(tensors))
        return self.run(tensors, self.schedule(tensors, steps, batch), batch)

    def run_backward(
        self, cotangents: Sequence[Tensor], tensors: Sequence[Tensor], results: Sequence[Tensor], steps: int,
        batch: int, needs: Sequence[bool],
    ) -> list[Tensor]:  # fmt: skip
        schedule = self.schedule(tensors, steps, batch)
        return self.gradient(cotangents, tensors, results, schedule, batch, split_needs(self.layout, needs))

    def fake_results(self, tensors: Sequence[Tensor], steps: Any, batch: Any) -> list[Tensor]:
        """Empty results of the right shapes, for tracers. Nothing is compiled for it."""
        graph, parts = self.trace.graph, self.layout.split(tensors)
        sizes, like, made = self._sizes(parts, batch), next(iter(tensors)), []
        for node in graph.outputs:
            value = node.meta["val"]
            shape = [_concrete(expression(s), sizes) for s in value.shape]
            full = [steps, *shape] if self.stacked else [steps, batch, *shape[1:]]
            made.append(like.new_empty(full, dtype=value.dtype, device=value.device))
        return made + [torch.empty_like(s, memory_format=torch.contiguous_format) for s in parts["initial"]]

    def require_gradient(self, needs: Needs) -> None:
        """UnsupportedError unless it can give the gradients that are asked for."""
        if not self.training:
            raise UnsupportedError("this loop was run for values only and has no gradient")

    # -- gradient ------------------------------------------------------------------------------------------

    @_by_itself
    def gradient(
        self, cotangents: Sequence[Tensor], tensors: Sequence[Tensor], results: Sequence[Tensor],
        schedule: Schedule, batch: int, needs: Needs,
    ) -> list[Tensor]:  # fmt: skip
        """One gradient per tensor that `needs` marks, in the order of the operator's inputs. results: see `kept`."""
        parts = self.layout.split(tensors)
        plan: BackwardPlan = self.lowered.backward(needs, parts["resets"] is not None)
        stacked = plan.step.batch is None
        saved = self._saved(parts, results, schedule, batch)
        given = self._given(parts, schedule, plan.step)
        following: dict[fx.Node, Any] = dict(zip(plan.saving.nodes, saved))
        longest = None
        if self.lowered.replay is not None:
            edges = results[len(self.lowered.places) :]
            replay = self._replay(parts, plan.saving, following, edges, plan, schedule, self._sizes(parts, batch))
            following.update((n, Again(replay, i)) for i, n in enumerate(plan.saving.again))
            longest = span_steps(schedule.steps)
        given.update(zip(plan.known, following.values()))
        self._add_prevs(given, parts, plan.saving, plan.step, following, schedule)
        outputs = len(plan.step.ct_outputs)
        for node, ct in zip(plan.step.ct_outputs, cotangents[:outputs]):
            if stacked:
                given[node] = ct.flip(0) if self.reverse else ct
            else:  # the transpose of unpacking is packing, where no value is repeated
                given[node] = schedule.given(ct) if schedule.repeat is None else schedule.pack_cotangent(ct)
        finals = self._sorted(list(cotangents[outputs:]), schedule)
        initial = {plan.step.ct_nexts[i]: finals[i] for i in plan.states}
        zeros = {n: torch.zeros_like(v) for n, v in initial.items()} if schedule.resets is not None else {}
        run = plan.executable.run(given, initial, zeros, schedule, self._sizes(parts, batch), longest)
        return self._collect(run, plan, parts, schedule, needs, stacked)

    def _saved(self, parts: dict[str, Any], results: Sequence[Tensor], schedule: Schedule, batch: int) -> list[Any]:
        if self.nested:
            run = self._forward(parts, schedule, batch, self.lowered.forward_again())
            return run.wanted[self.forward.outputs :]
        stacked, found = self.stacked, []
        for (kind, _), value in zip(self.lowered.places, results):  # and after those, edges
            if kind == "output":
                value = (value.flip(0) if self.reverse else value) if stacked else schedule.pack(value)
            found.append(value)
        return found

    def kept(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Those of a call's results that its backward reads: the others the caller may change or let go."""
        if self.nested:
            return []
        after = self.forward.outputs + self.layout.initial
        extra = sum(kind == "saved" for kind, _ in self.lowered.places)
        found = [results[i if kind == "output" else after + i] for kind, i in self.lowered.places]
        return [*found, *results[after + extra :]]

    def _replay(
        self, parts: dict[str, Any], saving: Saving, following: dict[fx.Node, Any], edges: Sequence[Tensor],
        backward: BackwardPlan, schedule: Schedule, sizes: dict[str, int],
    ) -> Replay:  # fmt: skip
        """What makes wide values again, span by span of the backward."""
        plan: ReplayPlan = self.lowered.replay
        given = self._given(parts, schedule, plan.step)
        self._add_prevs(given, parts, saving, plan.step, following, schedule)
        given.update(zip(plan.known, following.values()))
        reset_to = {}
        if schedule.resets is not None:
            reset_to = {prev: schedule.sort(parts["reset_to"][i]) for prev, i in zip(plan.edges, saving.edges)}
        for prev in plan.edges:
            del given[prev]
        runner = plan.executable.replayer(given, reset_to, schedule, sizes)
        spans = backward.executable.spans(schedule, span_steps(schedule.steps))
        return Replay(plan, runner, list(edges), sorted(spans, key=lambda span: span.start))

    def _add_prevs(
        self, given: dict[fx.Node, Any], parts: dict[str, Any], saving: Saving, step: StepGraph,
        following: dict[fx.Node, Any], schedule: Schedule,
    ) -> None:  # fmt: skip
        """The states before every step, from those after it."""
        stacked = step.batch is None
        joint = self.trace.graph
        for i, edge in enumerate(parts["initial"]):
            edge = edge.unsqueeze(0) if stacked else schedule.sort(edge)
            reset_to = None
            if schedule.resets is not None:
                reset_to = schedule.sort(parts["reset_to"][i])
            after = following.get(joint.nexts[i]) if i in saving.prevs else None
            if isinstance(after, Again):
                given[step.prevs[i]] = AgainBefore(after.replay, after.index, saving.edges.index(i), reset_to)
            else:
                given[step.prevs[i]] = Shifted(after, edge, reset_to)

    def _collect(
        self, run: Run, plan: BackwardPlan, parts: dict[str, Any], schedule: Schedule, needs: Needs, stacked: bool
    ) -> list[Tensor]:
        def shaped(value: Tensor | None, like: Tensor) -> Tensor:
            return torch.zeros_like(like) if value is None else value

        value: Any
        xs: dict[int, Any] = {}
        for i, value in zip(plan.xs, run.wanted):
            if stacked:
                xs[i] = value.flip(0) if self.reverse else value
            else:
                xs[i] = schedule.unpack_cotangent(value)
        constants: dict[int, Any] = {}
        for i, value in zip(plan.constants, run.summed):
            batched = self.program.constant_batched[i] and not stacked
            constants[i] = schedule.unsort(value) if batched and value is not None else value
        captured: dict[int, Any] = dict(zip(plan.captured, run.summed[len(plan.constants) :]))
        wanted = [i for i in plan.states if needs.initial[i]]
        initial = {i: v if stacked else schedule.unsort(v) for i, v in zip(wanted, run.finals)}
        resets = self._reset_gradients(run, plan, schedule)
        found = []
        for name, values in (("xs", xs), ("constants", constants), ("initial", initial),
                             ("reset_to", resets), ("captured", captured)):  # fmt: skip
            for i, (needed, tensor) in enumerate(zip(getattr(needs, name), parts[name])):
                if needed:
                    found.append(shaped(values.get(i), tensor).reshape(tensor.shape))
        return _apart(found, [])

    def _reset_gradients(self, run: Run, plan: BackwardPlan, schedule: Schedule) -> dict[int, Tensor]:
        found = {}
        value: Any
        marks: Any = schedule.marks
        for i, value in zip(plan.resets, run.wanted[len(plan.xs) :]):
            if schedule.resets is None:
                continue
            total = value.new_zeros(schedule.batch, *value.shape[1:])
            marked = marks.nonzero()[:, 0].to(schedule.device)
            total.index_add_(0, schedule.row[marked], value[marked])
            found[i] = schedule.unsort(total)
        return found


def _device(parts: dict[str, Any]) -> torch.device:
    given = (*parts["xs"], *parts["initial"], *parts["constants"], *parts["captured"])
    return next((t.device for t in given), torch.device("cpu"))


def _concrete(expr: Any, sizes: dict[str, Any]) -> Any:
    """A size with the symbols of a capture replaced by the sizes (maybe symbolic) of a call."""
    if isinstance(expr, int) or expr.is_number:
        return int(expr)
    if expr.is_Symbol:
        return sizes[str(expr)]
    import sympy

    function = sympy.lambdify(sorted(expr.free_symbols, key=str), expr, "math")
    return function(*(sizes[str(s)] for s in sorted(expr.free_symbols, key=str)))


def hints_of(trace: Trace, signature: Signature) -> dict[str, int]:
    """A size for each symbol of a trace: that which it was captured with."""
    leaves = {"x": signature.xs, "constant": signature.constants, "state": signature.states}
    return {
        name: signature.batch_hint if kind == "batch" else leaves[kind][index].shape[dim]
        for name, kind, index, dim in trace.symbols
    }


def _apart(values: list[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """An operator's results share no memory with its inputs or each other."""
    seen = {_memory(t) for t in inputs}
    found = []
    for value in values:
        memory = _memory(value)
        if memory in seen and memory != 0:
            value = value.clone(memory_format=torch.contiguous_format)
            memory = _memory(value)
        elif 0 in value.stride() and any(s == 0 and n > 1 for s, n in zip(value.stride(), value.shape)):
            value = value.contiguous()
            memory = _memory(value)
        seen.add(memory)
        found.append(value)
    return found


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0
