"""Runs a native kernel on the CPU: picks the tiles, calls."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ...compiler.ir.graph import LoopProgram
from ...compiler.span import Span
from ..native import checks
from ..native.emit_call import TAIL
from ..native.language import RowProgram, at_least
from ..native.runner import KernelRunner, addresses, first_of_tail
from . import products, threads
from .build import begin
from .headers import whole

FEW = 2  # rows and steps in all for which packing the weights does not pay
L2 = 1 << 20  # bytes of temporaries that a tile may have
CACHE = 1 << 20  # bytes of weights that stay in the cache of one core
PANEL = 64  # columns that a thread of a team takes at least
EARLY_ROWS = 24  # rows of a tile that are enough for a product to make good use of the weights
EARLY = 48  # rows that products of sequences are made for at a time where a tile has fewer
WAIT = 1 << 17  # bytes of weights whose products take longer than a meeting of the threads


class Runner(KernelRunner):
    """One compiled loop."""

    backend = "cpu"
    _product: products.LongProduct | None = None

    def __init__(self, loop: LoopProgram, program: RowProgram, broken: bool = False):
        super().__init__(loop, program, broken)
        self.products: list[int] = []  # addresses of the libraries
        count = first_of_tail(program) + len(TAIL) + len(self._dtypes) + sum(self._in_rows) + sum(self._kept_in_rows)
        self._pointers = ctypes.c_void_p * count
        weights = [w.right for w in self.printer.weights if not w.early]  # those that every step reads
        self._weight_bytes = sum(at_least(w.shape) * w.dtype.itemsize for w in weights)
        # Groups of columns, of which every thread of a team needs one to have any work.
        self._panels = max((-(-at_least(w.shape[1:]) // PANEL) for w in weights), default=1)
        scratch = [*program.prevs, *program.nexts, *self.plan.shared]
        self._row_bytes = sum(at_least(b.shape) * b.dtype.itemsize for b in scratch)

    def bind(self, kernel: Any) -> Runner:
        """Takes the C function built from `text`."""
        libraries = [products.library(dtype) for dtype in self._dtypes]
        self.products = [found.table for found in libraries]
        self._product = next((found.long for found in libraries if found.long is not None), None)
        kernel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        kernel.restype = None
        self._kernel = kernel
        return self

    def _take(self, built: ctypes.CDLL) -> None:
        self.bind(built.steploop_run)

    def begin(self) -> Runner:
        """Starts building the kernel, together with the libraries that it needs."""
        for dtype in self._dtypes:
            products.under_way(dtype)
        self._building = begin(whole(self._canonical))
        return self

    @property
    def product(self) -> products.LongProduct | None:  # type: ignore[override]
        self.settle()
        return self._product

    def _call(
        self, held: list[Tensor | None], places: list[int | None], numbers: list[int], sizes: dict[str, int]
    ) -> None:
        fault = ctypes.c_int64(0)
        pointers = self._pointers(*addresses(held), ctypes.addressof(fault), *self.products, *places)
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
