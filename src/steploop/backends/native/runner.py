"""What runners of kernels share: how tensors are laid out for a kernel, and what it gives back.

The contract is that of the eager Runner: same arguments, same results.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from ...compiler import blocks
from ...compiler.ir.graph import LoopProgram, Rows, rows_of, size_at
from ...compiler.span import Span, Unpacked
from ...errors import BuildError, InputError, without_memory
from .. import contract, eager
from . import checks
from .emit import Printer, canonical
from .emit_early import in_rows
from .fuse import Fused, fuse
from .language import Buffer, RowProgram
from .show import show

# Test-only: the name of a backend whose kernels are built wrong on purpose; the oracle must notice.
BREAK = "STEPLOOP_TEST_BREAK"


class KernelRunner(contract.Runner):
    """One loop as a kernel. A backend says how it is built (`_building`) and called (`_numbers`, `_call`)."""

    backend = ""  # its name
    writes_into = True  # takes memory for kept values, see __call__
    reads_in_place = True  # takes sequences as the caller has them (`Unpacked`)

    def __init__(self, loop: LoopProgram, program: RowProgram, broken: bool = False):
        self.loop, self.program = loop, program
        self.stops = program.ends is not None  # by itself, where all rows have ended
        self.plan: Fused = fuse(program)
        self.printer = Printer(self.plan, broken or os.environ.get(BREAK) == self.backend)
        self.text = self.printer.text()
        self._canonical = canonical(self.text, self.printer.names)
        self._eager: eager.Runner | None = None
        self._dtypes = list(dict.fromkeys(w.right.dtype for w in self.printer.weights))
        self._in_rows = [in_rows(b) for b in program.inputs]
        self._kept_in_rows = [in_rows(b) for b in program.kept]
        self._arrange = [_arrangement(i.rows, b) for i, b in zip(loop.inputs, program.inputs)]
        self._kept_rows = [rows_of(n) or Rows(0) for n in loop.kept]
        self._kernel: Any = None
        self._building: Future[Any] | None = None

    def show(self) -> str:
        """One row's program, in the loop language."""
        return show(self.plan)

    @property  # (an attribute that has to be worked out)
    def building(self) -> bool:  # type: ignore[override]
        return self._building is not None and not self._building.done()

    def settle(self) -> None:
        if self._building is None:
            return
        try:
            self._take(self._building.result())
        except BuildError as error:
            if self.otherwise is None:
                raise
            self.otherwise(error)
        self._building = None

    def _take(self, built: Any) -> None:
        """What was built becomes what is called."""
        self._kernel = built

    def _numbers(self, span: Span, batch: int, full: bool, down: bool, sizes: dict[str, int]) -> list[int]:
        """The numbers of a call, see `emit`."""
        raise NotImplementedError

    def _call(
        self, held: list[Tensor | None], places: list[int | None], numbers: list[int], sizes: dict[str, int]
    ) -> None:
        """Calls the kernel. held: what its first pointers point to.  places: its last pointers, see `_laid_out`."""
        raise NotImplementedError

    def __call__(
        self,
        inputs: Sequence[Tensor],
        states: Sequence[Tensor],
        reset_to: Sequence[Tensor] | None,
        span: Span,
        down: bool,
        sizes: dict[str, int],
        into: Sequence[Tensor | Unpacked | None] | None = None,
    ) -> tuple[list[Tensor], list[Tensor | Unpacked]]:
        """See `eager.Runner`. into: contiguous memory for kept values, None where there is none; Unpacked: rows are
        written to where the caller has them (values with their rows in front)."""
        self.settle()
        schedule = span.schedule
        if schedule.members is not None or self._kernel is None or self.left_to_torch(sizes):
            if self._eager is None:
                self._eager = eager.Runner(self.loop)
            packed = [v.cut(span) if isinstance(v, Unpacked) else v for v in inputs]
            last, made = self._eager(packed, states, reset_to, span, down, sizes)
            return last, [m.put(span, k) if isinstance(m, Unpacked) else k for k, m in zip(made, into or made)]
        batched = self.loop.batch is not None
        batch = schedule.batch if batched else 1
        full = schedule.full or not batched
        total = span.total if batched else span.stop - span.start
        given, places = self._laid_out(inputs, span)
        before = [in_memory(s) for s in states]
        resets = schedule.resets if reset_to is not None else None
        back = before if resets is None or reset_to is None else [in_memory(r) for r in reset_to]
        after = [torch.empty_like(s) if full and total else s.clone() for s in before]
        into = into or [None] * len(self._kept_rows)
        device = span.schedule.device
        kept = [
            self._empty(b, rows, total, sizes, device) if given_memory is None else given_memory
            for b, rows, given_memory in zip(self.program.kept, self._kept_rows, into)
        ]
        tables = (None, None) if full else _tables(schedule, device)
        if batch and total:
            numbers = self._numbers(span, batch, full, down, sizes)
            memory = [k.values if isinstance(k, Unpacked) else k for k in kept]
            caller: Any = schedule.source
            source = [caller.data_ptr() if isinstance(k, Unpacked) else None for k in kept]
            places += [place for place, rows in zip(source, self._kept_in_rows) if rows]
            self._call([*given, *before, *back, *after, *memory, *tables, resets], places, numbers, sizes)
        return after, [k if isinstance(k, Unpacked) else self._shaped(k, r) for k, r in zip(kept, self._kept_rows)]

    def left_to_torch(self, sizes: dict[str, int]) -> bool:
        """Whether indices are taken into an axis without entries."""
        return bool(self.program.checks) and checks.any_empty(self.program.checks, sizes)

    def _laid_out(self, inputs: Sequence[Tensor | Unpacked], span: Span) -> tuple[list[Tensor], list[int | None]]:
        """The inputs as the kernel reads them; for each sequence of rows, the address of where its rows stand."""
        given: list[Tensor] = []
        places: list[int | None] = []
        for value, arrange, rows in zip(inputs, self._arrange, self._in_rows):
            place = None
            if isinstance(value, Unpacked):
                if rows and arrange is in_memory and value.values.is_contiguous() and not value.values.is_neg():
                    source: Any = span.schedule.source
                    value, place = value.values, source.data_ptr()
                else:
                    value = value.cut(span)
            given.append(value if place else arrange(value))
            places += [place] if rows else []
        return given, places

    def _empty(
        self, buffer: Buffer, rows: Rows, total: int, sizes: dict[str, int], device: torch.device | None = None
    ) -> Tensor:
        shape = self._shape(buffer, sizes)
        if self.loop.batch is None:
            return blocks.empty([total, *shape], buffer.dtype, device)
        if rows.dim == 0 and rows.outer == 1:
            shape[0] *= total
            return blocks.empty(shape, buffer.dtype, device)
        before, after = shape[: rows.dim], shape[rows.dim + 1 :]
        return blocks.empty([total, *before, rows.outer, rows.inner, *after], buffer.dtype, device)

    def _shape(self, buffer: Buffer, sizes: dict[str, int]) -> list[int]:
        """One row's shape."""
        return [size_at(n, sizes) for n in buffer.shape]

    def _shaped(self, value: Tensor, rows: Rows) -> Tensor:
        """The inverse of `_arrangement`."""
        if self.loop.batch is None or (rows.dim == 0 and rows.outer == 1):
            return value
        return value.movedim(0, rows.dim + 1).flatten(rows.dim, rows.dim + 2)


