"""A native loop prepared to run single steps: everything that does not change between them is laid out once."""

from __future__ import annotations

import array
import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..native import checks
from ..native.emit_call import NUMBERS, TAIL
from ..native.runner import first_of_tail, in_memory, no_memory
from . import comparing, threads
from .runner import Runner

try:
    from torch._C._dynamo.guards import (  # type: ignore[attr-defined]
        _empty_strided_cpu as empty_strided,  # a third of a microsecond less
    )
except ImportError:
    empty_strided = None


class Stepper:
    """Runs one step of a loop for `batch` rows.

    xs:      for each tensor that a step is given, its place among the loop's inputs, -1 where it has none; the
             other inputs are `constants` (None at those places).
    states:  for each state that a step is given, its place among the loop's states.
    outputs: the loop's kept values that are wanted, in order.

    run(xs, states, mask, resets, back) -> (outputs, states), each with the rows in front. mask, resets: (B,) bool in
    memory, or None. back: what resets put states back to. A row that `mask` leaves out keeps its states, and its
    outputs are zero. None if something was indexed that is not there and `mask` is given: such a row may have done it.

    It has two sets of memory for states and reads one while it writes the other. A list that it returns is its own as
    long as the caller gives that same list back and shows what is in it to nobody. Given another list, it leaves both
    sets to whoever has them, and makes two new ones.
    """

    def __init__(
        self, runner: Runner, constants: Sequence[Tensor | None], xs: Sequence[int], states: Sequence[int],
        outputs: Sequence[int], batch: int, sizes: dict[str, int],
    ):  # fmt: skip
        self._given = runner, xs, states, outputs, batch, sizes
        program = runner.program
        self._arrange = runner._arrange
        self._numbers = _numbers(runner, batch, sizes)
        self._checks, self._sizes = program.checks, sizes
        self._fault = array.array("q", [0])  # the number of a check that failed
        self._first, self._count = len(program.inputs), len(program.prevs)
        last = array.array("Q", [self._fault.buffer_info()[0], *runner.products])
        at = first_of_tail(program) + TAIL.index("fault")
        self._like = [
            torch.empty(batch, *runner._shape(b, sizes)[1:], dtype=b.dtype, device="cpu") for b in program.prevs
        ]
        kept = [runner._empty(b, rows, batch, sizes) for b, rows in zip(program.kept, runner._kept_rows)]
        # Rows to put back: the wanted outputs, then the states.
        to_put = [0, 0, 0] * (len(outputs) + self._count)
        to_put[2::3] = [_row_bytes(t, batch) for t in (*(kept[i] for i in outputs), *self._like)]
        # From others' states into the first set, from the first into the second, from that into the first.
        self._tables = [_Table(len(runner._pointers()), to_put, len(outputs)) for _ in range(3)]
        for table in self._tables:
            table.pointers[at : at + len(last)] = last
        self.set_constants(constants)
        self._states = states
        self._own: list[list[Tensor]] = [[], []]
        self.run = self._written(runner, xs, states, outputs, kept)

    def fork(self) -> Stepper:
        """Another for the same loop, with memory of its own."""
        runner, xs, states, outputs, batch, sizes = self._given
        return Stepper(runner, self._constants, xs, states, outputs, batch, sizes)

    def set_constants(self, constants: Sequence[Tensor | None]) -> None:
        """Takes the values that do not change from step to step, again when one of them has changed."""
        self._constants = constants
        self.held = self.arranged(constants)
        for i, value in enumerate(self.held):
            if value is not None:
                for table in self._tables:
                    table.pointers[i] = value.data_ptr() or no_memory(value)

    def arranged(self, constants: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The values that do not change, as they lie in memory for the kernel."""
        return [None if c is None else arrange(c) for c, arrange in zip(constants, self._arrange)]

    def _take(self, states: Sequence[Tensor]) -> _Table:
        """Two new sets of memory, and the table for a step from these states into the first."""
        place_of = self._states
        first, second = ([torch.empty_like(self._like[place]) for place in place_of] for _ in range(2))
        self._own[:] = first, second
        self._others = [in_memory(s) for s in states]
        for table, before, after in zip(self._tables, (self._others, first, second), (first, second, first)):
            table.results = after
            for place, old, new in zip(place_of, before, after):
                table.between(self._first + place, self._count, place, old, new)
        return self._tables[0]

    def _written(
        self, runner: Runner, xs: Sequence[int], states: Sequence[int], outputs: Sequence[int], kept: Sequence[Tensor]
    ) -> Callable[..., Any]:
        """The step as straight Python, which the interpreter runs in half the time of loops over lists."""
        known: dict[str, Any] = {
            "kernel": runner._kernel, "entry": threads.entry, "own": self._own, "take": self._take,
            "tables": self._tables, "torch": torch, "numbers": ctypes.addressof(self._numbers),
            "none": no_memory, "put_back": comparing.putting_back(),
        }  # fmt: skip
        first, count = self._first, self._count
        resets = first_of_tail(runner.program) + TAIL.index("resets")
        lines = [f"{', '.join(f'x{i}' for i in range(len(xs)))}, = xs"] if xs else []
        lines += ["table = tables[1] if states is own[0] else tables[2] if states is own[1] else take(states)"]
        lines += ["pointers = table.pointers"]
        for i, place in enumerate(xs):
            if place >= 0:
                known[f"arrange{i}"] = arrange = self._arrange[place]
                inline = f"x{i}.contiguous().resolve_neg()" if arrange is in_memory else f"arrange{i}(x{i})"
                lines += [f"x{i} = {inline}", f"pointers[{place}] = x{i}.data_ptr() or none(x{i})"]
        for i, like in enumerate(kept):
            if i in outputs:
                known[f"new_k{i}"], text = _maker(like)
                lines += [f"k{i} = new_k{i}({text})", f"pointers[{first + 3 * count + i}] = k{i}.data_ptr()"]
            else:  # nobody gets it: the same memory at every step
                for table in self._tables:
                    table.pointers[first + 3 * count + i] = like.data_ptr()
                known[f"k{i}"] = like
        threaded = self._numbers[NUMBERS.index("threads")] > 1
        run = f"kernel(table.at, numbers, {'entry()' if threaded else '0'})"
        lines += ["if resets is None:", f"    {run}", "else:", f"    pointers[{resets}] = resets.data_ptr()"]
        lines += [f"    {', '.join(f'r{i}' for i in range(len(states)))}, = back"] if states else []
        for i, place in enumerate(states):
            lines += [f"    r{i} = r{i}.contiguous().resolve_neg()"]
            lines += [f"    pointers[{first + count + place}] = r{i}.data_ptr() or none(r{i})"]
        lines += [f"    {run}", f"    pointers[{resets}] = 0"]
        if self._checks:
            known.update(fault=self._fault, failed=self._failed)
            lines += ["if fault[0]:", "    if mask is None: raise failed()", "    fault[0] = 0", "    return None"]
        lines += ["if mask is not None:"]
        lines += [f"    table.to_put[{3 * at}] = k{i}.data_ptr()" for at, i in enumerate(outputs)]
        lines += ["    put_back(mask.data_ptr(), mask.shape[0], table.to_put_at, table.to_put_count)"]
        lines.append(f"return [{', '.join(f'k{i}' for i in outputs)}], table.results")
        exec(_compiled("\n    ".join(["def step(xs, states, mask=None, resets=None, back=None):", *lines])), known)
        return known["step"]

    def _failed(self) -> Exception:
        check = self._checks[self._fault[0] - 1]
        self._fault[0] = 0
        return checks.error(check, self._sizes)


class _Table:
    """What a kernel is given, and the rows to put back after it: three words each, see kernels/compare.cpp."""

    def __init__(self, pointers: int, to_put: Sequence[int], outputs: int):
        self.pointers = array.array("Q", [0] * pointers)
        self.at = self.pointers.buffer_info()[0]
        self.to_put = array.array("Q", to_put)
        self.to_put_at, self.to_put_count = self.to_put.buffer_info()[0], len(to_put) // 3
        self._outputs = outputs
        self.results: list[Tensor] = []

    def between(self, pointer: int, count: int, place: int, old: Tensor, new: Tensor) -> None:
        """A state goes from one memory to another. pointer: that of its old value; `count` further on stands the place
        for what it is reset to, which must hold something where nothing is reset, then that of its new value."""
        before = old.data_ptr() or no_memory(old)
        self.pointers[pointer] = self.pointers[pointer + count] = before
        self.pointers[pointer + 2 * count] = after = new.data_ptr()
        at = 3 * (self._outputs + place)
        self.to_put[at], self.to_put[at + 1] = after, before


def _row_bytes(tensor: Tensor, batch: int) -> int:
    return tensor.numel() * tensor.element_size() // max(batch, 1)


@functools.lru_cache(maxsize=256)
def _compiled(text: str) -> Any:
    return compile(text, "<steploop stream>", "exec")


def _maker(like: Tensor) -> tuple[Callable[..., Tensor], str]:
    """What makes an empty tensor like this one, and with which arguments, as text."""
    if empty_strided is None:
        return (lambda: torch.empty_like(like)), ""
    return empty_strided, f"{tuple(like.shape)}, {like.stride()}, {like.dtype}"


def _numbers(runner: Runner, batch: int, sizes: dict[str, int]) -> Any:
    from ...compiler.schedule import make_schedule
    from ...compiler.span import Span

    span = Span(make_schedule(1, batch, torch.device("cpu")), 0, 1)
    numbers = runner._numbers(span, batch, True, False, sizes)
    return (ctypes.c_int64 * len(numbers))(*numbers)
