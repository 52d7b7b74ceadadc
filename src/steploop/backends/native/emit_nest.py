"""Prints one loop nest as C++ on vectors."""

from __future__ import annotations

import math
from typing import Any

import torch

from .emit_expressions import CTYPES, ExpressionPrinter, number, size_text
from .language import (
    Load,
    Nested,
    Reduce,
    Routine,
    Scan,
    Scatter,
    Statement,
    Store,
    same,
)

_NEUTRAL = {"sum": "0", "prod": "1", "any": "0", "all": "1"}
_COMBINE = {
    "sum": "{0} + {1}", "prod": "{0} * {1}", "amax": "maximum({0}, {1})", "amin": "minimum({0}, {1})",
    "any": "{0} | {1}", "all": "{0} & {1}",
}  # fmt: skip
_FOLD = {"sum": "total", "prod": "total_product", "amax": "largest", "amin": "smallest", "any": "any_of",
         "all": "all_of"}  # fmt: skip


class NestPrinter(ExpressionPrinter):
    """One nest: its axes as loops, and what is stored, summed, scanned or scattered in them."""

    def print(self) -> list[str]:
        self.line(f"// {self._heading()}")
        scoped = self.nest.serial or any(isinstance(s, Reduce) for s in self.nest.statements)
        if scoped:
            self.line("{")
            self.indent += 1
        if self.nest.serial:
            self._serial(self.nest.statements[0])
        elif self.nest.across:
            self._across()
        else:
            self._along()
        if scoped:
            self._close(1)
        return self.lines

    def _heading(self) -> str:
        lines = dict.fromkeys(s.line for s in self.nest.statements if s.line)
        shape = " x ".join(str(n) for n in self.nest.shape) or "1"
        return f"{shape}: {', '.join(lines)}" if lines else shape

    def _open(self, axes: range) -> int:
        for axis in axes:
            self.line(f"for (long j{axis} = 0; j{axis} < {size_text(self.nest.shape[axis])}; ++j{axis}) {{")
            self.indent += 1
        return len(axes)

    def _close(self, count: int) -> None:
        for _ in range(count):
            self.indent -= 1
            self.line("}")

    def _begin_span(self) -> None:
        size = size_text(self.nest.shape[self.axis]) if self.rank else "1"
        self.line(f"span<{self.wide}>({size}, [&](long i, auto m) ALWAYS {{")
        self.indent += 1

    def _end_span(self) -> None:
        self.indent -= 1
        self.line("});")

    def _along(self) -> None:
        """Vectors along the last axis; reductions keep a vector of partial results."""
        reduces = [s for s in self.nest.statements if isinstance(s, Reduce)]
        kept = self.kept if self.nest.reduced else max(self.rank - 1, 0)
        opened = self._open(range(kept))
        sums = {id(s): self._start(s) for s in reduces}
        inner = self._open(range(kept, max(self.rank - 1, kept)))
        self._begin_span()
        for statement in self.nest.statements:
            self._body(statement, sums)
        self._end_span()
        self._close(inner)
        for statement in reduces:
            self._finish(statement, sums[id(statement)])
        self._close(opened)

    def _body(self, statement: Nested, sums: dict[int, str]) -> None:
        assert isinstance(statement, (Store, Reduce))
        value = self.value(statement.value)
        if isinstance(statement, Store):
            if id(statement) not in self.nest.silent:
                self.save(statement.target, value)
            self.values[id(statement.target)] = value
            return
        total = sums[id(statement)]
        if statement.kind.startswith("arg"):
            self._better(statement, total, value)
            return
        value = f"only(m, {value}, {self._neutral(statement)})"
        self.line(f"{total} = {_COMBINE[statement.kind].format(total, value)};")

    def _neutral(self, reduce: Reduce) -> str:
        if reduce.kind in ("any", "all"):
            return f"every_mask<{self.wide}>({'true' if reduce.kind == 'all' else 'false'})"
        dtype = reduce.value.dtype
        ctype = CTYPES[dtype]
        if reduce.kind in _NEUTRAL:
            return f"every<{self.wide}>(({ctype}){_NEUTRAL[reduce.kind]})"
        return f"every<{self.wide}>(({ctype}){number(_extreme(dtype, reduce.kind != 'amax'), ctype)})"

    def _start(self, reduce: Reduce) -> str:
        name = self.new(f"{reduce.kind}_{reduce.target.buffer.name}")
        if reduce.kind.startswith("arg"):
            ctype = CTYPES[reduce.value.dtype]
            self.line(f"auto {name} = every<{self.wide}>(({ctype})0);")
            self.line(f"auto {name}_at = every<{self.wide}>((i64)-1);")
        else:
            self.line(f"auto {name} = {self._neutral(reduce)};")
        return name

    def _better(self, reduce: Reduce, best: str, value: str) -> None:
        assert reduce.axes <= 1
        test = f"better_{reduce.kind.removeprefix('arg')}({value}, {best})"
        wins = self.new("wins")
        self.line(
            f"auto {wins} = only(m, {test} | less({best}_at, every<{self.wide}>((i64)0)), "
            f"every_mask<{self.wide}>(false));"
        )
        self.line(f"{best} = choose({wins}, {value}, {best});")
        start = "i" if self.nest.reduced else "0"
        self.line(f"{best}_at = choose({wins}, counting<{self.wide}>({start}, 1), {best}_at);")

    def _finish(self, reduce: Reduce, total: str) -> None:
        target = reduce.target
        pointer = f"{self.base(target.buffer)} + {self._outer_address(target)}"
        if reduce.kind.startswith("arg"):
            biggest = "true" if reduce.kind == "argmax" else "false"
            self.line(f"put({pointer}, first_best({total}, {total}_at, {biggest}));")
        else:
            self.line(f"put({pointer}, {_FOLD[reduce.kind]}({total}));")

    def _outer_address(self, target: Load) -> str:
        terms = [] if same(target.offset, 0) else [size_text(target.offset)]
        for axis, stride in enumerate(target.strides):
            if not same(stride, 0):
                terms.append(f"j{axis} * {size_text(stride)}")
        return " + ".join(terms) or "0"

    def _across(self) -> None:
        """Vectors along the last axis that stays; the reduced axes are loops inside."""
        statements: Any = self.nest.statements  # reductions
        opened = self._open(range(self.kept - 1))
        self._begin_span()
        sums = {id(s): self._start(s) for s in statements}
        inner = self._open(range(self.kept, self.rank))
        for statement in statements:
            total = sums[id(statement)]
            value = self.value(statement.value)
            self.line(f"{total} = {_COMBINE[statement.kind].format(total, value)};")
        self._close(inner)
        for statement in statements:
            self.save(statement.target, sums[id(statement)])
        self._end_span()
        self._close(opened)

    def _serial(self, statement: Statement) -> None:
        """One element after the other: vectors of one lane."""
        self.wide = "1"
        if isinstance(statement, Routine):
            self._routine(statement)
            return
        opened = self._open(range(max(self.rank - 1, 0)))
        if isinstance(statement, Scan):
            self._scan(statement)
        else:
            assert isinstance(statement, Scatter)
            self._scatter(statement)
        self._close(opened)

    def _routine(self, routine: Routine) -> None:
        """A call for every matrix: where the results go, then every operand with its strides and columns."""
        self.axis = self.rank  # no axis runs in vectors
        opened = self._open(range(self.rank))
        target, lead = routine.target, self.rank
        arguments = [f"{self.base(target.buffer)} + {self.address(target.strides[:lead], target.offset)}"]
        for operand in routine.operands:
            arguments.append(f"{self.base(operand.buffer)} + {self.address(operand.strides[:lead], operand.offset)}")
            arguments += [size_text(n) for n in (*operand.strides[lead:], operand.shape[-1])]
        options = ", ".join(map(str, routine.options))
        self.line(f"alone([&]() ALWAYS {{ {routine.name}<{options}>({', '.join(arguments)}); }});")
        self._close(opened)

    def _scan(self, scan: Scan) -> None:
        ctype, running = CTYPES[scan.value.dtype], self.new("running")
        self.line(f"Vec<{ctype}, 1> {running} = every<1>(({ctype}){_NEUTRAL[scan.kind]});")
        self._begin_span()
        value = self.value(scan.value)
        self.line(f"{running} = {_COMBINE[scan.kind].format(running, value)};")
        self.save(scan.target, running)
        self._end_span()

    def _scatter(self, scatter: Scatter) -> None:
        self._begin_span()
        value = self.value(scatter.value)
        target = scatter.target
        pointer = f"{self.base(target.buffer)} + {self.address(target.strides, target.offset)}"
        for index, step in target.at:
            pointer += f" + at0({self.value(index)}) * {size_text(step)}"
        number_ = f"(at0({value}) != 0)" if target.dtype == torch.bool else f"at0({value})"
        self.line(f"({pointer})[0] {'+=' if scatter.add else '='} {number_};")
        self._end_span()


def _extreme(dtype: torch.dtype, largest: bool) -> float | int:
    if dtype.is_floating_point:
        return math.inf if largest else -math.inf
    limits = torch.iinfo(dtype)
    return limits.max if largest else limits.min
