"""The shapes of States that only a first step can tell, and room for those that grow.

`sl.State(...)` takes its shape from what the step gives it (`State.sized`). Before such a loop's first call,
one step is run on fake tensors, from which only shapes are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .arguments import Arguments
from .compiler.program import Program
from .errors import StateError, message
from .frame import Frame, run_in
from .initial import dtype_and_device, own_values
from .state import State
from .step import Step, Survey, survey
from .tree import unflatten

_KEPT_SIZES = 64  # per Step, and of each for so many sizes of axes

Sizes = dict[State, tuple[tuple[Any, ...], torch.dtype]]  # shape of one row's value, without a history's room


@dataclass
class Sizing:
    """A first step that is running to learn the shapes of States.

    room: length of the histories meanwhile.  dtype: of States that nothing else says.  found: by State.
    """

    batch: Any
    room: int
    dtype: torch.dtype
    device: torch.device
    found: Sizes = field(default_factory=dict)

    def size(self, state: State, shape: tuple[Any, ...], dtype: torch.dtype | None) -> Tensor:
        """The State's own initial value, now that its shape is known."""
        self.found[state] = (tuple(shape), dtype or self.dtype)
        return start(state, self.found, self.batch, self.room, self.device)

    def add(self, frame: Frame, state: State, name: str) -> None:
        """A State that its Step made only now (Masked does, for what its child returns)."""
        frame.names[state] = name
        frame.prev[state] = None


def start(state: State, sizes: Sizes, batch: Any, room: Any, device: torch.device) -> Tensor:
    """The initial value of a State(...) whose size was found. A State no step came by is (B, 0)."""
    shape, dtype = sizes.get(state, ((0,), state.dtype or torch.get_default_dtype()))
    if state.grows_with is not None and state in sizes:
        shape = (room, *shape)
    if state not in sizes:
        return torch.zeros(batch, 0, dtype=dtype, device=device)
    return cast(Tensor, state.start(batch, dtype, device, shape))


Place = tuple[str, int, int]  # "x" or "constant", which one, which axis of what one step sees


@dataclass(frozen=True)
class General:
    """Sizes as expressions of the sizes of some axes, found by a step in which those were symbols.

    symbols: by axis.  fixed: the other axes, as they were.  guards: what the step's own decisions asked of the symbols.
    """

    sizes: Sizes
    symbols: dict[Place, Any]
    fixed: dict[Place, int]
    guards: list[Any]

    def at(self, axes: dict[Place, int]) -> Sizes | None:
        """The sizes where the axes are these; None where they may be others."""
        values = {symbol: axes[place] for place, symbol in self.symbols.items()}
        if any(axes[place] != size for place, size in self.fixed.items()) or min(values.values()) < 2:
            return None  # (torch takes other ways for sizes of 0 and 1)
        if any(guard.xreplace(values) != True for guard in self.guards):  # noqa: E712  (sympy's)
            return None
        return {s: (tuple(_number(n, values) for n in shape), dtype) for s, (shape, dtype) in self.sizes.items()}


def _number(size: Any, values: dict[Any, int]) -> int:
    return size if isinstance(size, int) else int(size.xreplace(values))


def axes_of(arguments: Arguments) -> dict[Place, int]:
    """The size of every axis that one step sees, but for the batch."""
    places: dict[Place, int] = {}
    for i, x in enumerate(arguments.xs):
        places.update((("x", i, dim - 1), int(x.shape[dim])) for dim in range(2, x.dim()))
    for i, (c, batched) in enumerate(zip(arguments.constants, arguments.constant_batched, strict=True)):
        places.update((("constant", i, dim), int(c.shape[dim])) for dim in range(int(batched), c.dim()))
    return places


def find_sizes(
    step: Step,
    tree: Survey,
    arguments: Arguments,
    before: Sequence[Tensor | None],
    batch: Any,
    dtype: torch.dtype,
    device: torch.device,
    free: frozenset[Place] = frozenset(),
) -> tuple[Sizes, General | None]:
    """One step on fake slices of the sequences (T, B, ...).

    before: States' values as far as they are known.  free: axes that are symbols in it; then General says what
    the sizes are for other sizes of these.
    """
    from torch._dispatch.python import enable_python_dispatcher  # slow to import
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from .compiler.ir.graph import expression

    sizing = Sizing(batch, 2, dtype, device)
    xs, constants = arguments.xs, arguments.constants

    def run(convert: Any) -> None:
        slices = [convert(x, ("x", i)) for i, x in enumerate(xs)]
        slices = [x.new_zeros(x.shape[1:]) for x in slices]
        fixed = [convert(c, ("constant", i)) for i, c in enumerate(constants)]
        values = [None if v is None else convert(v, None) for v in before]
        states, known = tree.states, dict(zip(tree.states, values, strict=True))
        frame = Frame(dict(zip(states, tree.names, strict=True)), known, "step")
        frame.batch = batch
        frame.sizing = sizing
        sizing.found.clear()
        with torch.no_grad(), run_in(frame):
            step(*unflatten(slices, arguments.x_structure), **unflatten(fixed, arguments.constant_structure))

    tensors = [*xs, *constants, *(v for v in before if v is not None)]
    if _get_current_dispatch_mode_stack() or any(isinstance(t, FakeTensor) for t in tensors):
        from .compiler.foreign import hidden

        with hidden():
            run(lambda t, _: t)  # a tracer is at work: what it sees of this is dead code
        return sizing.found, None
    try:
        env = ShapeEnv(duck_shape=False) if free else None
        symbols: dict[Place, Any]
        mode, symbols = FakeTensorMode(allow_non_fake_inputs=True, shape_env=env), {}
        with mode, enable_python_dispatcher() if free else nullcontext():  # torch's kernels would fix symbols
            run(lambda t, place: _fake(mode, t, place, free, symbols))
    except Exception:  # Python that looks at values; the plain loop may still run it
        if free:
            return find_sizes(step, tree, arguments, before, batch, dtype, device)
        _run_really(step, run, device)
        return sizing.found, None
    if not symbols:
        return sizing.found, None
    axes = axes_of(arguments)
    fixed = {place: size for place, size in axes.items() if place not in symbols}
    sizes = {state: (tuple(map(expression, shape)), kind) for state, (shape, kind) in sizing.found.items()}
    general = General(sizes, symbols, fixed, [guard.expr for guard in cast(ShapeEnv, env).guards])
    return cast(Sizes, general.at(axes)), general


