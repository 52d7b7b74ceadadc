"""What an operation that remembers is: one step and a whole sequence of the same thing.

A new operation is one file with a subclass of `Memory` in it; docs/extending.md writes one. The helpers below
are what most whole-sequence forms need: which steps are valid, where the latest reset was, and earlier frames
across a handed-over state and resets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import dispatch
from ..arguments import take_apart
from ..backends.reference import valid_steps
from ..compiler.program import Call, Program, Result
from ..errors import InputError, describe, message
from ..frame import Frame
from ..marks import wide
from ..step import Step, Unbatched, survey
from ..step_program import program_of
from ..tree import flatten, unflatten
from .opaque import opaque_step


class Memory(Step):
    """An operation that remembers: a Step whose whole sequence can be computed at once.

    `step` defines the meaning: plain torch on `sl.State` slots. `sequence` computes all steps at once and
    must give the same outputs, final states and gradients. Where an operation's inputs do not depend on the
    recurrence through it, its whole-sequence form runs, outside of any loop; else `step` is part of the loop.
    An operation without `sequence` always runs by `step`.
    """

    # Inside a step always by `step`: for one so simple that the compiler sees more in it than in one opaque
    # call (a pure delay; an output that depends on fewer inputs than the state does).
    inlined: bool = False
    takes_steps: ClassVar[bool] = False  # `sequence` may be called without xs, and then gets `steps=`

    def sequence(
        self, xs: tuple[Any, ...], constants: dict[str, Any], state: dict[str, Tensor], reset_to: dict[str, Tensor],
        lengths: Tensor | None, resets: Tensor | None,
    ) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
        """All steps at once, in differentiable torch code, without a loop over T where the operation allows.

        xs:        the positional arguments of `step`, (T, B, ...) each, in running order, valid steps first.
        constants: its keyword arguments.
        state:     name -> (B, ...) before the first step; names relative to this operation.
        reset_to:  name -> (B, ...) what a reset returns each state to.
        lengths:   (B,) int64, or None: all T steps are valid. Beyond them xs may hold anything, NaN too,
                   which must reach no valid output, state or gradient.
        resets:    (T, B) bool, True = reset before this step; or None. What it says beyond lengths
                   does not count.

        Returns what `step` returns with T in front, (T, B, ...) (anything beyond lengths), and every state
        after each row's last valid step.
        """
        raise NotImplementedError

    def check(self, *xs: Any, **constants: Any) -> None:
        """Raise InputError that names the argument unless one step's arguments fit; both forms call it."""

    @classmethod
    def has_sequence(cls) -> bool:
        """Whether there is a whole-sequence form."""
        return cls.sequence is not None and cls.sequence is not Memory.sequence

    def _step_inside(self, frame: Frame, xs: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
        if self.inlined or frame.inlined or not self.has_sequence():
            return self.step(*xs, **arguments)
        return opaque_step(self, frame, xs, arguments)

    def run_whole(self, program: Program, call: Call) -> Result | None:
        """A call of this operation alone, all steps at once; None where it has to go step by step."""
        if not self.has_sequence() or call.steps == 0 or _traced(call):
            return None
        return _Whole(self, program, call).result()


def _traced(call: Call) -> bool:
    tensors = [*call.xs, *call.constants, *call.initial]
    return not all(type(t) is Tensor or isinstance(t, torch.nn.Parameter) for t in tensors) or bool(
        torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    )


class _Whole:
    """One call: valid steps to the front of each row, the operation's `sequence`, and back again."""

    def __init__(self, op: Memory, program: Program, call: Call) -> None:
        self.op, self.program, self.call = op, program, call
        self.device = next((t.device for t in (*call.xs, *call.initial, *call.constants)), None)
        self.valid: Any = valid_steps(call)  # (T, B) bool; None where all are
        self.order: Any = None  # (T', B): the step that stands there
        batch: Any = call.batch
        lengths: Any = call.lengths
        if call.mask is not None or (call.reverse and lengths is not None):
            assert self.valid is not None
            lengths = self.valid.sum(0)
            self.order = _to_front(self.valid, call.reverse, int(lengths.max()) if lengths.numel() else 1)
        elif call.reverse:
            self.order = torch.arange(call.steps - 1, -1, -1, device="cpu")[:, None].expand(call.steps, batch)
        self.order = None if self.order is None else self.order.to(self.device)
        self.lengths = None if lengths is None else lengths.to(self.device)
        self.valid = None if self.valid is None else self.valid.to(self.device)

    def result(self) -> Result:
        call = self.call
        run: Any = self.program.run
        names = self.program.state_names
        state = dict(zip(names, call.initial, strict=True))
        fresh = dict(zip(names, call.reset_to or call.initial, strict=True))
        resets = None if call.resets is None else self._ordered(call.resets.to(self.device))
        xs = unflatten([self._ordered(x) for x in call.xs], run.x_structure)
        constants = unflatten(call.constants, run.constant_structure)
        self.op.check(*unflatten([x[0] for x in call.xs], run.x_structure), **constants)
        extra = {"steps": call.steps if self.order is None else len(self.order)}
        outputs, after = self.op.sequence(
            xs, constants, state, fresh, self.lengths, resets, **(extra if self.op.takes_steps else {})
        )
        leaves, structure = flatten(outputs)
        self.program.out_spec = structure
        return Result([self._back(y) for y in leaves], [after[name] for name in names], structure)

    def _ordered(self, x: Tensor) -> Tensor:
        return x if self.order is None else rows_at(x, self.order)

    def _back(self, y: Tensor) -> Tensor:
        if self.order is None and self.valid is None:
            return y
        steps = torch.arange(self.call.steps, device=self.device)[:, None]
        count = self.valid if self.valid is not None else torch.ones_like(self.order, dtype=torch.bool)
        count = count.flip(0).cumsum(0).flip(0) if self.call.reverse else count.cumsum(0)
        repeat = self.call.on_masked == "repeat"
        there = count > 0 if repeat or self.valid is None else self.valid
        if self.order is None and not repeat:
            placed = y
        else:
            placed = rows_at(y, (count - 1).clamp(min=0, max=len(y) - 1).expand(len(steps), -1))
        return torch.where(wide(there, placed), placed, torch.zeros_like(placed))


def _to_front(valid: Tensor, reverse: bool, longest: int) -> Tensor:
    """(T', B): for each row the times of its valid steps, in running order."""
    if reverse:
        return len(valid) - 1 - _to_front(valid.flip(0), False, longest)
    return torch.argsort((~valid).to(torch.uint8), dim=0, stable=True)[: max(longest, 1)]


# -- for whole-sequence forms --------------------------------------------------------------------------------


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """x (N, B, ...), index (..., B) -> (..., B, ...): for every row its own entries."""
    return x[index, torch.arange(x.shape[1], device=x.device)]


def is_valid(lengths: Tensor | None, steps: int, batch: int, device: Any = None) -> Tensor:
    """(T, B) bool."""
    if lengths is None:
        return torch.ones(steps, batch, dtype=torch.bool, device=device)
    return torch.arange(steps, device=lengths.device)[:, None] < lengths[None, :]


def cleaned(x: Tensor, lengths: Tensor | None, value: float = 0.0) -> Tensor:
    """x (T, B, ...) with `value` where no step is valid, so that nothing that stands there gets anywhere."""
    if lengths is None:
        return x
    valid = is_valid(lengths, x.shape[0], x.shape[1])
    return torch.where(wide(valid, x), x, torch.full((), value, dtype=x.dtype, device=x.device))


def counts_of(lengths: Tensor | None, steps: int, batch: int, device: Any) -> Tensor:
    """(B,) int64, the number of valid steps."""
    return lengths if lengths is not None else torch.full((batch,), steps, dtype=torch.int64, device=device)


def latest_reset(resets: Tensor, lengths: Tensor | None) -> Tensor:
    """(T + 1, B) int64: the time of the latest reset at or before t, -1 before the first; last: after all."""
    steps, batch = resets.shape
    resets = resets & is_valid(lengths, steps, batch, resets.device)
    time = torch.arange(steps, device=resets.device)[:, None]
    latest = torch.where(resets, time, -1)
    latest = torch.cat([latest, latest.new_full((1, batch), -1)])
    return torch.cummax(latest, 0).values


def final(y: Tensor, before: Tensor, lengths: Tensor | None) -> Tensor:
    """The state after each row's last valid step; y (T, B, ...): after every step, `before`: before all."""
    if lengths is None:
        return y[-1]
    return rows_at(torch.cat([before[None], y]), lengths[None])[0]


class Frames:
    """x_{t-k} for k <= n, over the frames (B, n, ...) that a state brings along, and across resets.

    x: (T, B, ...), cleaned.  past: the n frames before the first.  fresh: those that a reset puts there.
    """

    def __init__(
        self, x: Tensor, past: Tensor, fresh: Tensor, lengths: Tensor | None, resets: Tensor | None
    ) -> None:
        self.x, self.n = x, past.shape[1]
        self.steps, self.batch = x.shape[:2]
        self.lengths = lengths
        self.latest = None if resets is None else latest_reset(resets, lengths)
        parts = [past.transpose(0, 1), x]
        if resets is not None:
            parts.append(fresh.transpose(0, 1))
        self.all = torch.cat(parts)

    def back(self, k: int) -> Tensor:
        """x_{t-k}, (T, B, ...)."""
        if self.latest is None:
            return self.all[self.n - k : self.n - k + self.steps]
        time = torch.arange(self.steps, device=self.x.device)[:, None]
        return self._at(time - k, self.latest[:-1])

    def last(self) -> Tensor:
        """The last n frames of each row, (B, n, ...): the state afterwards."""
        if self.latest is None and self.lengths is None:
            return self.all[self.steps :].transpose(0, 1)
        end = counts_of(self.lengths, self.steps, self.batch, self.x.device)
        time = end[None, :] - self.n + torch.arange(self.n, device=self.x.device)[:, None]
        latest = None if self.latest is None else rows_at(self.latest, end[None])
        return self._at(time, latest).transpose(0, 1)

    def _at(self, time: Tensor, latest: Tensor | None) -> Tensor:
        """The frames at `time` (..., B) as seen since the reset at `latest` (-1: none)."""
        index = self.n + time
        if latest is not None:
            before = self.n + self.steps + self.n + time - latest
            index = torch.where((latest >= 0) & (time < latest), before, index)
        return rows_at(self.all, index)


# -- for operations that run other Steps ---------------------------------------------------------------------


def run_child(
    child: Step,
    xs: tuple[Any, ...],
    constants: Mapping[str, Any],
    state: Mapping[str, Tensor],
    reset_to: Mapping[str, Tensor] | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    batch: int,
    steps: int,
) -> tuple[Any, dict[str, Tensor]]:
    """A whole sequence of another Step, from states given by name: (outputs (T, B, ...), final states)."""
    back: Any = reset_to
    tree = survey(child)
    marked = {name: _marked(value, batch) for name, value in constants.items()}
    arguments, _ = take_apart(child, tree, xs, marked)
    program = program_of(child, tree, arguments)
    call = Call(
        xs=arguments.xs,
        constants=arguments.constants,
        initial=[state[name] for name in tree.names],
        steps=steps,
        batch=batch,
        reset_to=None if resets is None else [back[name] for name in tree.names],
        lengths=lengths,
        resets=resets,
    )
    result = dispatch.run(program, call, "auto")
    structure = result.out_spec if result.out_spec is not None else program.out_spec
    return unflatten(result.outputs, structure), dict(zip(tree.names, result.states, strict=True))


def _marked(value: Any, batch: int) -> Any:
    has_rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
    return value if has_rows or isinstance(value, Unbatched) else Unbatched(value)


# -- checks --------------------------------------------------------------------------------------------------


def whole_number(owner: str, name: str, value: Any, least: int) -> int:
    """`value` as an int; InputError that names the argument unless it is one and >= least."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < least:
        raise InputError(
            message(
                f"{owner}: {name} is a whole number, at least {least}.",
                expected=f"an int >= {least}",
                found=describe(value),
                fix=f"{owner}({name}={least})",
            )
        )
    return value.__index__()


def one_of(owner: str, name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """`value`; InputError that names the argument and its choices unless it is one of them."""
    if value not in choices:
        raise InputError(
            message(
                f"{owner}: there is no {name}={value!r}.",
                expected=", ".join(repr(choice) for choice in choices),
                found=describe(value),
                fix=f"{owner}({name}={choices[0]!r})",
            )
        )
    return value


def check_step_input(
    owner: str, name: str, value: Any, *, features: int | None = None, integer: bool = False
) -> Tensor:
    """InputError that names the argument unless it is a tensor of one step, (B, ...)."""
    wanted = f"(B, {features})" if features is not None else "(B,) of integers" if integer else "(B, ...)"
    fits = isinstance(value, Tensor) and value.dim() > 0
    if fits and features is not None:
        fits = value.dim() == 2 and value.shape[1] == features
    if fits and integer:
        fits = value.dim() == 1 and not (
            value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
        )
    if not fits:
        raise InputError(
            message(
                f"{owner}: {name} is not what one step takes.",
                expected=f"{wanted} in a step, T in front of it for a whole sequence",
                found=describe(value),
                fix=f"give {name} that shape",
            )
        )
    return value


def check_mask(owner: str, name: str, value: Any) -> Tensor:
    """InputError that names the argument unless it is a (B,) bool tensor."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.dim() != 1:
        raise InputError(
            message(
                f"{owner}: {name} says for every row whether this step counts.",
                expected="(B,) bool in a step, (T, B) bool for a whole sequence",
                found=describe(value),
                fix=f"{name}={name}.bool()" if isinstance(value, Tensor) else f"{name}=mask",
            )
        )
    return value
