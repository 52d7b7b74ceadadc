"""verify: the reference and the optimised way, forward and backward, on the caller's own data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import dispatch, replay
from .backends import reference
from .closed_over import trainable
from .compare import Difference, compare
from .compiler.program import Call, Program, Result
from .errors import InputError, MismatchError, describe, message
from .loop import Loop
from .scan import prepare_scan
from .step import Step, Unbatched
from .tracebacks import ends_at_the_call
from .tree import with_paths


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
        report.differences = list(_shapes_only(*runs))
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
    dtypes = _dtypes(subject.root, calls[0].call)
    report.differences = list(_differences(runs[0], runs[1], dtypes))
    if not report.ok and _is_discrete(calls[0]):
        buffers.restore()
        report.step_by_step = True
        report.differences = _step_by_step(subject, calls[0], parameters if backward else None)
    return report


def _both_ways(
    subject: _Subject, copies: list[_Copies], calls: list[Any], parameters: Any, buffers: _Buffers
) -> tuple[list[_Run], bool]:
    """The reference's run and the optimised one, and whether random numbers were drawn."""
    runs = []
    random = torch.random.get_rng_state()
    for copy, call, run in zip(copies, calls, (_run_reference, _run_optimised(subject)), strict=True):
        buffers.restore()
        targets = None if parameters is None else [*copy.leaves, *parameters]
        runs.append(_Run.of(call.program, call.call, run, targets))
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


@dataclass
class _Run:
    """What one way of running gave. gradients: by name, None where it is not reached."""

    outputs: list[tuple[str, Tensor]]
    states: list[tuple[str, Tensor]]
    gradients: list[tuple[str, Tensor]]
    buffers: list[tuple[str, Tensor]] = field(default_factory=list)

    @staticmethod
    def of(
        program: Program,
        call: Call,
        run: Callable[[Program, Call], Result],
        targets: list[tuple[str, Tensor]] | None,
    ) -> _Run:
        with torch.set_grad_enabled(targets is not None):
            result = run(program, call)
        structure = result.out_spec if result.out_spec is not None else program.out_spec
        outputs = list(zip(structure.names("outputs"), result.outputs, strict=True))
        states = list(zip(program.state_names, result.states, strict=True))
        gradients = [] if targets is None else _gradients(result, targets)
        return _Run(outputs, states, gradients)


