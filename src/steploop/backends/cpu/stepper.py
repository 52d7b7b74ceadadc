"""A native loop prepared to run single steps: everything that does not change between them is laid out once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from . import threads
from .runner import Runner


class Stepper:
    """Runs one step of a loop for `batch` rows.

    positions: for each given tensor of a step, its place among the loop's inputs; the others are `constants`
    (None at those places).
    """

    def __init__(
        self, runner: Runner, constants: Sequence[Tensor | None], positions: Sequence[int], batch: int,
        sizes: dict[str, int],
    ):  # fmt: skip
        program = runner.program
        self._kernel, self._positions = runner._kernel, list(positions)
        self._arrange = runner._arrange
        count = len(program.inputs)
        self._first_state = count
        self._states = len(program.prevs)
        kept = [runner._empty(b, rows, batch, sizes) for b, rows in zip(program.kept, runner._kept_rows)]
        self._like_kept = kept
        self._first_after = count + 2 * self._states
        self._first_kept = count + 3 * self._states
        self._pointers = runner._pointers()
        numbers = _numbers(runner, batch, sizes)
        self._numbers = (ctypes.c_int64 * len(numbers))(*numbers)
        self.set_constants(constants)

    def set_constants(self, constants: Sequence[Tensor | None]) -> None:
        """Takes the values that do not change from step to step, again when one of them has changed."""
        self._held = [None if c is None else arrange(c) for c, arrange in zip(constants, self._arrange)]
        for i, value in enumerate(self._held):
            if value is not None:
                self._pointers[i] = value.data_ptr()

    def __call__(
        self, given: Sequence[Tensor], states: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(states after the step, kept values), each with the rows in front."""
        pointers = self._pointers
        alive = []
        for position, value in zip(self._positions, given):
            value = self._arrange[position](value)
            alive.append(value)
            pointers[position] = value.data_ptr()
        at = self._first_state
        after = []
        for i, state in enumerate(states):
            state = state.contiguous()
            alive.append(state)
            result = torch.empty_like(state)
            after.append(result)
            address = state.data_ptr()
            pointers[at + i] = address
            pointers[at + self._states + i] = address
            pointers[self._first_after + i] = result.data_ptr()
        kept = []
        for i, like in enumerate(self._like_kept):
            value = torch.empty_like(like)
            kept.append(value)
            pointers[self._first_kept + i] = value.data_ptr()
        self._kernel(pointers, self._numbers, threads.entry())
        return after, kept


def _numbers(runner: Runner, batch: int, sizes: dict[str, int]) -> list[int]:
    from ...compiler.schedule import Span, make_schedule

    span = Span(make_schedule(1, batch, torch.device("cpu")), 0, 1)
    return runner._numbers(span, batch, True, False, sizes)
