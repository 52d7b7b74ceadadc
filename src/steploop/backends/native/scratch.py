"""Where the temporaries of a tile are: as C++, and as a number of bytes for whoever has to bring the memory.

Rows of a tile share most of it. What only one row needs at a time, every thread has once.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...compiler.ir.graph import size_at
from .emit_expressions import CTYPES, size_text
from .fuse import Fused
from .language import Buffer, same

LINE = 64  # bytes: rows and buffers begin at multiples of it
PAGE = 4096  # bytes: rows so far apart, or multiples of it, fall on the same places of a cache


class Scratch:
    """The temporaries of a plan. early: those of early products, which are there for several steps at a time."""

    def __init__(self, plan: Fused, early: Sequence[Buffer]):
        nexts = [b for b in plan.program.nexts if b.index not in plan.in_place]
        self.buffers = [*plan.program.prevs, *nexts, *plan.shared, *plan.local, *early]
        self.local = set(map(id, plan.local))
        self._early = set(map(id, early))
        self._symbols = plan.program.symbols
        self._whole = _together(plan)

    def text(self) -> list[str]:
        lines = ["// Where the temporaries of a tile are, in bytes.", "struct Scratch {"]
        lines += [f"  long {b.name}, {b.name}_row;" for b in self.buffers]
        lines += ["  long bytes;", "  Scratch(const Call& call, long rows, long members) {"]
        lines += [f"    const long {known} = call.{known};" for known in ("ahead", *self._symbols)]
        lines.append("    long at = 0;")
        for b in self.buffers:
            size = f"sizeof({CTYPES[b.dtype]})"
            kind = "whole" if id(b) in self._whole else "padded"
            lines.append(f"    {b.name}_row = {kind}({size_text(b.numel)}, {size});")
            rows = "members" if id(b) in self.local else "rows * ahead" if id(b) in self._early else "rows"
            taken = f"{rows} * {b.name}_row * {size}"
            lines.append(f"    {b.name} = at; at += ({taken} + {2 * LINE - 1}) / {LINE} * {LINE};")
        return [
            *lines,
            f"    bytes = (at + {2 * LINE - 1}) / {LINE} * {LINE};",
            "  }",
            f"  static long whole(long n, long size) {{ return (n * size + {LINE - 1}) / {LINE} * {LINE} / size; }}",
            "  static long padded(long n, long size) {  // whole vectors, and no two rows 4 KB apart",
            "    long row = whole(n, size);",
            f"    return row * size % {PAGE} == 0 && row ? row + {LINE} / size : row;",
            "  }",
            "};",
            "",
        ]

    def bytes(self, rows: int, members: int, ahead: int, sizes: dict[str, int]) -> int:
        """What `Scratch(call, rows, members).bytes` is in C++. sizes: the values of symbols."""
        at = 0
        for b in self.buffers:
            size = b.dtype.itemsize
            row = -(-size_at(b.numel, sizes) * size // LINE) * LINE // size
            if id(b) not in self._whole and row and row * size % PAGE == 0:
                row += LINE // size
            count = members if id(b) in self.local else rows * ahead if id(b) in self._early else rows
            at += (count * row * size + 2 * LINE - 1) // LINE * LINE
        return (at + 2 * LINE - 1) // LINE * LINE


def _together(plan: Fused) -> set[int]:
    """Temporaries with several rows of a product in each row of the batch: best if all are one after the other."""
    products = [p for phase in plan.phases for p in phase.products if not same(p.left.shape[0], 1)]
    found = {id(b) for p in products for b in (p.left.buffer, p.target.buffer)}
    for prev, after in zip(plan.program.prevs, plan.program.nexts):  # they change places
        pair = {id(prev), id(after)}
        found |= pair if pair & found else set()
    return found