def first_of_tail(program: RowProgram) -> int:
    """How many pointers stand before those of TAIL."""
    return len(program.inputs) + 3 * len(program.prevs) + len(program.kept)


def in_memory(value: Tensor) -> Tensor:
    """The numbers of a tensor one after the other. (A tensor may be marked as the negative of what it holds.)"""
    return value.contiguous().resolve_neg()


def addresses(held: Sequence[Tensor | None]) -> list[int | None]:
    return [None if t is None else t.data_ptr() or no_memory(t) for t in held]


def no_memory(value: Tensor) -> int:
    """0, for an address that is null: right for a tensor without numbers, and no others."""
    if value.numel():
        raise InputError(without_memory(value))
    return 0


def _arrangement(rows: Rows | None, buffer: Buffer) -> Callable[[Tensor], Tensor]:
    """Lays out an input as the kernel wants it: rows first, each row's numbers together."""
    order = buffer.order
    if order is not None:
        return lambda value: in_memory(value.permute(order))
    if rows is None or (rows.dim == 0 and rows.outer == 1):
        return in_memory

    def move(value: Tensor) -> Tensor:
        if rows.inner == 0:
            return value  # no numbers at all
        wide = value.unflatten(rows.dim, (rows.outer, -1, rows.inner))
        return in_memory(wide.movedim(rows.dim + 1, 0))

    return move


def _tables(schedule: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows and first packed row of every step, as arrays; kept with the schedule."""
    found = getattr(schedule, "_native_tables", None)
    if found is None:
        found = tuple(torch.tensor(v, dtype=torch.int64, device=device) for v in (schedule.sizes, schedule.offsets))
        schedule._native_tables = found
    return found


