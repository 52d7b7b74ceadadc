"""Stream: a Step run one step at a time, for data that arrives one step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from . import dispatch, sizing, torchscript, until
from .arguments import check_on_masked, take_apart
from .compiler.program import Call, Program
from .devices import check_call, explained
from .errors import InputError, UnsupportedError, describe, describe_type, message
from .initial import own_values, require
from .inputs import check_constants, checked_mask, constant_leaves, sequences
from .marks import wide
from .states import States, chosen_rows, given_states
from .step import Step, survey
from .step_program import program_of
from .tracebacks import ends_at_the_call
from .tree import unflatten

if TYPE_CHECKING:
    from .loop import Loop


@_disable_dynamo
def _outside_dynamo(stream: Stream[Any], xs: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
    return stream(*xs, **arguments)


_FIRST_ROOM = 16  # entries for which a stream's histories have room at first


Y = TypeVar("Y")  # what one step returns


class Stream(Generic[Y]):
    """One step at a time over `batch_size` independent rows. Made by `loop.stream(batch_size, ...)`.

        stream = loop.stream(8)
        y = stream(x)                        # x (8, ...), y (8, ...): one step
        y = stream(x, mask=m, resets=r)      # m, r (8,) bool: rows that take part, rows that start anew

        twin = stream.fork()                 # goes on from here by itself
        stream.reset([0, 3])                 # rows 0 and 3 start anew

    A masked row keeps its state; its output is zero, or with on_masked="repeat" its last valid one. Streams
    run under the caller's grad mode: use `torch.no_grad()`, or `stream.state = stream.state.detach()`, where
    the graph is not to grow. `begin` runs once, when the stream is made or at its first step.
    With `until`, a row that has ended stays where it ended, as if it were masked, up to a reset of it.
    Histories (`sl.memory.CausalSelfAttention` and the like) are preallocated, and doubled when they are full.
    """

    def __init__(self, loop: Loop[Y], batch_size: int, state: Any, on_masked: str, constants: dict[str, Any]) -> None:
        if loop.reverse:
            raise UnsupportedError(
                message(
                    "A loop with reverse=True cannot stream: its first step needs the end of the sequence.",
                    fix="sl.Loop(step).stream(...)",
                )
            )
        if isinstance(batch_size, bool) or not hasattr(batch_size, "__index__") or batch_size < 0:
            raise InputError(
                message(
                    "A stream's batch_size is a number of rows.",
                    expected="an int",
                    found=describe(batch_size),
                )
            )
        check_on_masked(on_masked)
        self.loop = loop
        self.batch_size = batch_size
        self.on_masked = on_masked
        self.constants = constants
        self._given = state
        self._tree = survey(loop.step)
        self._own: Any = None  # list of what each State was before its first step
        self._values: list[Tensor] = []
        self._last: list[Tensor] | None = None
        self._program: Any = None
        self._structure: Any = None
        self._arguments: Any = None
        self._fast: Any = None  # runs single steps without gradients, once the first has gone the usual way
        self._count = -1
        self._until: int | None = None  # which state ends a row
        self._taken = 0  # at least the number of entries that any history has in use
        if self._tree.parameter is not None and not self._tree.unsized:
            self._start([])

    @ends_at_the_call
    def __call__(self, *xs: Any, mask: Any = None, resets: Any = None, **named: Any) -> Y:
        """One step. xs (B, ...) each; mask, resets (B,) bool. Returns what the step returns, (B, ...).

        named: what the step takes by keyword but has a slice per step (Masked's `where`).
        """
        if torch.compiler.is_dynamo_compiling():
            return _outside_dynamo(self, xs, {"mask": mask, "resets": resets, **named})
        if self._fast is not None and not named and not torch.is_grad_enabled():
            if len(xs) == self._count and torch._C._get_tracing_state() is None:
                done = self._short(xs, mask, resets)
                if done is not None:
                    return done
        torchscript.refuse(self.loop.backend)
        if dispatch.is_recorded():
            raise UnsupportedError(
                message(
                    "A stream was called while a tracer records (torch.export): its state would be a constant.",
                    expected="a program that takes the state and gives the next one",
                    fix="outputs, state = loop(x[None], state=state)",
                )
            )
        xs, named = self.loop.step.sequences_of(xs, named)
        if named:
            raise InputError(_not_per_step(next(iter(named))))
        tensors, structure = sequences(xs)
        if self._own is None:
            self._start_with(xs, tensors, structure)
        if structure != self._structure:
            self._set_up(xs, tensors, structure)
        self._make_room()
        for x, name in zip(tensors, self._program.x_names, strict=True):
            if x.dim() == 0 or x.shape[0] != self.batch_size:
                raise InputError(_wrong_rows(x, name, self.batch_size))
        program, constants = self._program, self._arguments.constants
        if self.loop.until is not None:
            self._until = until.checked(self.loop.until, self._tree.names, self._values)
            start = [value if own is None else own for value, own in zip(self._values, self._own, strict=True)]
            program, start = until.freezing(program, self._until, start, None)
            constants = [*constants, *start]
        self._show()
        if torch.is_grad_enabled():  # what was made under inference_mode can't be part of a graph
            self._values = [value.clone() if value.is_inference() else value for value in self._values]
        call = Call(
            xs=[x.unsqueeze(0) for x in tensors],
            constants=constants,
            initial=self._values,
            steps=1,
            batch=self.batch_size,
        )
        if mask is not None:
            mask = call.mask = self._flags(mask, "mask").unsqueeze(0)
        if resets is not None:
            call.resets = self._flags(resets, "resets").unsqueeze(0)
            call.reset_to = require(self._own, self._tree.names)
        check_call(program, call)
        with explained(self.loop.step, xs, self.constants):
            result = dispatch.run(program, call, self.loop.backend, self.loop.save)
        if self._fast is None and not torch.is_grad_enabled():
            self._prepare(xs, program, replace(call, mask=None, resets=None, reset_to=None))
        self._values = result.states
        outputs = self._finished([output[0] for output in result.outputs], None if mask is None else mask[0])
        return unflatten(outputs, result.out_spec if result.out_spec is not None else program.out_spec)

    def _short(self, xs: tuple[Tensor, ...], mask: Any, resets: Any) -> Any:
        """A step by the short way; None where it can't be taken."""
        fast = self._fast
        back: Sequence[Tensor] = ()
        if mask is not None:
            mask = self._flags(mask, "mask").to(fast.device).contiguous()
        if resets is not None:
            resets = self._flags(resets, "resets").to(fast.device).contiguous()
            back = require(self._own, self._tree.names)
        done = fast.take(xs, self._values, mask, resets, back)
        if done is None:
            if not fast.holds:
                self._fast = None
            self._show()
            return None
        outputs, self._values = done
        if self._until is not None or self.on_masked == "repeat":
            outputs = self._finished(outputs, mask)
        return unflatten(outputs, fast.out_spec)

    def _finished(self, outputs: list[Tensor], mask: Tensor | None) -> list[Tensor]:
        if self._until is not None:
            mask = outputs.pop()  # which rows took the step
        if self.on_masked == "repeat":
            if mask is not None and self._last is not None:
                pairs = zip(outputs, self._last, strict=True)
                outputs = [torch.where(wide(mask.to(o.device), o), o, last) for o, last in pairs]
            self._last = [output.clone() for output in outputs]  # (the caller may write into what it gets)
        return outputs

    def _show(self) -> None:
        """Somebody else gets the states: they must stay what they are, whatever steps follow."""
        self._values = [*self._values]  # the short way writes into no list but its own

    def __getstate__(self) -> dict[str, Any]:
        """What a stream was given and where it stands; what makes it fast is made again."""
        self._show()
        return {**vars(self), "_fast": None, "_program": None, "_structure": None, "_arguments": None, "_count": -1}

    def __repr__(self) -> str:
        states = ", ".join(
            f"{name} {describe_type(value.shape, value.dtype)}"
            for name, value in zip(self._tree.names, self._values, strict=False)
        )
        unknown = "of sizes known at the first step" if self._tree.names else "none"
        masked = "" if self.on_masked == "zero" else f", on_masked={self.on_masked!r}"
        name = type(self.loop.step).__name__
        return f"Stream({name}, batch_size={self.batch_size}, states: {states or unknown}{masked})"

    def fork(self) -> Stream[Y]:
        """A copy that stands where this one does and goes on by itself: steps, resets and new states of the one don't
        change the other. Both run the same Loop, with the same weights and constants. Gradients flow through."""
        twin = copy(self)
        twin._values = [value.clone() for value in self._values]
        twin._last = None if self._last is None else [value.clone() for value in self._last]
        if isinstance(self._given, dict):
            twin._given = self._given.copy()
        return twin

    def __copy__(self) -> Stream[Y]:
        self._show()
        twin = object.__new__(type(self))
        vars(twin).update(vars(self), _fast=None if self._fast is None else self._fast.fork())
        return twin

    def reset(self, rows: Any = None) -> None:
        """Put rows back to where a stream begins: each State's `init`, or what `begin` set; never a given `state=`.

        rows: numbers of rows, a (B,) bool tensor or a slice; None: all. InputError for rows that are not there.
        """
        chosen = self._rows(rows)
        if self._own is None and self._tree.unsized and self._given is not None:
            if not bool(chosen.all()):
                raise sizing.not_sized(self._tree)
            self._given = None
        if self._own is None and self._tree.unsized:
            return
        if self._own is None:
            self._start([])
        own = require(self._own, self._tree.names)
        pairs = zip(own, self._values, strict=True)
        self._values = [torch.where(wide(chosen.to(v.device), v), o, v) for o, v in pairs]

    def _rows(self, rows: Any) -> Tensor:
        """(B,) bool: which rows are meant."""
        try:
            return chosen_rows(rows, self.batch_size, "cpu")
        except (TypeError, ValueError, RuntimeError, IndexError):
            raise InputError(
                message(
                    "These rows of a stream can't be reset.",
                    expected=f"numbers below {self.batch_size}, or ({self.batch_size},) bool",
                    found=describe(rows),
                    fix="stream.reset([0, 3]), stream.reset(done) or stream.reset()",
                )
            ) from None

    def _prepare(self, xs: tuple[Any, ...], program: Program, call: Call) -> None:
        """From the next step on, take the short way where there is one."""
        plain = all(isinstance(x, Tensor) for x in xs) and type(self.loop.step).sequences_of is Step.sequences_of
        grows = any(state.grows_with is not None for state in self._tree.states)
        if plain and not grows:
            self._fast = dispatch.stream_step(program, call, self.loop.backend)
            self._count = len(xs)

    @property
    def state(self) -> States:
        """The States after the last step; assign an sl.States, or a dict by path, to go on from there."""
        if self._own is None and self._tree.unsized:
            if self._given is None:
                raise sizing.not_sized(self._tree)
            return States(self._given)
        if self._own is None:
            self._start([])
        self._show()
        names = self._tree.names
        own = {name: value for name, value in zip(names, self._own, strict=True) if value is not None}
        return States(zip(names, self._values, strict=True), own)

    @state.setter
    def state(self, state: Any) -> None:
        if self._own is None and self._tree.unsized:
            self._given = state
            return
        if self._own is None:
            self._start([])
        if isinstance(state, dict):
            state = self._with_room(state)
        before = self._values
        self._values = given_states(state, self._tree.names, self._own, self.batch_size)
        if self._fast is not None and not all(map(self._fast.takes, self._values)):
            self._fast = None  # it takes States without another look
        elif any(b.shape != v.shape or b.dtype != v.dtype for b, v in zip(before, self._values, strict=True)):
            self._fast = None
        self._taken = sizing.used(self._tree.states, self._values)

    def _start(self, xs: list[Tensor]) -> None:
        tensors, structure, batched, named = constant_leaves(self.constants)
        check_constants(tensors, batched, structure, self.batch_size)
        own = self._tree.with_copies(own_values(self._tree, self.batch_size, xs, tensors, named))
        if self._given is None:
            self._values = require(own, self._tree.names)
        else:
            self._values = given_states(self._given, self._tree.names, own, self.batch_size)
        self._own = own

    def _start_with(self, xs: tuple[Any, ...], tensors: list[Tensor], structure: Any) -> None:
        if not self._tree.unsized:
            return self._start(tensors)
        self._set_up(xs, tensors, structure)
        for x, name in zip(tensors, self._program.x_names, strict=True):
            if x.dim() == 0 or x.shape[0] != self.batch_size:
                raise InputError(_wrong_rows(x, name, self.batch_size))
        constants, shape, batched, named = constant_leaves(self.constants)
        check_constants(constants, batched, shape, self.batch_size)
        arguments = replace(self._arguments, xs=[x.unsqueeze(0) for x in tensors])
        begun = sizing.begin(self._program, self._tree, arguments, named, self.batch_size, self._given, 1, _FIRST_ROOM)
        if begun.tree is not self._tree:
            self._tree = begun.tree
            self._set_up(xs, tensors, structure)
        names, own = self._tree.names, begun.own
        if self._given is None:
            self._values = require(own, names)
        else:
            self._values = given_states(begun.given, names, own, self.batch_size)
        self._own = own
        self._taken = sizing.used(self._tree.states, self._values)

    def _make_room(self) -> None:
        """Double the histories if one may be full before this step."""
        states = self._tree.states
        if all(state.grows_with is None for state in states):
            return
        room = sizing.room_of(states, self._values)
        self._taken += 1
        if self._taken > room:
            self._taken = sizing.used(states, self._values) + 1  # resets may have emptied some
        if self._taken > room:
            self._values = sizing.with_room(states, self._values, max(2 * room, _FIRST_ROOM))
            self._own = sizing.with_room(states, self._own, max(2 * room, _FIRST_ROOM))

    def _with_room(self, state: dict[str, Any]) -> dict[str, Any]:
        """A given state whose histories are as long as this stream's; the shorter ones are padded."""
        states, names = self._tree.states, self._tree.names
        given: list[Any] = [v if isinstance(v := state.get(name), Tensor) else None for name in names]
        room = max(sizing.room_of(states, given), sizing.room_of(states, self._own))
        self._own = sizing.with_room(states, self._own, room)
        padded = zip(names, sizing.with_room(states, given, room), strict=True)
        return {**state, **{name: value for name, value in padded if value is not None}}

    def _set_up(self, xs: tuple[Any, ...], tensors: list[Tensor], structure: Any) -> None:
        arguments, _ = take_apart(self.loop.step, self._tree, xs, self.constants)
        self._arguments = arguments
        self._program = program_of(self.loop.step, self._tree, arguments)
        self._structure = structure

    def _flags(self, flags: Any, name: str) -> Tensor:
        """(B,) bool. InputError for anything else."""
        if type(flags) is Tensor and flags.dtype is torch.bool and flags.dim() == 1 and len(flags) == self.batch_size:
            return flags
        flags = flags if isinstance(flags, Tensor) else torch.as_tensor(flags, device="cpu")
        if flags.dim() != 1:
            raise InputError(
                message(
                    f"A stream's `{name}` has one entry per row.",
                    expected=f"({self.batch_size},) bool",
                    found=describe(flags),
                    fix=f"{name}[t] of a (T, B) {name}",
                )
            )
        return checked_mask(flags.unsqueeze(0), name, 1, self.batch_size, False)[0]


def _not_per_step(name: str) -> str:
    return message(
        f"A stream's step got `{name}=`.",
        expected="this step's slices; constants are given once, where the stream is made",
        found=f"`{name}=`",
        fix=f"loop.stream(batch_size, {name}=...)",
    )


def _wrong_rows(x: Tensor, name: str, batch: Any) -> str:
    if x.dim() > 0 and (x.dim() < 3 or x.shape[1] != batch):
        return message(
            f"This stream has {batch} rows, and {name} has {x.shape[0]}.",
            expected=f"({batch}, ...), one step of every row",
            found=describe(x),
            fix=f"loop.stream({x.shape[0]}) has {x.shape[0]} rows; where {name} is a sequence: stream({name}[t])",
        )
    return message(
        f"A stream takes one step: {name} has no time axis.",
        expected=f"({batch}, ...)",
        found=describe(x),
        fix=f"stream({name}[t]) for each t, or loop({name}) for the whole sequence",
    )
