"""Runs a kernel on a GPU: chooses how it is launched, brings the memory for its temporaries, launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...compiler.ir.graph import LoopProgram, size_at
from ...compiler.span import Span
from ...errors import BuildError
from ..native import checks
from ..native.emit_call import NUMBERS
from ..native.language import RowProgram
from ..native.runner import KernelRunner, addresses
from . import ways
from .machine import Machine


class Runner(KernelRunner):
    """One compiled loop."""

    backend = "cuda"

    def __init__(self, loop: LoopProgram, program: RowProgram, machine: Machine, broken: bool = False):
        super().__init__(loop, program, broken)
        self.machine = machine
        self._device = device_of(loop)
        self._weights = [w.right for w in self.printer.weights if not w.early]
        self._groups = sum(bool(phase.products) for phase in self.plan.phases)

    def begin(self) -> Runner:
        self._building = self.machine.begin(self._canonical, self._device)
        return self

    @property
    def launched(self) -> str:  # type: ignore[override]
        """In words, for 1 to 1024 rows. Sizes that only a call knows are taken for 64."""
        sizes = dict.fromkeys(self.program.symbols, 64)
        words, before = "", ""
        for rows in (1, 4, 16, 64, 256, 1024):
            now = "as a grid" if self.way(rows, sizes).together else "by blocks"
            words += "" if now == before else f", {now} from {rows} rows on" if before else now
            before = now
        return words

    def way(self, batch: int, sizes: dict[str, int]) -> ways.Way:
        """How it runs so many rows."""
        shapes = [([size_at(n, sizes) for n in w.shape], w.dtype.itemsize) for w in self._weights]
        work = ways.Work(tuple((k, n, size) for (k, n), size in shapes), self._groups)
        device = self._device
        return ways.best(work, batch, self.machine.processors(device), self.machine.near(device))

    def _numbers(self, span: Span, batch: int, full: bool, down: bool, sizes: dict[str, int]) -> list[int]:
        way = self.way(batch, sizes)
        first = span.first if self.loop.batch is not None else span.start
        symbols = [sizes[s] for s in self.program.symbols]
        warps = self.machine.warps * (way.blocks if way.together else 1)
        return [batch, span.start, span.stop, int(down), way.rows, warps, first, 0, int(way.together), 1, *symbols]

    def _call(
        self, held: list[Tensor | None], places: list[int | None], numbers: list[int], sizes: dict[str, int]
    ) -> None:
        of = dict(zip(NUMBERS, numbers))
        way = self.way(of["batch"], sizes)
        most = self._kernel.most_blocks(way.near)
        if most < way.blocks and way.together:
            raise BuildError(f"a grid of {way.blocks} blocks does not fit on the device, where {most} run at once")
        size = self.printer.scratch.bytes(way.rows, of["threads"], of["ahead"], sizes)
        device = next((t.device for t in held if t is not None), self._device)
        memory = torch.empty(size * way.teams, dtype=torch.uint8, device=device)
        barrier = torch.zeros(2, dtype=torch.int32, device=device)
        fault = torch.zeros(1, dtype=torch.int64, device=device) if self.program.checks else None
        # As `Call.take` reads them: `held` ends with all of TAIL but its last, the fault.
        pointers = [*addresses(held), None if fault is None else fault.data_ptr(), *[0 for _ in self._dtypes], *places]
        self._kernel.launch([*(p or 0 for p in pointers), *numbers], memory, barrier, way)
        if fault is not None and (found := int(fault)):  # (this waits for the kernel)
            raise checks.error(self.program.checks[found - 1], sizes)


def device_of(loop: LoopProgram) -> torch.device:
    """Where a loop's tensors are."""
    nodes = (*loop.prevs, *(i.node for i in loop.inputs))
    found: Any = next((n.meta["val"].device for n in nodes if isinstance(n.meta.get("val"), Tensor)), None)
    return found or torch.device("cpu")
