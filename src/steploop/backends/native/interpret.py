"""What the loop language means: statements one after the other, in plain torch, on all rows at once.

`Interpreter` has the contract of the Runners. It is slow and short; the property tests hold it, and the
compiled kernels, against torch on many graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from ...compiler.ir.graph import LoopProgram, Rows, rows_of, size_at
from ...compiler.span import Span
from .fuse import Fused
from .language import Buffer, Const, Dim, Expr, Iota, Load, Product, Reduce, Routine, Scan, Scatter, Statement
from .ops_largest import meaning as _largest_places
from .ops_linalg import MEANINGS as _LINALG
from .scalars import SCALARS

_REDUCE = {
    "sum": lambda x: x.sum(-1, dtype=x.dtype), "prod": lambda x: x.prod(-1, dtype=x.dtype),
    "amax": lambda x: x.amax(-1), "amin": lambda x: x.amin(-1), "any": lambda x: x.any(-1),
    "all": lambda x: x.all(-1),
    "argmax": lambda x: x.argmax(-1), "argmin": lambda x: x.argmin(-1),
}  # fmt: skip
_ROUTINES: dict[str, Callable[..., Tensor]] = {**_LINALG, "largest_places": _largest_places}
_SCAN = {"sum": torch.cumsum, "prod": torch.cumprod}


class Interpreter:
    def __init__(self, loop: LoopProgram, plan: Fused):
        self.loop, self.program = loop, plan.program
        self.statements: list[Statement] = [*plan.early]
        for phase in plan.phases:
            self.statements += phase.products
            for nest in phase.nests:
                self.statements += nest.statements

    def __call__(
        self,
        inputs: Sequence[Tensor],
        states: Sequence[Tensor],
        reset_to: Sequence[Tensor] | None,
        span: Span,
        down: bool,
        sizes: dict[str, int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See `eager.Runner`; for schedules without `members` and batches along axis 0."""
        schedule = span.schedule
        states = [s.clone() for s in states]
        back: Any = reset_to
        kept: list[list[Tensor]] = [[] for _ in self.program.kept]
        steps = range(span.start, span.stop)
        for p in reversed(steps) if down else steps:
            rows = schedule.sizes[p]
            at = schedule.offsets[p] - span.first
            flags = None
            if schedule.resets is not None and reset_to is not None:
                flags = schedule.resets[schedule.offsets[p] : schedule.offsets[p] + rows]
            if flags is not None and not down:
                _reset(states, back, flags)
            memory = self._memory(inputs, states, rows, at)
            one = StepOfRows(memory, rows, sizes)
            for statement in self.statements:
                one.run(statement)
            for state, after in zip(states, self.program.nexts):
                if after in memory:
                    state[:rows] = memory[after].view(rows, *state.shape[1:])
            if flags is not None and down:
                _reset(states, back, flags)
            for found, buffer in zip(kept, self.program.kept):
                found.append(memory[buffer])
        return states, [self._join(k, b, down, sizes) for k, b in zip(kept, self.program.kept)]

    def _memory(
        self, inputs: Sequence[Tensor], states: list[Tensor], rows: int, at: int
    ) -> dict[Buffer, Tensor]:
        """Every buffer as (rows, numbers of one row); (1, numbers) where all rows share it."""
        memory = {}
        for buffer, value, item in zip(self.program.inputs, inputs, self.loop.inputs):
            assert item.rows in (None, Rows(0))
            if item.kind == "step":
                value = value[at : at + rows] if buffer.rows else value[at]
            elif buffer.rows:
                value = value[:rows]
            if buffer.order is not None:
                value = value.permute(buffer.order)
            memory[buffer] = value.reshape(rows if buffer.rows else 1, -1)
        for buffer, state in zip(self.program.prevs, states):
            memory[buffer] = state[:rows].reshape(rows, -1).clone()
        return memory

    def _join(self, values: list[Tensor], buffer: Buffer, down: bool, sizes: dict[str, int]) -> Tensor:
        node = self.loop.kept[buffer.index]
        assert (rows_of(node) or Rows(0)) == Rows(0)
        shape = [size_at(n, sizes) for n in buffer.shape]
        values = values[::-1] if down else values
        flat = (
            torch.cat(values) if values else torch.empty(0, size_at(buffer.numel, sizes), dtype=buffer.dtype)
        )
        return flat.reshape(-1, *shape[1:])


