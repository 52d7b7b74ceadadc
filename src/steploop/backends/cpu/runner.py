"""Runs a native kernel: checks and lays out tensors, picks the tiles, calls.

The contract is that of the eager Runner: same arguments, same results.
"""

from __future__ import annotations

import ctypes
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
from . import checks, products, threads
from .build import begin
from .emit import Printer, canonical, prelude
from .emit_call import TAIL
from .emit_early import in_rows
from .fuse import Fused, fuse
from .language import Buffer, Dim, RowProgram
from .show import show

# Test-only: "cpu" builds kernels that are wrong on purpose; the oracle must notice.
BREAK = "STEPLOOP_TEST_BREAK"
FEW = 2  # rows and steps in all for which packing the weights does not pay
L2 = 1 << 20  # bytes of temporaries that a tile may have
CACHE = 1 << 20  # bytes of weights that stay in the cache of one core
PANEL = 64  # columns that a thread of a team takes at least
EARLY_ROWS = 24  # rows of a tile that are enough for a product to make good use of the weights
EARLY = 48  # rows that products of sequences are made for at a time where a tile has fewer
WAIT = 1 << 17  # bytes of weights whose products take longer than a meeting of the threads


class Runner(contract.Runner):
    """One compiled loop."""

    writes_into = True  # takes memory for kept values, see __call__
    reads_in_place = True  # takes sequences as the caller has them (`Unpacked`)
    _product: products.LongProduct | None = None

    def __init__(self, loop: LoopProgram, program: RowProgram, broken: bool = False):
        self.loop, self.program = loop, program
        self.stops = program.ends is not None  # by itself, where all rows have ended
        self.plan: Fused = fuse(program)
        broken = broken or os.environ.get(BREAK) == "cpu"
        printer = Printer(self.plan, broken)
        self.text = printer.text()
        self._canonical = canonical(self.text, printer.names)
        self._kernel: Any = None
        self._building: Future[ctypes.CDLL] | None = None
        self._eager: eager.Runner | None = None
        self._dtypes = list(dict.fromkeys(w.right.dtype for w in printer.weights))
        self.products: list[int] = []  # addresses of the libraries
        self._in_rows = [in_rows(b) for b in program.inputs]
        self._kept_in_rows = [in_rows(b) for b in program.kept]
        count = first_of_tail(program) + len(TAIL) + len(self._dtypes) + sum(self._in_rows) + sum(self._kept_in_rows)
        self._pointers = ctypes.c_void_p * count
        self._arrange = [_arrangement(i.rows, b) for i, b in zip(loop.inputs, program.inputs)]
        self._kept_rows = [rows_of(n) or Rows(0) for n in loop.kept]
        weights = [w.right for w in printer.weights if not w.early]  # those that every step reads
        self._weight_bytes = sum(_at_least(w.shape) * w.dtype.itemsize for w in weights)
        # Groups of columns, of which every thread of a team needs one to have any work.
        self._panels = max((-(-_at_least(w.shape[1:]) // PANEL) for w in weights), default=1)
        scratch = [*program.prevs, *program.nexts, *self.plan.shared]
        self._row_bytes = sum(_at_least(b.shape) * b.dtype.itemsize for b in scratch)

    def show(self) -> str:
        """One row's program, in the loop language."""
        return show(self.plan)

    def bind(self, kernel: Any) -> Runner:
        """Takes the C function built from `text`."""
        libraries = [products.library(dtype) for dtype in self._dtypes]
        self.products = [found.table for found in libraries]
        self._product = next((found.long for found in libraries if found.long is not None), None)
        kernel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        kernel.restype = None
        self._kernel = kernel
        return self

    def begin(self) -> Runner:
        """Starts building the kernel, together with the libraries that it needs."""
        for dtype in self._dtypes:
            products.under_way(dtype)
        self._building = begin(prelude() + "\n" + self._canonical)
        return self

    @property  # (an attribute that has to be worked out)
    def building(self) -> bool:  # type: ignore[override]
        return self._building is not None and not self._building.done()

    def settle(self) -> None:
        if self._building is None:
            return
        try:
            self.bind(self._building.result().steploop_run)
        except BuildError as error:
            if self.otherwise is None:
                raise
            self.otherwise(error)
        self._building = None

    @property
    def product(self) -> products.LongProduct | None:  # type: ignore[override]
        self.settle()
        return self._product

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
        kept = [
            self._empty(b, rows, total, sizes) if given_memory is None else given_memory
            for b, rows, given_memory in zip(self.program.kept, self._kept_rows, into)
        ]
        tables = (None, None) if full else _tables(schedule)
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

    def _call(
        self, held: list[Tensor | None], places: list[int | None], numbers: list[int], sizes: dict[str, int]
    ) -> None:
        fault = ctypes.c_int64(0)
        addresses = [None if t is None else t.data_ptr() or no_memory(t) for t in held]
        pointers = self._pointers(*addresses, ctypes.addressof(fault), *self.products, *places)
        self._kernel(pointers, (ctypes.c_int64 * len(numbers))(*numbers), threads.entry())
        if fault.value:
            raise checks.error(self.program.checks[fault.value - 1], sizes)

    def _numbers(self, span: Span, batch: int, full: bool, down: bool, sizes: dict[str, int]) -> list[int]:
        steps = span.stop - span.start
        count = torch.get_num_threads()
        team = count > 1 and self._as_team(batch, steps, count)
        count = min(count, self._panels) if team else count if batch > 1 else 1
        first = span.first if self.loop.batch is not None else span.start
        tile = self._tile(batch, 1 if team else count, full or team) if batch > 1 else 1
        symbols = [sizes[s] for s in self.program.symbols]
        pack = int(batch * steps > FEW)
        ahead = -(-steps // -(-steps * tile // EARLY)) if tile < EARLY_ROWS else 1
        return [batch, span.start, span.stop, int(down), tile, count, first, pack, int(team), ahead, *symbols]

    def _as_team(self, batch: int, steps: int, threads: int) -> bool:
        """Whether the threads share columns, so that each core reads its part of the weights only.

        Where every thread has rows enough, that pays for weights beyond a core's cache; else where a step's products
        take longer than the threads need to wait for each other.
        """
        return self._weight_bytes > (CACHE if batch >= threads else WAIT) and steps > 1

    def _tile(self, batch: int, count: int, full: bool) -> int:
        """Rows per tile: many, to share the weights; few enough that temporaries stay in the second cache."""
        even = -(-batch // count)
        fitting = max(6, L2 // max(self._row_bytes, 1))
        most = 64 if self._weight_bytes < (1 << 20) else 192
        pieces = -(-even // min(fitting, most))
        if not full:
            # rows end at different steps: smaller tiles share the work better
            pieces = max(pieces, min(4, even // 8))
        return max(1, -(-even // max(pieces, 1)))

    def _empty(self, buffer: Buffer, rows: Rows, total: int, sizes: dict[str, int]) -> Tensor:
        shape = self._shape(buffer, sizes)
        if self.loop.batch is None:
            return blocks.empty([total, *shape], buffer.dtype)
        if rows.dim == 0 and rows.outer == 1:
            shape[0] *= total
            return blocks.empty(shape, buffer.dtype)
        before, after = shape[: rows.dim], shape[rows.dim + 1 :]
        return blocks.empty([total, *before, rows.outer, rows.inner, *after], buffer.dtype)

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


def _tables(schedule: Any) -> tuple[Tensor, Tensor]:
    """The rows and first packed row of every step, as arrays; kept with the schedule."""
    found = getattr(schedule, "_native_tables", None)
    if found is None:
        found = tuple(torch.tensor(v, dtype=torch.int64) for v in (schedule.sizes, schedule.offsets))
        schedule._native_tables = found
    return found


def _at_least(shape: Sequence[Dim]) -> int:
    """Elements, with symbols counted as 64."""
    count = 1
    for size in shape:
        count *= size if isinstance(size, int) else 64
    return count
