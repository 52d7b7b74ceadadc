"""verify: the reference and the optimised way, forward and backward, on the caller's own data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from . import dispatch, replay
from .backends import reference
from .closed_over import trainable
from .compare import Difference
from .compiler.program import Call, Program, Result
from .errors import InputError, MismatchError, describe, message
from .loop import Loop
from .scan import prepare_scan
from .step import Step, Unbatched
from .tracebacks import ends_at_the_call
from .tree import with_paths
from .verify_runs import Run, differences, dtypes_of, shapes_only
from .verify_steps import is_discrete, step_by_step


@dataclass
class Report:
    """What `verify` compared. `str(report)` is a table; reaching it means that everything agrees.

    backend: what was compared with the reference.  differences: one per tensor, worst first.
    step_by_step: each step was compared from the reference's state, as the step takes discrete decisions.
    notes: what could not be compared, and why.
    """

    backend: str
    differences: list[Difference]
    step_by_step: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> Difference | None:
        """The tensor nearest to (or furthest over) its tolerance."""
        return max(self.differences, key=lambda d: d.badness, default=None)

    @property
    def ok(self) -> bool:
        """Whether all tensors agree."""
        return all(difference.ok for difference in self.differences)

    def __str__(self) -> str:
        head = f"reference and {self.backend} agree" if self.ok else f"reference and {self.backend} DIFFER"
        lines = [head + (", step by step from the reference's states" if self.step_by_step else "")]
        lines += [f"  note: {note}" for note in self.notes]
        width = max((len(f"{d.kind} {d.name}") for d in self.differences), default=0)
        for d in sorted(self.differences, key=lambda d: -d.badness):
            lines.append(
                f"  {f'{d.kind} {d.name}':<{width}}  relative error {d.error:.1e}  allowed {d.tolerance:.0e}"
            )
        return "\n".join(lines)


@ends_at_the_call
def verify(what: Any, *arguments: Any, **options: Any) -> Report:
    """Run the reference and the optimised way on clones of the caller's data, and compare.

        report = sl.verify(loop, xs, lengths=lengths)         # everything a Loop takes
        report = sl.verify(cell, xs)                          # a Step
        report = sl.verify(fn, init, xs, reverse=True)        # a function, as for sl.scan

    Outputs, states and the gradients (of a fixed random cotangent) of sequences, constants, a given state and
    parameters are compared, each relative to its largest entry: float64 to 1e-9, float32 to 1e-5 and 1e-4
    (gradients), and float64 as float32 where a step computes with both. Forward only where nothing requires a
    gradient. A step that takes discrete decisions (argmax, spikes, integer states), where rounding can change
    everything that follows, is compared one step at a time from the reference's states. A step that draws random
    numbers is run with the same ones both ways, given to it as inputs; where that is impossible, only shapes, dtypes
    and finiteness are compared. The report says so.

    Returns a Report. Raises MismatchError with the worst tensor, row, step and both values.
    """
    subject = _subject(what, options)
    with _buffers_restored(subject.root) as buffers:
        report = _compare_runs(subject, arguments, options, buffers)
    if not report.ok:
        raise MismatchError(_mismatch(report))
    return report


@dataclass
class _Subject:
    """What is verified: how to prepare a call of it, and the backend it is compared with."""

    root: Any
    prepare: Callable[..., Any]
    backend: str
    save: str
    arguments: tuple[str, ...]


def _subject(what: Any, options: dict[str, Any]) -> _Subject:
    if isinstance(what, Step):
        what = what.whole_sequence()
    if isinstance(what, Loop):
        backend = "auto" if what.backend == "reference" else what.backend
        return _Subject(what, what.prepare, backend, what.save, ())
    if isinstance(what, nn.Module) or not callable(what):
        raise InputError(
            message(
                "sl.verify takes a Loop, a Step, or a function as for sl.scan.",
                found=describe(what),
                fix="verify the Loops inside it one by one",
            )
        )
    backend = dispatch.checked_backend(options.pop("backend", "auto"))

    def prepare(*arguments: Any, **rest: Any) -> Any:
        return prepare_scan(what, *arguments, **rest)

    return _Subject(what, prepare, "auto" if backend == "reference" else backend, "auto", ("init", "xs"))


def _compare_runs(
    subject: _Subject, arguments: tuple[Any, ...], options: dict[str, Any], buffers: _Buffers
) -> Report:
    parameters = trainable(subject.root)
    copies = [_Copies(subject, arguments, options) for _ in range(2)]
    backward = torch.is_grad_enabled() and (bool(parameters) or copies[0].any_required_grad)
    report = Report(subject.backend, [])
    calls = [copy.prepared for copy in copies]
    runs, drawn = _both_ways(subject, copies, calls, parameters if backward else None, buffers)
    if not backward:
        report.notes.append("forward only: nothing requires a gradient")
    if drawn:
        report.differences = list(shapes_only(*runs))
        alike = _same_draws(*calls) if report.ok else None
        try:
            if alike is not None:
                runs, drawn = _both_ways(subject, copies, alike, parameters if backward else None, buffers)
        except Exception:
            # As it is the step runs both ways; it only can't be given numbers.
            alike = None
        if alike is None or drawn:
            report.notes.append("the step draws random numbers: only shapes, dtypes and finiteness were compared")
            return report
        calls = alike
        report.notes.append("the step draws random numbers: both ways were given the same ones")
    dtypes = dtypes_of(subject.root, calls[0].call)
    report.differences = list(differences(runs[0], runs[1], dtypes))
    if not report.ok and is_discrete(calls[0]):
        buffers.restore()
        report.step_by_step = True
        ways = (_run_reference, _run_optimised(subject))
        report.differences = step_by_step(subject.root, ways, calls[0], parameters if backward else None)
    return report


def _both_ways(
    subject: _Subject, copies: list[_Copies], calls: list[Any], parameters: Any, buffers: _Buffers
) -> tuple[list[Run], bool]:
    """The reference's run and the optimised one, and whether random numbers were drawn."""
    runs = []
    random = torch.random.get_rng_state()
    for copy, call, run in zip(copies, calls, (_run_reference, _run_optimised(subject)), strict=True):
        buffers.restore()
        targets = None if parameters is None else [*copy.leaves, *parameters]
        runs.append(Run.of(call.program, call.call, run, targets))
        runs[-1].buffers = buffers.now()
    return runs, not torch.equal(random, torch.random.get_rng_state())