def _gradients(result: Result, targets: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    values = [v for v in (*result.outputs, *result.states) if v.is_floating_point() or v.is_complex()]
    # drawn for every value, reached or not, so that both ways get the same ones
    generator = torch.Generator().manual_seed(0)
    cotangents = [
        torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu").to(value.device, value.dtype)
        for value in values
    ]
    reached = [(v, c) for v, c in zip(values, cotangents, strict=True) if v.requires_grad]
    tensors = [tensor for _, tensor in targets]
    gradients: Any = [None] * len(tensors)
    if reached and tensors:
        gradients = torch.autograd.grad(
            [v for v, _ in reached], tensors, [c for _, c in reached], allow_unused=True
        )
    return [
        (name, torch.zeros_like(tensor) if gradient is None else gradient)
        for (name, tensor), gradient in zip(targets, gradients, strict=True)
    ]


def _dtypes(root: Any, call: Call) -> set[torch.dtype]:
    """Those of what a call computes with."""
    own = [*root.parameters(), *root.buffers()] if isinstance(root, nn.Module) else []
    return {t.dtype for t in (*call.xs, *call.constants, *call.initial, *own)}


def _differences(first: _Run, second: _Run, dtypes: set[torch.dtype]) -> Iterator[Difference]:
    for kind, a, b, axes in _pairs(first, second):
        for (name, x), (_, y) in zip(a, b, strict=True):
            own_axes = ("step", "row") if kind == "gradient" and name.startswith("xs") else axes
            yield compare(name, kind, x, y, own_axes, dtypes)


def _pairs(first: _Run, second: _Run) -> Iterator[tuple[str, Any, Any, tuple[str, ...]]]:
    for kind, a, b, axes in (
        ("output", first.outputs, second.outputs, ("step", "row")),
        ("state", first.states, second.states, ("row",)),
        ("gradient", first.gradients, second.gradients, ()),
        ("buffer", first.buffers, second.buffers, ()),
    ):
        if [name for name, _ in a] != [name for name, _ in b]:
            raise MismatchError(
                message(
                    f"The reference and the optimised way do not give the same {kind}s.",
                    expected=", ".join(name for name, _ in a) or "none",
                    found=", ".join(name for name, _ in b) or "none",
                )
            )
        yield kind, a, b, axes


def _shapes_only(first: _Run, second: _Run) -> Iterator[Difference]:
    for kind, a, b, axes in _pairs(first, second):
        for (name, x), (_, y) in zip(a, b, strict=True):
            same_finite = bool(torch.isfinite(x).all()) == bool(torch.isfinite(y).all())
            if x.shape == y.shape and x.dtype == y.dtype and same_finite:
                yield Difference(name, kind, 0.0, 0.0, axes=axes)
            else:
                yield compare(name, kind, x, y, axes)


# discrete steps


class _DiscreteOps(TorchDispatchMode):
    """Notes whether an operation that turns numbers into decisions runs."""

    NAMES = frozenset(
        "argmax argmin topk sort argsort max min eq ne gt ge lt le round floor ceil trunc sign sgn heaviside "
        "multinomial bernoulli bucketize searchsorted floor_divide remainder fmod kthvalue mode median "
        "isnan nonzero masked_select unique cummax cummin one_hot".split()
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        to_integers = (
            name in ("_to_copy", "copy")
            and isinstance(result, Tensor)
            and not result.is_floating_point()
            and isinstance(args[-1], Tensor)
            and args[-1].is_floating_point()
        )
        self.found = self.found or name in self.NAMES or to_integers
        return result


def _is_discrete(prepared: Any) -> bool:
    call = prepared.call
    if any(not (s.is_floating_point() or s.is_complex()) for s in call.initial):
        return True
    short = dataclasses.replace(call, steps=min(1, call.steps), xs=[x[:1] for x in call.xs])
    short = dataclasses.replace(short, lengths=None, mask=None, resets=None, reset_to=None)
    with torch.no_grad(), _DiscreteOps() as seen:
        outputs = reference.run(prepared.program, short).outputs
    return seen.found or any(not (o.is_floating_point() or o.is_complex()) for o in outputs)


def _step_by_step(
    subject: _Subject, prepared: Any, parameters: list[tuple[str, Tensor]] | None
) -> list[Difference]:
    """Each step alone, both ways, from the state that the reference has reached. The worst per tensor."""
    worst: dict[tuple[str, str], Difference] = {}
    program, call = prepared.program, prepared.call
    states, dtypes = [state.detach() for state in call.initial], _dtypes(subject.root, call)
    for t in reversed(range(call.steps)) if call.reverse else range(call.steps):
        runs = []
        for run in (_run_reference, _run_optimised(subject)):
            one, targets = _one_step(program, call, t, states)
            wanted = None if parameters is None else [*targets, *parameters]
            runs.append(_Run.of(program, one, run, wanted))
        for difference in _differences(runs[0], runs[1], dtypes):
            if difference.kind != "output":
                difference.name += f" after step {t}"
            elif difference.index:
                difference.index = (t, *difference.index[1:])
            key = (difference.kind, difference.name.split(" after")[0])
            if key not in worst or difference.badness > worst[key].badness:
                worst[key] = difference
        states = [state.detach() for _, state in runs[0].states]
    return list(worst.values())


def _one_step(
    program: Program, call: Call, t: int, states: list[Tensor]
) -> tuple[Call, list[tuple[str, Tensor]]]:
    targets: list[tuple[str, Tensor]] = []

    def leaf(tensor: Tensor, name: str) -> Tensor:
        tensor = tensor.detach().clone()
        if tensor.is_floating_point() or tensor.is_complex():
            targets.append((name, tensor.requires_grad_()))
        return tensor

    valid = reference.valid_steps(call)
    one = dataclasses.replace(
        call,
        steps=1,
        xs=[leaf(x[t : t + 1], f"xs ({name})") for x, name in zip(call.xs, program.x_names, strict=True)],
        constants=[leaf(c, name) for c, name in zip(call.constants, program.constant_names, strict=True)],
        initial=[leaf(s, f"state {name}") for s, name in zip(states, program.state_names, strict=True)],
        reset_to=None if call.reset_to is None else [target.detach() for target in call.reset_to],
        lengths=None,
        mask=None if valid is None else valid[t : t + 1],
        resets=None if call.resets is None else call.resets[t : t + 1],
        reverse=False,
    )
    return one, targets


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
