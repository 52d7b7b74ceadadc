"""Loops that end by themselves: a row takes no step after the one that set the loop's `until` State.

How many steps there will be is known only when they have run, but everything outside the loops runs for many steps at
once. So a call runs in pieces of some steps. Within a piece the step itself freezes rows that have ended (`freezing`).
Between pieces they are left out, as rows of length 0 are. The call ends when no row is left. A piece is at most as long
as all that has run before it, which bounds what is computed for nothing. Native loops look themselves, at every step,
whether any row of a tile is left (`Program.ends`): then pieces are long. What is the same at every step is computed by
the first piece, and held for the others (`Call.held`).

Gradients: the pieces only find out which steps run. Then the call runs once more as one with a mask, with everything
that holds for those: what stands at a step that no row took reaches no gradient. A step that draws random numbers would
draw others then; it is differentiated through its pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .backends.reference import last_of, valid_steps
from .compiler.program import Call, Program, Result, StepOutput
from .errors import StateError, UnsupportedError, describe, message
from .marks import latest, repeated, wide

FIRST_PIECE = 16  # steps
LONG_PIECE = 256  # steps, where a loop stops by itself when all rows have ended

Run = Callable[[Program, Call], Result]


def checked(name: str, names: Sequence[str], initial: Sequence[Tensor]) -> int:
    """Which state `until` names. StateError unless it is one, (B,) bool."""
    if name not in names:
        raise StateError(
            message(
                f"until={name!r} names no State of this step.",
                expected=", ".join(repr(n) for n in names) or "a State of the step, which has none",
                found=repr(name),
                fix="self.done = sl.State(init=False, dtype=torch.bool), then sl.Loop(step, until='done')",
            )
        )
    value = initial[names.index(name)]
    if value.dtype != torch.bool or value.dim() != 1:
        raise StateError(
            message(
                f"The State {name!r} that ends the loop has one bool per row.",
                expected="(B,) bool",
                found=describe(value),
                fix="self.done = sl.State(init=False, dtype=torch.bool)",
            )
        )
    return names.index(name)


def run(
    program: Program, call: Call, run_piece: Run, wants_gradients: Callable[[Program, Call], tuple[bool, bool]],
    stops: Callable[[Program, Call], bool],
) -> Result:  # fmt: skip
    """Run a call with `until`. run_piece: runs a call without it.

    wants_gradients: (whether a call is to be differentiated, whether its step draws random numbers).
    stops: whether the steps of a piece that come after all rows have ended cost next to nothing.
    """
    if _get_current_dispatch_mode_stack():
        raise UnsupportedError(
            message(
                "A loop that ends by itself was called inside a step or under a tracer: its length is not known there.",
                expected="a call outside of other loops, or a loop without until=",
                fix="run the inner loop for steps=n, and mask what comes after its end",
            )
        )
    training, random = wants_gradients(program, replace(call, until=None))
    with torch.set_grad_enabled(training and random):
        result = _in_pieces(program, call, run_piece, stops)
    if not training or random:
        return result
    return _again(program, call, result, run_piece)


def _again(program: Program, call: Call, found: Result, run_piece: Run) -> Result:
    """The same steps once more, which are known now."""
    taken = cast(Tensor, found.taken)
    steps = len(taken)
    inside = (taken[1:] <= taken[:-1]).all()  # no row pauses
    lengths, mask = (taken.sum(0), None) if bool(inside) else (None, taken)
    if steps and bool(taken.all()):
        lengths = None
    resets = None if call.resets is None else call.resets[:steps]
    whole = replace(
        call, xs=[x[:steps] for x in call.xs], steps=steps, lengths=lengths, mask=mask, resets=resets, until=None
    )
    return replace(run_piece(program, whole), taken=taken)


def _in_pieces(program: Program, call: Call, run_piece: Run, stops: Callable[[Program, Call], bool]) -> Result:
    frozen, constants = freezing(program, cast(int, call.until), call.initial, call.reset_to)
    constants = [*call.constants, *constants]
    probe = replace(call, constants=constants, lengths=None, mask=None, resets=None, reset_to=None, until=None)
    by_itself = not torch.is_grad_enabled() and call.resets is None and call.steps > 0 and stops(frozen, probe)
    plan = _Pieces(call, LONG_PIECE if by_itself else FIRST_PIECE)
    states, pieces = call.initial, []
    held: dict[Any, Any] = {}
    while (piece := plan.next(states[cast(int, call.until)])) is not None:
        part = replace(
            call, xs=[x[piece] for x in call.xs], constants=constants, initial=states, steps=piece.stop - piece.start,
            lengths=None, mask=plan.mask, resets=plan.resets, on_masked="zero", until=None, held=held,
        )  # fmt: skip
        result = run_piece(frozen, part)
        states, structure = result.states, result.out_spec
        pieces.append(result.outputs)
    if not pieces:
        empty = replace(call, xs=[x[:0] for x in call.xs], steps=0, lengths=None, mask=None, resets=None, reset_to=None)
        result = run_piece(program, replace(empty, until=None))
        return replace(result, states=list(call.initial), taken=plan.nothing(states[cast(int, call.until)]))
    *outputs, taken = [torch.cat(steps) for steps in zip(*pieces, strict=True)]
    steps = last_of(taken)
    outputs = [output[:steps] for output in outputs]
    if call.on_masked == "repeat":
        source = latest(taken[:steps])
        outputs = [repeated(output, source) for output in outputs]
    return Result(outputs, states, structure, taken[:steps])


class _Pieces:
    """The pieces of a call, one after the other, and which of their steps are valid."""

    def __init__(self, call: Call, first: int) -> None:
        self.steps, self.batch, self.first = call.steps, cast(int, call.batch), first
        self.stop = 0
        self.valid = valid_steps(call)
        self.all_resets = None
        if call.resets is not None:
            self.all_resets = call.resets.cpu()
            if self.valid is not None:
                self.all_resets = self.all_resets & self.valid
        self.mask: Tensor | None = None
        self.resets: Tensor | None = None

    def next(self, ended: Tensor) -> slice | None:
        """The next steps that some row may take; sets mask and resets (or None) to theirs."""
        ended = ended.detach().cpu()
        left = self._left(ended).nonzero()[:, 0]
        if not len(left):
            return None
        start = self.stop
        most = int(left[0]) + max(self.first, start)  # steps before the first that a row takes cost nothing
        self.stop = start + min(most, int(left[-1]) + 1)
        piece = slice(start, self.stop)
        self.resets = None if self.all_resets is None else self.all_resets[piece]
        running = ~ended if self.resets is None else ~ended | self.resets.any(0)
        self.mask = None if self.valid is None else self.valid[piece] & running
        if self.valid is None and not bool(running.all()):
            self.mask = running.expand(self.stop - start, self.batch)
        return piece

    def _left(self, ended: Tensor) -> Tensor:
        """(steps that are left,) whether some row may take them."""
        running = ~ended.expand(self.steps - self.stop, self.batch)
        if self.all_resets is not None:
            running = running | (self.all_resets[self.stop :].cumsum(0) > 0)
        if self.valid is not None:
            running = running & self.valid[self.stop :]
        return running.any(1)

    def nothing(self, like: Tensor) -> Tensor:
        return torch.zeros(0, self.batch, dtype=torch.bool, device=like.device)


def whole(program: Program, call: Call) -> tuple[Program, Call]:
    """A program and call that stand for all pieces of a call: what its plan is made of."""
    frozen, constants = freezing(program, cast(int, call.until), call.initial, call.reset_to)
    return frozen, replace(call, constants=[*call.constants, *constants], until=None)


def freezing(
    program: Program, until: int, initial: Sequence[Tensor], own: Sequence[Tensor] | None
) -> tuple[Program, list[Tensor]]:
    """(`program` with rows that have ended frozen, the constants to add for it).

    It gives one output more, (B,) bool: whether the row took the step. Outputs of rows that did not are zero.
    Such a row's step runs all the same. It sees the values that States start from, on which the step is known to run:
    those after the end may lie outside of what it is made for (a position behind the end of a memory).
    own: the States' own initial values where they are known. initial: else these.
    """
    start = list(own if own is not None else initial)
    frozen = program.kept.until.get(until)
    if frozen is None:
        frozen = program.kept.until[until] = _frozen(program, until, len(start))
    return frozen, start


def _frozen(program: Program, until: int, states: int) -> Program:
    def run(xs: Sequence[Tensor], constants: Sequence[Tensor], prevs: Sequence[Tensor]) -> StepOutput:
        ended = prevs[until]
        count = len(constants) - states
        safe = [torch.where(wide(ended, p), s, p) for s, p in zip(constants[count:], prevs, strict=True)]
        outputs, nexts = program.run(xs, constants[:count], safe)
        frozen.out_spec = program.out_spec
        outputs = [torch.where(wide(ended, o), torch.zeros_like(o), o) for o in outputs]
        # A State that no step writes needs no loop.
        frozen_nexts = zip(nexts, prevs, safe, strict=True)
        nexts = [p if n is s else torch.where(wide(ended, p), p, n) for n, p, s in frozen_nexts]
        return [*outputs, ~ended], nexts

    frozen = replace(
        program, run=run, key=("until", until, program.key), stands_alone=False, ends=until,
        constant_names=[*program.constant_names, *program.state_names],
        constant_batched=[*program.constant_batched, *[True] * states],
    )  # fmt: skip
    return frozen
