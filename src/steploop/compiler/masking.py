"""Masks and resets as part of the step, for steps that hold for one batch size only.

Such a step can't run on fewer rows, so every row takes every step: at masked steps it sees the row's nearest
earlier valid input (what really stands there is never read) and its results are discarded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..errors import UnsupportedError, message
from ..marks import at_steps, latest, repeated, valid_at, wide
from .capture import Capture
from .ops.table import is_random
from .program import Call, Program, Result, StepOutput, name_of
from .row_trial import rows_see_each_other


def masked_call(program: Program, call: Call) -> tuple[Program, Call, Callable[[Result], Result]]:
    """The program and call with masks and resets inside, and what turns its result into the one asked for."""
    valid = valid_at(call.steps, call.lengths, call.mask)
    if valid is None:
        valid = torch.ones(call.steps, cast(int, call.batch), dtype=torch.bool, device="cpu")
    valid = valid.to(call.device)
    resets = torch.zeros_like(valid) if call.resets is None else call.resets.to(call.device)
    source = latest(valid, call.reverse)
    some = torch.where(source < 0, _any_valid(valid), source)
    xs = [_never_nan(at_steps(x, some), x, valid) for x in call.xs]
    back = call.reset_to if call.reset_to is not None else call.initial
    states = len(call.initial)
    inner = _program(program, len(call.xs), len(call.constants), states)
    new = replace(
        call, xs=[*xs, valid, resets], constants=[*call.constants, *back], lengths=None, mask=None, resets=None,
        reset_to=None, on_masked="zero", held=None,  # the initial states, constants now, differ from piece to piece
    )  # fmt: skip

    def finish(result: Result) -> Result:
        outputs = [torch.where(wide(valid, y), y, torch.zeros_like(y)) for y in result.outputs]
        if call.on_masked == "repeat":
            outputs = [repeated(y, source) for y in outputs]
        return Result(outputs, result.states, result.out_spec)

    return inner, new, finish


def check_rows_apart(program: Program, call: Call, capture: Capture) -> None:
    """UnsupportedError where rows that take no part would be seen by others. A step that draws is not tried."""
    marks = [m for m in (call.lengths, call.mask) if m is not None]
    real = not any(isinstance(t, (FakeTensor, FunctionalTensor)) for t in (*call.xs, *call.initial, *marks))
    valid = valid_at(call.steps, call.lengths, call.mask) if real else None
    if valid is None or bool(valid.all()):
        return
    if capture.made.rows_apart is None:
        draws = any(is_random(node) for node in capture.forward.graph.graph.nodes)
        capture.made.rows_apart = draws or not rows_see_each_other(program, call)
    if not capture.made.rows_apart:
        raise UnsupportedError(
            message(
                f"{name_of(program)} fixes the number of rows, and its rows see each other.",
                expected="the same rows at every step: no lengths and no mask",
                found="rows that take no part in some steps",
                fix="let the step run on any number of rows (x.shape[0] or len(x) instead of a number, no loop over "
                'rows), or use backend="reference"',
            )
        )


def _program(program: Program, xs: int, constants: int, states: int) -> Program:
    known = program.kept.masked
    if (xs, constants, states) in known:
        return known[xs, constants, states]

    def run(x: Sequence[Tensor], c: Sequence[Tensor], prevs: Sequence[Tensor]) -> StepOutput:
        valid, reset = x[xs], x[xs + 1]
        start = [torch.where(wide(reset, p), b, p) for p, b in zip(prevs, c[constants:])]
        outputs, nexts = program.run(list(x[:xs]), list(c[:constants]), [s.clone() for s in start])
        inner.out_spec = program.out_spec
        return outputs, [torch.where(wide(valid, n), n, p) for n, p in zip(nexts, prevs)]

    inner = replace(
        program, run=run, key=("masked", program.key), x_names=[*program.x_names, "mask", "resets"],
        constant_names=[*program.constant_names, *program.state_names],
        constant_batched=[*program.constant_batched, *[True] * states],
        ends=None,  # a reset, part of the step now, begins an ended row anew
    )  # fmt: skip
    known[xs, constants, states] = inner
    return inner


def _any_valid(valid: Tensor) -> Tensor:
    """(B,) one valid time of each row, 0 where it has none."""
    return valid.int().argmax(0) if len(valid) else valid.new_zeros(valid.shape[1], dtype=torch.long)


def _never_nan(reread: Tensor, x: Tensor, valid: Tensor) -> Tensor:
    """A row without any valid step sees the x of another row: what stands in its own may be anything."""
    some = valid.any(0)
    if bool(some.all()) or not bool(some.any()):
        return reread if len(valid) and bool(some.any()) else torch.zeros_like(reread)
    step, row = valid.nonzero()[0].tolist()
    return torch.where(wide(some, x[0]), reread, x[step, row].detach())
