"""Prints early products: those of sequences with weights, which wait for no state, made for several steps at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .emit_expressions import CTYPES, size_text
from .fuse import Fused
from .language import Buffer, Product


def in_rows(buffer: Buffer) -> bool:
    """Whether an input or a kept value is a sequence whose rows may stand anywhere."""
    return buffer.place in ("step", "kept") and buffer.rows and buffer.order is None


def sequence_row(b: Buffer, at: str, here: str, row: str) -> str:
    """The pointer to one row of a sequence, given the first of a step among all packed rows, and among those here."""
    name = f"call.{b.name}"
    return f"{name} + ({name}_at ? {name}_at[{at} + {row}] : {here} + {row}) * {size_text(b.numel)}"


class Early:
    """targets: what the products give.  staged: rows of sequences that are brought together for them."""

    def __init__(self, plan: Fused):
        self.products = plan.early
        self.targets = [p.target.buffer for p in plan.early]
        self.staged: dict[tuple[int, str], Buffer] = {}
        for product in plan.early:
            left = product.left
            if self._key(product) not in self.staged:
                name = f"rows{len(self.staged)}_{left.buffer.name}"
                self.staged[self._key(product)] = Buffer(name, left.dtype, left.shape, "temp")

    @staticmethod
    def _key(product: Product) -> tuple[int, str]:
        left = product.left
        return id(left.buffer), f"{left.offset}, {left.shape}, {left.strides}"

    @property
    def buffers(self) -> list[Buffer]:
        return [*self.targets, *self.staged.values()]

    def function(self, weight_of: Callable[[Product], Any]) -> list[str]:
        if not self.products:
            return []
        lines = [
            "  auto make_early = [&](long step, long steps) {",
            "    const Where first = where(step);",
            "    const bool together = steps == 1 || (rows == call.batch && !call.down);  // nothing between the rows",
            "    long count = 0;",
            "    for (long s = step; s < step + steps; ++s) {",
            "      const Where w = where(s);",
        ]
        stages = {self._key(p): p.left for p in self.products}
        for key, left in stages.items():
            b, to = left.buffer, self.staged[key].name
            lines += [
                f"      if (!together || call.{b.name}_at)",
                "        for (long r = team.share(w.n); r < team.share(w.n, 1); ++r)",
                f"          copy({to}_tile + (count + r) * scratch.{to}_row, "
                f"{sequence_row(b, 'w.at', 'w.here', 'r')} + {size_text(left.offset)}, "
                f"{size_text(left.shape[1])});",
            ]
        lines += ["      count += w.n;", "    }", "    if (!count) return;", "    team.wait();"]
        for product in self.products:
            lines += self._product(product, weight_of(product).name)
        return [*lines, "    team.wait();", "  };", "  long early = 0, used = 0;"]

    def _product(self, product: Product, weight: str) -> list[str]:
        left, target, staged = product.left, product.target.buffer, self.staged[self._key(product)].name
        b = left.buffer
        moved = f"!together || call.{b.name}_at"
        where = f"  // {product.line}" if product.line else ""
        return [
            f"    multiply({moved} ? {staged}_tile : call.{b.name} + first.here * {size_text(b.numel)} + "
            f"{size_text(left.offset)}, {moved} ? scratch.{staged}_row : {size_text(b.numel)}, count, "
            f"call.{weight}, {target.name}_early, scratch.{target.name}_row, team);{where}"
        ]

    def step(self) -> list[str]:
        """At every step: makes the products of the next ones when there are none left."""
        if not self.products:
            return []
        lines = [
            "    if (!early) {",
            "      early = call.stop - call.start - step < call.ahead ? call.stop - call.start - step : call.ahead;",
            "      used = 0;",
            "      make_early(step, early);",
            "    }",
        ]
        for b in self.targets:
            lines.append(f"    {CTYPES[b.dtype]}* {b.name}_tile = {b.name}_early + used * scratch.{b.name}_row;")
        return [
            *lines,
            "    --early, used += n;",
            "    const Where next = !early && step + 1 < call.stop - call.start ? where(step + 1) : Where{};",
        ]

    def row(self) -> list[str]:
        """At a row of a step: brings the same row of the next step nearer, which its products will read first."""
        lines = []
        for left in {self._key(p): p.left for p in self.products}.values():
            b = left.buffer
            lines.append(
                f"      if (r < next.n) nearer({sequence_row(b, 'next.at', 'next.here', 'r')} + "
                f"{size_text(left.offset)}, {size_text(left.shape[1])} * sizeof({CTYPES[b.dtype]}));"
            )
        return lines