def _same_draws(first: Any, second: Any) -> list[Any] | None:
    """Both calls with the same random numbers as inputs; None where that is impossible."""
    try:
        found = replay.replayed(first.program, first.call)
        return None if found is None else [found, replay.with_numbers_of(found, second.call)]
    except Exception:
        return None


def _run_reference(program: Program, call: Call) -> Result:
    return reference.run(program, call)


def _run_optimised(subject: _Subject) -> Callable[[Program, Call], Result]:
    def run(program: Program, call: Call) -> Result:
        return dispatch.run(program, call, subject.backend, subject.save)

    return run


class _Copies:
    """One set of clones of the caller's tensors, floating ones as leaves that require a gradient."""

    def __init__(self, subject: _Subject, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.leaves: list[tuple[str, Tensor]] = []
        self.any_required_grad = False
        names = subject.arguments or tuple(f"xs[{i}]" if i else "xs" for i in range(len(arguments)))
        copied = [self._copy(argument, name) for argument, name in zip(arguments, names, strict=False)]
        copied += [self._copy(argument, "argument") for argument in arguments[len(names) :]]
        others = {name: self._copy(value, name) for name, value in options.items()}
        self.prepared = subject.prepare(*copied, **others)

    def _copy(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            return self._leaf(value, name)
        if isinstance(value, Unbatched):
            return Unbatched(self._copy(value.tree, name))
        if isinstance(value, PackedSequence):
            return value._replace(data=self._leaf(value.data, name))
        if name == "state" and isinstance(value, dict):
            return {path: self._copy(state, f"state['{path}']") for path, state in value.items()}
        pairs, spec = with_paths(value)
        copies = [
            self._copy(leaf, name + pytree.keystr(path)) if isinstance(leaf, (Tensor, Unbatched)) else leaf
            for path, leaf in pairs
        ]
        return pytree.tree_unflatten(copies, spec)

    def _leaf(self, tensor: Tensor, name: str) -> Tensor:
        copy = tensor.detach().clone()
        if tensor.is_floating_point() or tensor.is_complex():
            self.any_required_grad = self.any_required_grad or tensor.requires_grad
            copy.requires_grad_()
            self.leaves.append((name, copy))
        return copy


# buffers that a step changes (batch norm) start alike for both ways, and are left as they were


class _Buffers:
    def __init__(self, root: Any) -> None:
        buffers = dict(root.named_buffers()) if isinstance(root, nn.Module) else {}
        self.buffers = buffers
        self.before = {name: buffer.detach().clone() for name, buffer in buffers.items()}

    def restore(self) -> None:
        with torch.no_grad():
            for name, buffer in self.buffers.items():
                if not _same(buffer, self.before[name]):
                    buffer.copy_(self.before[name])

    def now(self) -> list[tuple[str, Tensor]]:
        return [(name, buffer.detach().clone()) for name, buffer in self.buffers.items()]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


@contextmanager
def _buffers_restored(root: Any) -> Iterator[_Buffers]:
    buffers = _Buffers(root)
    try:
        yield buffers
    finally:
        buffers.restore()


def _mismatch(report: Report) -> str:
    worst: Any = report.worst
    others = sum(not d.ok for d in report.differences) - 1
    return message(
        f"The reference and {report.backend} disagree"
        + (", step by step from the reference's states" if report.step_by_step else "")
        + f": {worst.kind} {worst.name}"
        + (f" at {worst.where()}" if worst.where() else "")
        + ".",
        expected=worst.shapes or f"{worst.reference} (reference)",
        found=f"{worst.optimised} ({report.backend}), relative error {worst.error:.2e}, "
        f"allowed {worst.tolerance:.0e}" + (f"; {others} more tensors differ" if others else ""),
        fix='backend="reference" is right but slow; please report this step as a bug\n\n' + str(report),
    )
