"""Whether the rows of a step see each other: a trial with numbers, where a graph can't tell.

A step that was captured for one number of rows has no batch axis that an analysis could follow. The plain loop runs it
on the rows that take part in a step, if it runs on fewer at all. That gives what all rows together give only where no
row sees another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .program import Call, Program


def rows_see_each_other(program: Program, call: Call) -> bool:
    """Whether a step gives its rows something else when it runs on fewer of them. False where it can't, or draws."""
    batch = call.batch or 0
    if batch < 2 or not call.steps:
        return False
    with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        given = [*(x[0] for x in call.xs), *call.constants, *call.initial]
        begun = [_another(value) for value in given]
        batched = [True] * len(call.xs) + list(program.constant_batched) + [True] * len(call.initial)
        everyone = torch.arange(batch, device="cpu")
        try:
            whole, again = _run(program, call, begun), _run(program, call, begun)
            if not _same(whole, again, everyone):
                return False  # it draws
            for rows in (everyone[:-1], everyone[1:]):
                some = [v.index_select(0, rows.to(v.device)) if b else v for v, b in zip(begun, batched)]
                if not _same(whole, _run(program, call, some), rows):
                    return True
        except Exception:
            return False
    return False


def _another(value: Tensor) -> Tensor:
    """Random numbers in the place of floats: states are often zero at first, and rows may be equal."""
    return torch.rand_like(value).add_(0.5) if value.is_floating_point() else value.clone()


def _run(program: Program, call: Call, values: Sequence[Tensor]) -> list[Tensor]:
    x, c = len(call.xs), len(call.constants)
    given = [v.clone() for v in values]
    outputs, nexts = program.run(given[:x], given[x : x + c], given[x + c :])
    return [*outputs, *nexts]


def _same(whole: Sequence[Tensor], some: Sequence[Tensor], rows: Tensor) -> bool:
    for all_rows, few in zip(whole, some):
        wanted = all_rows.index_select(0, rows.to(all_rows.device))
        if wanted.shape != few.shape:
            return False
        if not torch.allclose(wanted.double(), few.double(), rtol=1e-3, atol=1e-5, equal_nan=True):
            return False
    return True
