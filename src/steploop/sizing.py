"""The shapes of States that only a first step can tell, and room for those that grow.

`sl.State(...)` takes its shape from what the step gives it (`State.sized`). Before such a loop's first call,
one step is run on fake tensors, from which only shapes are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .arguments import Arguments
from .compiler.program import Program
from .errors import StateError, message
from .frame import Frame, run_in
from .initial import dtype_and_device, own_values
from .state import State
from .step import Step, Survey, survey
from .tree import Structure, unflatten

_KEPT_SIZES = 32  # per Step

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
    return state.start(batch, dtype, device, shape)


def find_sizes(
    step: Step,
    tree: Survey,
    xs: Sequence[Tensor],
    x_structure: Structure,
    constants: Sequence[Tensor],
    constant_structure: Structure,
    before: Sequence[Tensor | None],
    batch: Any,
    dtype: torch.dtype,
    device: torch.device,
) -> Sizes:
    """One step on fake slices of `xs` (T, B, ...). before: States' values as far as they are known."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # slow to import

    sizing = Sizing(batch, 2, dtype, device)
    tensors = [list(xs), list(constants), list(before)]
    flat, _ = pytree.tree_flatten(tensors)

    def run(convert: Any) -> None:
        slices, fixed, values = pytree.tree_map_only(Tensor, convert, tensors)
        slices = [x.new_zeros(x.shape[1:]) for x in slices]
        states, known = tree.states, dict(zip(tree.states, values, strict=True))
        frame = Frame(dict(zip(states, tree.names, strict=True)), known, "step")
        frame.batch = batch
        frame.sizing = sizing
        sizing.found.clear()
        with torch.no_grad(), run_in(frame):
            step(*unflatten(slices, x_structure), **unflatten(fixed, constant_structure))

    if _get_current_dispatch_mode_stack() or any(isinstance(t, FakeTensor) for t in flat):
        run(lambda t: t)  # a tracer is at work: what it sees of this is dead code
        return sizing.found
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            run(lambda t: mode.from_tensor(t.detach()))
    except Exception:  # Python that looks at values; the plain loop may still run it
        _run_really(step, run)
    return sizing.found


def _run_really(step: Step, run: Any) -> None:
    """On zeros, leaving no trace in random numbers and buffers."""
    kept = [(buffer, buffer.detach().clone()) for buffer in step.buffers()]
    try:
        with torch.random.fork_rng():
            run(lambda t: t.detach().clone())
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
        return Begun(tree, own, given)
    step = program.root
    dtype, device = dtype_and_device(tree, arguments.xs, arguments.constants)
    values = _given_values(tree, given)
    known = [mine if mine is not None else value for mine, value in zip(own, values, strict=True)]
    sizes = _kept_sizes(program, arguments, batch)
    if sizes is None:
        sizes = find_sizes(
            step, tree, arguments.xs, arguments.x_structure, arguments.constants,
            arguments.constant_structure, known, batch, dtype, device,
        )  # fmt: skip
        _keep_sizes(program, arguments, batch, sizes)
    found = survey(step)
    if found.names != tree.names:  # a Step made States for what its child returned
        tree = found
        own = own_values(tree, batch, arguments.xs, arguments.constants, named)
        values = _given_values(tree, given)
    if any(state.grows_with is not None for state in tree.states):
        before = room_of(tree.states, values)
        room = _larger(_larger(_used(tree.states, values, before) + steps, before), room)
        if isinstance(given, Mapping):
            padded = with_room(tree.states, values, room)
            given = {**given, **{n: v for n, v in zip(tree.names, padded, strict=True) if v is not None}}
    for i, state in enumerate(tree.states):
        if state.unsized and own[i] is None:
            own[i] = start(state, sizes, batch, room, device)
    return Begun(tree, own, given)


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
    """What the sizes that were found depend on; None where that cannot be told."""
    from .compiler.captures import dependencies_of  # torch's tracing machinery: only when it is needed
    from .compiler.dependencies import ambient

    try:
        depends = dependencies_of(program).key
        hash(depends)
    except Exception:
        return None
    xs = tuple((x.shape[2:], x.dtype, x.device) for x in arguments.xs)
    rows = zip(arguments.constants, arguments.constant_batched, strict=True)
    constants = tuple((c.shape[1:] if batched else c.shape, c.dtype) for c, batched in rows)
    return program.key, depends, ambient(), xs, constants


def _kept_sizes(program: Program, arguments: Arguments, batch: Any) -> Sizes | None:
    if _symbolic(arguments, batch):
        return None
    kept = program.root._kept.get("sizes")
    return None if kept is None else kept.get(_size_key(program, arguments))


def _keep_sizes(program: Program, arguments: Arguments, batch: Any, sizes: Sizes) -> None:
    if _symbolic(arguments, batch) or (key := _size_key(program, arguments)) is None:
        return
    kept = program.root._kept.setdefault("sizes", {})
    if len(kept) >= _KEPT_SIZES:
        kept.pop(next(iter(kept)))
    kept[key] = sizes


def _symbolic(arguments: Arguments, batch: Any) -> bool:
    sizes = [batch, *(n for t in (*arguments.xs, *arguments.constants) for n in t.shape)]
    return any(isinstance(n, torch.SymInt) for n in sizes)
