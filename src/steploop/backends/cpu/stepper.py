"""A native loop prepared to run single steps: everything that does not change between them is laid out once."""

from __future__ import annotations

import array
import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, threads
from .emit import NUMBERS, TAIL
from .runner import Runner, first_of_tail, in_memory, no_memory

try:
    from torch._C._dynamo.guards import _empty_strided_cpu as empty_strided  # a third of a microsecond less
except ImportError:
    empty_strided = None


class Stepper:
    """Runs one step of a loop for `batch` rows.

    xs:      for each tensor that a step is given, its place among the loop's inputs, -1 where it has none; the
             other inputs are `constants` (None at those places).
    states:  for each state that a step is given, its place among the loop's states.
    outputs: the loop's kept values that are wanted, in order.

    run(xs, states) -> (outputs, states), each with the rows in front.
    """

    def __init__(
        self, runner: Runner, constants: Sequence[Tensor | None], xs: Sequence[int], states: Sequence[int],
        outputs: Sequence[int], batch: int, sizes: dict[str, int],
    ):  # fmt: skip
        program = runner.program
        self._arrange = runner._arrange
        self._pointers = array.array("Q", [0] * len(runner._pointers()))
        self._numbers = _numbers(runner, batch, sizes)
        self._checks, self._sizes = program.checks, sizes
        self._fault = array.array("q", [0])  # the number of a check that failed
        last = [self._fault.buffer_info()[0], *runner.products]
        at = first_of_tail(program) + TAIL.index("fault")
        self._pointers[at : at + len(last)] = array.array("Q", last)
        self.set_constants(constants)
        kept = [runner._empty(b, rows, batch, sizes) for b, rows in zip(program.kept, runner._kept_rows)]
        nexts = [torch.empty(batch, *runner._shape(b, sizes)[1:], dtype=b.dtype, device="cpu") for b in program.prevs]
        self.run = self._written(runner, xs, states, outputs, nexts, kept)

    def set_constants(self, constants: Sequence[Tensor | None]) -> None:
        """Takes the values that do not change from step to step, again when one of them has changed."""
        self.held = [None if c is None else arrange(c) for c, arrange in zip(constants, self._arrange)]
        for i, value in enumerate(self.held):
            if value is not None:
                self._pointers[i] = value.data_ptr() or no_memory(value) or 0

    def _written(
        self, runner: Runner, xs: Sequence[int], states: Sequence[int], outputs: Sequence[int],
        nexts: Sequence[Tensor], kept: Sequence[Tensor],
    ) -> Callable[..., Any]:  # fmt: skip
        """The step as straight Python, which the interpreter runs in half the time of loops over lists."""
        known: dict[str, Any] = {
            "kernel": runner._kernel, "pointers": self._pointers, "entry": threads.entry,
            "torch": torch, "at": self._pointers.buffer_info()[0], "numbers": ctypes.addressof(self._numbers),
            "none": lambda tensor: no_memory(tensor) or 0,
        }  # fmt: skip
        first, count = len(runner.program.inputs), len(runner.program.prevs)
        lines = [f"{', '.join(f'x{i}' for i in range(len(xs)))}, = xs"] if xs else []
        lines += [f"{', '.join(f's{i}' for i in range(len(states)))}, = states"] if states else []
        for i, place in enumerate(xs):
            if place >= 0:
                known[f"arrange{i}"] = arrange = self._arrange[place]
                inline = f"x{i}.contiguous().resolve_neg()" if arrange is in_memory else f"arrange{i}(x{i})"
                lines += [f"x{i} = {inline}", f"pointers[{place}] = x{i}.data_ptr() or none(x{i})"]
        for i, place in enumerate(states):
            # Nothing resets here; the place for the states to go back to must hold something, though.
            here = f"pointers[{first + place}] = pointers[{first + count + place}]"
            lines += [f"s{i} = s{i}.contiguous().resolve_neg()", f"{here} = s{i}.data_ptr() or none(s{i})"]
        for name, values, start in (("a", nexts, first + 2 * count), ("k", kept, first + 3 * count)):
            for i, like in enumerate(values):
                known[f"new_{name}{i}"], text = _maker(like)
                lines += [f"{name}{i} = new_{name}{i}({text})", f"pointers[{start + i}] = {name}{i}.data_ptr()"]
        threaded = self._numbers[NUMBERS.index("threads")] > 1
        lines.append(f"kernel(at, numbers, {'entry()' if threaded else '0'})")
        if self._checks:
            known.update(fault=self._fault, failed=self._failed)
            lines.append("if fault[0]: raise failed()")
        lines.append(f"return [{', '.join(f'k{i}' for i in outputs)}], [{', '.join(f'a{i}' for i in states)}]")
        exec("def step(xs, states):\n    " + "\n    ".join(lines), known)
        return known["step"]

    def _failed(self) -> Exception:
        check = self._checks[self._fault[0] - 1]
        self._fault[0] = 0
        return checks.error(check, self._sizes)


def _maker(like: Tensor) -> tuple[Callable[..., Tensor], str]:
    """What makes an empty tensor like this one, and with which arguments, as text."""
    if empty_strided is None:
        return (lambda: torch.empty_like(like)), ""
    return empty_strided, f"{tuple(like.shape)}, {like.stride()}, {like.dtype}"


def _numbers(runner: Runner, batch: int, sizes: dict[str, int]) -> Any:
    from ...compiler.schedule import Span, make_schedule

    span = Span(make_schedule(1, batch, torch.device("cpu")), 0, 1)
    numbers = runner._numbers(span, batch, True, False, sizes)
    return (ctypes.c_int64 * len(numbers))(*numbers)