class StepOfRows:
    """One step of all running rows."""

    def __init__(self, memory: dict[Buffer, Tensor], rows: int, sizes: dict[str, int]):
        self.memory, self.rows, self.sizes = memory, rows, sizes

    def run(self, statement: Statement) -> None:
        if isinstance(statement, Scatter):
            self._scatter(statement)
            return
        self._write(statement.target, self._result(statement))

    def _result(self, statement: Statement) -> Tensor:
        if isinstance(statement, Product):
            return self.value(statement.left) @ self.value(statement.right)
        if isinstance(statement, Routine):
            operands = (self.value(o) for o in statement.operands)
            return _ROUTINES[statement.name](*operands, *statement.options)
        value = self.value(statement.value).expand(self.rows, *self._shape(statement.value.shape))
        if isinstance(statement, Reduce):
            outer = value.dim() - statement.axes
            flat = value.reshape(*value.shape[:outer], -1)
            return _REDUCE[statement.kind](flat)
        if isinstance(statement, Scan):
            return _SCAN[statement.kind](value, -1, dtype=value.dtype)
        return value

    def value(self, expr: Expr) -> Tensor:
        """(rows or 1, *shape)"""
        if isinstance(expr, Const):
            value = expr.value if not isinstance(expr.value, sympy.Basic) else size_at(expr.value, self.sizes)
            return torch.full((1, *self._shape(expr.shape)), value, dtype=expr.dtype)
        if isinstance(expr, Iota):
            return self._address(expr)[None]
        if isinstance(expr, Load):
            return self._read(expr)
        args = [self.value(a) for a in expr.args]
        return (
            args[0].to(expr.dtype)
            if expr.name == "cast"
            else SCALARS[expr.name].meaning(*args).to(expr.dtype)
        )

    def _shape(self, shape: tuple[Dim, ...]) -> list[int]:
        return [size_at(n, self.sizes) for n in shape]

    def _address(self, place: Load | Iota) -> Tensor:
        """offset + sum(index * stride), of the place's shape."""
        shape = self._shape(place.shape)
        address = torch.full(shape, size_at(place.offset, self.sizes), dtype=torch.int64)
        for axis, (size, stride) in enumerate(zip(shape, place.strides)):
            steps = torch.arange(size) * size_at(stride, self.sizes)
            address = address + steps.view(-1, *[1] * (len(shape) - axis - 1))
        return address

    def _places(self, load: Load) -> Tensor:
        """(rows or 1, *shape): the element of the row that each index means."""
        address = self._address(load)[None]
        for index, step in load.at:
            address = address + self.value(index) * size_at(step, self.sizes)
        return address

    def _read(self, load: Load) -> Tensor:
        buffer = self.memory[load.buffer]
        places = self._places(load)
        if places.shape[0] == 1:
            return buffer[:, places[0]]
        rows = torch.arange(places.shape[0]).view(-1, *[1] * (places.dim() - 1))
        return buffer[rows if buffer.shape[0] > 1 else torch.zeros_like(rows), places]

    def _storage(self, buffer: Buffer) -> Tensor:
        if buffer not in self.memory:
            count = size_at(buffer.numel, self.sizes)
            self.memory[buffer] = torch.zeros(self.rows, count, dtype=buffer.dtype)
        return self.memory[buffer]

    def _write(self, target: Load, value: Tensor) -> None:
        storage = self._storage(target.buffer)
        storage[:, self._address(target)] = value.expand(self.rows, *self._shape(target.shape)).to(
            storage.dtype
        )

    def _scatter(self, scatter: Scatter) -> None:
        storage = self._storage(scatter.target.buffer)
        shape = self._shape(scatter.value.shape)
        places = self._places(scatter.target).expand(self.rows, *shape).reshape(self.rows, -1)
        values = self.value(scatter.value).expand(self.rows, *shape).reshape(self.rows, -1)
        rows = torch.arange(self.rows)
        for column in range(places.shape[1]):
            where = (rows, places[:, column])
            storage[where] = storage[where] + values[:, column] if scatter.add else values[:, column]


def _reset(states: list[Tensor], reset_to: Sequence[Tensor], flags: Tensor) -> None:
    rows = flags.shape[0]
    for state, to in zip(states, reset_to):
        state[:rows][flags] = to[:rows][flags]