def _fake(mode: Any, tensor: Tensor, place: Any, free: frozenset[Place], symbols: dict[Place, Any]) -> Tensor:
    """`tensor` as the tracer's, those of its axes that are free as symbols."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    first = -1 if place is not None and place[0] == "x" else 0  # a sequence has T in front
    places = [(*(place or ("state", 0)), first + dim) for dim in range(tensor.dim())]
    opened = [p in free and size > 1 for p, size in zip(places, tensor.shape, strict=True)]
    if not any(opened):
        return mode.from_tensor(tensor, static_shapes=True)
    kinds = [DimDynamic.DYNAMIC if is_open else DimDynamic.STATIC for is_open in opened]
    fake = mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))
    found = zip(places, fake.shape, opened, strict=True)
    symbols.update((p, size.node.expr) for p, size, is_open in found if is_open)
    return fake


def _run_really(step: Step, run: Any, device: torch.device) -> None:
    """On zeros, leaving no trace in random numbers and buffers."""
    kept = [(buffer, buffer.detach().clone()) for buffer in step.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            run(lambda t, _: t.detach().clone())
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                if buffer.shape == value.shape:
                    buffer.copy_(value)


def used(states: Sequence[State], values: Sequence[Tensor | None]) -> int:
    """The most entries of any row of any history among `values`; 0 without a history."""
    counters = {state.grows_with for state in states if state.grows_with is not None}
    counts = [v for s, v in zip(states, values, strict=True) if s in counters and v is not None and v.numel()]
    return max((int(count.max()) for count in counts), default=0)


def with_room(states: Sequence[State], values: Sequence[Tensor], room: Any) -> list[Tensor]:
    """The same values, their histories (B, n, ...) padded to at least `room` entries."""
    return [
        _padded(value, room)
        if state.grows_with is not None and value is not None and value.dim() > 1
        else value
        for state, value in zip(states, values, strict=True)
    ]


def room_of(states: Sequence[State], values: Sequence[Tensor | None]) -> int:
    """The longest history among `values`."""
    lengths = [
        value.shape[1]
        for state, value in zip(states, values, strict=True)
        if state.grows_with is not None and value is not None and value.dim() > 1
    ]
    return max(lengths, default=0)


def _padded(value: Tensor, room: Any) -> Tensor:
    missing = room - value.shape[1]
    if missing <= 0:
        return value
    return F.pad(value, (0, 0) * (value.dim() - 2) + (0, missing))


def not_sized(tree: Survey) -> StateError:
    """For a Stream whose state is asked for before its first step."""
    names = [name for name, state in zip(tree.names, tree.states, strict=True) if state.unsized]
    return StateError(
        message(
            f"The first step tells the shape of State '{names[0]}', and none has run.",
            expected="a stream that has done a step, or one made with state=",
            fix="y = stream(x), then stream.state",
        )
    )


@dataclass(eq=False)
class Begun:
    """A call's States before the first step: their Survey, own initial values, and `state=` with room."""

    tree: Survey
    own: list[Tensor | None]
    given: Any


