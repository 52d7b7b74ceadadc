"""Masks and resets as part of the step, for steps that hold for one batch size only.

Such a step can't run on fewer rows, so every row takes every step: at masked steps it sees the row's nearest
earlier valid input (what really stands there is never read) and its results are discarded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .program import Call, Program, Result
from .schedule import valid_steps


def masked_call(program: Program, call: Call) -> tuple[Program, Call, Callable[[Result], Result]]:
    """The program and call with masks and resets inside, and what turns its result into the one asked for."""
    device = call.initial[0].device if call.initial else call.xs[0].device
    valid = valid_steps(call.steps, call.batch, call.lengths, call.mask)
    if valid is None:
        valid = torch.ones(call.steps, call.batch, dtype=torch.bool, device="cpu")
    valid = valid.to(device)
    resets = torch.zeros_like(valid) if call.resets is None else call.resets.to(device)
    source = _nearest(valid, call.reverse)
    xs = [_never_nan(_reread(x, source), x, valid) for x in call.xs]
    back = call.reset_to if call.reset_to is not None else call.initial
    states = len(call.initial)
    inner = _program(program, len(call.xs), len(call.constants), states)
    new = replace(
        call, xs=[*xs, valid, resets], constants=[*call.constants, *back], lengths=None, mask=None, resets=None,
        reset_to=None, on_masked="zero",
    )  # fmt: skip

    def finish(result: Result) -> Result:
        outputs = [torch.where(_wide(valid, y), y, torch.zeros_like(y)) for y in result.outputs]
        if call.on_masked == "repeat":
            held = _nearest(valid, call.reverse, missing=-1)
            outputs = [_repeated(y, held) for y in outputs]
        return Result(outputs, result.states, result.out_spec)

    return inner, new, finish


def _program(program: Program, xs: int, constants: int, states: int) -> Program:
    known = program.__dict__.setdefault("_masked", {})
    if (xs, constants, states) in known:
        return known[xs, constants, states]

    def run(x: Sequence[Tensor], c: Sequence[Tensor], prevs: Sequence[Tensor]) -> tuple[list, list]:
        valid, reset = x[xs], x[xs + 1]
        start = [torch.where(_row(reset, p), b, p) for p, b in zip(prevs, c[constants:])]
        outputs, nexts = program.run(list(x[:xs]), list(c[:constants]), [s.clone() for s in start])
        inner.out_spec = program.out_spec
        return outputs, [torch.where(_row(valid, n), n, p) for n, p in zip(nexts, prevs)]

    inner = replace(
        program, run=run, key=("masked", program.key), x_names=[*program.x_names, "mask", "resets"],
        constant_names=[*program.constant_names, *program.state_names],
        constant_batched=[*program.constant_batched, *[True] * states],
    )  # fmt: skip
    known[xs, constants, states] = inner
    return inner


def _nearest(valid: Tensor, reverse: bool, missing: int | None = None) -> Tensor:
    """(T, B) for each step the time of the row's last valid step so far in running order."""
    time = torch.arange(valid.shape[0], device=valid.device)[:, None].expand_as(valid)
    if reverse:
        later = torch.where(valid, time, valid.shape[0]).flip(0)
        found = torch.cummin(later, 0).values.flip(0) if len(valid) else later
        absent = found == valid.shape[0]
    else:
        earlier = torch.where(valid, time, -1)
        found = torch.cummax(earlier, 0).values if len(valid) else earlier
        absent = found < 0
    if missing is not None:
        return torch.where(absent, missing, found)
    return torch.where(absent, _any_valid(valid), found)


def _any_valid(valid: Tensor) -> Tensor:
    """(B,) one valid time of each row, 0 where it has none."""
    return valid.int().argmax(0) if len(valid) else valid.new_zeros(valid.shape[1], dtype=torch.long)


def _reread(x: Tensor, source: Tensor) -> Tensor:
    index = source.view(*source.shape, *[1] * (x.dim() - 2)).expand(x.shape)
    return x.gather(0, index)


def _never_nan(reread: Tensor, x: Tensor, valid: Tensor) -> Tensor:
    """A row without any valid step sees the x of another row: what stands in its own may be anything."""
    some = valid.any(0)
    if bool(some.all()) or not bool(some.any()):
        return reread if len(valid) and bool(some.any()) else torch.zeros_like(reread)
    step, row = valid.nonzero()[0].tolist()
    return torch.where(_wide(some, x[0]), reread, x[step, row].detach())


def _repeated(y: Tensor, held: Tensor) -> Tensor:
    return torch.where(_wide(held >= 0, y), _reread(y, held.clamp(min=0)), torch.zeros_like(y))


def _wide(mark: Tensor, value: Tensor) -> Tensor:
    return mark.view(*mark.shape, *[1] * (value.dim() - mark.dim()))


def _row(mark: Tensor, value: Tensor) -> Tensor:
    return mark.view(-1, *[1] * (value.dim() - 1))