def begin(
    program: Program,
    tree: Survey,
    arguments: Arguments,
    named: dict[str, Any],
    batch: Any,
    given: Any,
    steps: Any,
    room: int = 0,
) -> Begun:
    """The States' own values, those of State(...) among them, with room in histories for `steps` more.

    given: the caller's `state=`, or None.  room: entries that histories have at the least.
    """
    own = own_values(tree, batch, arguments.xs, arguments.constants, named)
    if not tree.unsized:
        return Begun(tree, tree.with_copies(own), given)
    step = program.root
    dtype, device = dtype_and_device(tree, arguments.xs, arguments.constants)
    values = _given_values(tree, given)
    known = [mine if mine is not None else value for mine, value in zip(own, values, strict=True)]
    sizes = _sizes(program, tree, arguments, known, batch, dtype, device)
    found = survey(step)
    if found.names != tree.names:  # a Step made States for what its child returned
        tree = found
        own = own_values(tree, batch, arguments.xs, arguments.constants, named)
        values = _given_values(tree, given)
    sizes = {**sizes, **_of_no_step(tree.states, values, sizes)}
    if any(state.grows_with is not None for state in tree.states):
        before = room_of(tree.states, values)
        room = _larger(_larger(_used(tree.states, values, before) + steps, before), room)
        if isinstance(given, Mapping):
            met = [None if s.unsized and _is_unmet(v) else v for s, v in zip(tree.states, values, strict=True)]
            padded = with_room(tree.states, cast("list[Tensor]", met), room)
            given = {**given, **{n: v for n, v in zip(tree.names, padded, strict=True) if v is not None}}
    for i, state in enumerate(tree.states):
        if state.unsized and own[i] is None:
            own[i] = start(state, sizes, batch, room, device)
            if isinstance(given, Mapping) and _is_unmet(values[i]):
                given = {**given, tree.names[i]: own[i]}
    return Begun(tree, tree.with_copies(own), given)


def _of_no_step(states: Sequence[State], values: Sequence[Tensor | None], sizes: Sizes) -> Sizes:
    """The sizes of given States that no step of this call meets: they stay as they are. One that no step has met yet is
    (B, 0) and has none."""
    found: Sizes = {}
    for state, value in zip(states, values, strict=True):
        if state.unsized and state not in sizes and value is not None and not _is_unmet(value):
            found[state] = (tuple(value.shape[1:] if state.grows_with is None else value.shape[2:]), value.dtype)
    return found


def _is_unmet(value: Tensor | None) -> bool:
    """Whether a given State is what one is that no step has met."""
    return value is not None and value.shape[1:] == (0,)


def _larger(a: Any, b: Any) -> Any:
    return b if isinstance(a, int) and isinstance(b, int) and b > a else a


def _given_values(tree: Survey, given: Any) -> list[Tensor | None]:
    given = given if isinstance(given, Mapping) else {}
    values = [given.get(name) for name in tree.names]
    return [value if isinstance(value, Tensor) else None for value in values]


def _used(states: Sequence[State], values: Sequence[Tensor | None], at_most: int) -> int:
    known = all(type(v) is Tensor and v.device.type != "meta" for v in values if v is not None)
    return used(states, values) if known and not _get_current_dispatch_mode_stack() else at_most


def _size_key(program: Program, arguments: Arguments) -> Any:
    """What the sizes that were found depend on, but for the sizes of axes; None where that cannot be told."""
    from .compiler.ambient import ambient
    from .compiler.capture_store import everything_of  # torch's tracing machinery: only when it is needed

    try:
        depends = everything_of(program)
        hash(depends)
    except Exception:
        return None
    xs = tuple((x.dim(), x.dtype, x.device) for x in arguments.xs)
    constants = tuple((c.dim(), c.dtype) for c in arguments.constants)
    return program.key, depends, ambient(), xs, constants


@dataclass
class _Known:
    """What was found for one key: sizes by the sizes of all axes, and in general.

    axes: those of the latest first step, and free: those that were seen to differ.
    """

    exact: dict[tuple[int, ...], Sizes] = field(default_factory=dict)
    general: list[General] = field(default_factory=list)
    axes: dict[Place, int] | None = None
    free: frozenset[Place] = frozenset()


def _sizes(
    program: Program, tree: Survey, arguments: Arguments, before: list[Tensor | None], batch: Any,
    dtype: torch.dtype, device: torch.device,
) -> Sizes:  # fmt: skip
    """The sizes of States(...), from earlier calls where they are known."""
    find = (program.root, tree, arguments, before, batch, dtype, device)
    key = None if _symbolic(arguments, batch) else _size_key(program, arguments)
    if key is None:
        return find_sizes(*find)[0]
    kept = program.root._kept.setdefault("sizes", {})
    if key not in kept and len(kept) >= _KEPT_SIZES:
        kept.pop(next(iter(kept)))
    known = kept.setdefault(key, _Known())
    axes = axes_of(arguments)
    place = tuple(axes.values())
    sizes = known.exact.get(place) or next((s for g in known.general if (s := g.at(axes)) is not None), None)
    if sizes is None:
        if known.axes is not None:
            known.free |= {p for p, size in axes.items() if known.axes[p] != size}
        sizes, general = find_sizes(*find, known.free)
        known.axes = axes
        known.general = [*known.general, *([] if general is None else [general])][-_KEPT_SIZES:]
    if len(known.exact) >= _KEPT_SIZES:
        known.exact.pop(next(iter(known.exact)))
    known.exact[place] = sizes
    return sizes


def _symbolic(arguments: Arguments, batch: Any) -> bool:
    sizes = [batch, *(n for t in (*arguments.xs, *arguments.constants) for n in t.shape)]
    return any(isinstance(n, torch.SymInt) for n in sizes)
