"""Prints a fused plan as C++: all steps of a loop for a tile of rows, `run_tile`, and what a call is given, `Call`.

The text is the same for every backend. Before it a backend puts the words that it is written in: vectors, functions on
them, a team of threads, its products. After it stands the function that calls `run_tile`.

    pointers  inputs, states before, reset values, states after, kept arrays, sizes, offsets, resets, an int64
              that becomes the number of a check which found an index outside its axis, and the libraries of
              products (one for each dtype that weights have)
              Then, for every sequence of rows, where its rows stand (null: as they are packed)
    numbers   batch, start, stop, down, rows per tile, threads, first packed row, whether to pack weights,
              whether the threads are a team, steps that early products are made for, then the symbols
Kernels know no number of steps, rows or threads, so new ones need no new kernel.
"""

from __future__ import annotations

from collections.abc import Callable

from .emit_call import CallPrinter
from .emit_early import in_rows, sequence_row
from .emit_expressions import CTYPES, size_text
from .emit_nest import NestPrinter
from .fuse import Fused, Phase
from .language import Buffer, Product
from .reserved import REMARK, WORD

# Nests of a phase from which on they stand in functions of their own, so many in each: what a compiler knows of a
# function's variables grows with the square of its length.
MANY, TOGETHER = 24, 8


def canonical(text: str, names: set[str]) -> str:
    """A kernel's text without remarks, with names by their order: loops that differ in names alone share a kernel."""
    new: dict[str, str] = {}
    return WORD.sub(
        lambda m: new.setdefault(m[0], f"v{len(new)}") if m[0] in names else m[0], REMARK.sub("", text)
    )


def emit(plan: Fused, broken: bool = False) -> str:
    """The body of the kernel. `broken` makes it wrong on purpose, for tests that must notice."""
    return Printer(plan, broken).text()


class Printer(CallPrinter):
    """The whole text."""

    def text(self) -> str:
        self._struct()
        self.lines += self.scratch.text()
        self._tile()
        return "\n".join(self.lines) + "\n"

    def _tile(self) -> None:
        program = self.program
        self.line("static void run_tile(void* given, long tile, const Member& team) {")
        self.line("const Call& call = *(const Call*)given;", 1)
        self.line("const long row0 = tile * call.tile_rows;", 1)
        self.line(
            "const long rows = call.batch - row0 < call.tile_rows ? call.batch - row0 : call.tile_rows;", 1
        )
        for symbol in program.symbols:
            self.line(f"const long {symbol} = call.{symbol};", 1)
        self.line("const Scratch scratch(call, rows, team.size);", 1)
        self.line("char* const memory = team.take(scratch.bytes);", 1)
        for b in self.scratch.buffers:
            ctype = CTYPES[b.dtype]
            mine = f" + team.me * scratch.{b.name}_row" if id(b) in self.scratch.local else ""
            end = "early" if b in self.early.targets else "tile"
            self.line(f"{ctype}* {b.name}_{end} = ({ctype}*)(memory + scratch.{b.name}){mine};", 1)
        self._rows_function(
            "load_rows",
            lambda b: (
                f"{b.name}_tile + r * scratch.{b.name}_row",
                f"call.in_{b.name} + (row0 + r) * {size_text(b.numel)}",
            ),
        )
        self._rows_function(
            "save_rows",
            lambda b: (
                f"call.out_{b.name} + (row0 + r) * {size_text(b.numel)}",
                f"{b.name}_tile + r * scratch.{b.name}_row",
            ),
        )
        self._where()
        self.lines += self.early.function(self._weight_of)
        self.line("long loaded = 0;", 1)
        self.line("for (long step = 0; step < call.stop - call.start; ++step) {", 1)
        self.line("const Where now = where(step);", 2)
        self.line("const long p = now.p, n = now.n, at = now.at, here = now.here;", 2)
        self.lines += self.early.step()
        self.line("if (n != loaded) {", 2)
        self.line("team.wait();", 3)
        self.line("save_rows(n, loaded), load_rows(loaded, n);", 3)
        self.line("team.wait();", 3)
        self.line("loaded = n;", 3)
        self.line("}", 2)
        self.line("if (n == 0) continue;", 2)
        self.line("const long from = team.share(n), end = team.share(n, 1);  // rows of this thread", 2)
        self._resets("!call.down")
        self._is_over()
        for phase in self.plan.phases:
            self._phase(phase)
        self._swap()
        self._resets("call.down")
        self._stop()
        self.line("}", 1)
        self.line("team.wait();", 1)
        self.line("save_rows(0, loaded);", 1)
        self.line("team.give_back(memory);", 1)
        self.line("}")
        self.line()

    def _is_over(self) -> None:
        """Whether all rows of a tile had ended before a step: then it is the last that runs."""
        if self.program.ends is None:
            return
        self.line("bool over = !call.resets && !call.down;", 2)
        self.line("if (over) {", 2)
        self.line("team.wait();", 3)
        self.line(f"for (long r = 0; r < n; ++r) over = over && *({self._row(self.program.ends)});", 3)
        self.line("team.wait();", 3)
        self.line("}", 2)

    def _stop(self) -> None:
        """What the last step kept is what all later ones would keep."""
        if self.program.ends is None:
            return
        self.line("if (over) {", 2)
        self.line("for (long r = from; r < end; ++r) {", 3)
        for b in self.program.kept:
            self.line(f"const {CTYPES[b.dtype]}* {b.name}_last = {self._row(b)};", 4)
        self.line("for (long later = step + 1; later < call.stop - call.start; ++later) {", 4)
        self.line("const Where then = where(later);", 5)
        self.line("const long at = then.at, here = then.here;", 5)
        self.line("if (r >= then.n) break;", 5)
        for b in self.program.kept:
            self.line(f"copy({self._row(b)}, {b.name}_last, {size_text(b.numel)});", 5)
        self.line("}", 4)
        self.line("}", 3)
        self.line("break;", 3)
        self.line("}", 2)

    def _where(self) -> None:
        self.line("auto where = [&](long step) {", 1)
        self.line("const long p = call.down ? call.stop - 1 - step : call.start + step;", 2)
        self.line("const long active = (call.sizes ? call.sizes[p] : call.batch) - row0;", 2)
        self.line("const long at = (call.sizes ? call.offsets[p] : p * call.batch) + row0;", 2)
        self.line("return Where{p, active < 0 ? 0 : active < rows ? active : rows, at, at - call.first};", 2)
        self.line("};", 1)

    def _rows_function(self, name: str, ends: Callable[[Buffer], tuple[str, str]]) -> None:
        self.line(f"auto {name} = [&](long from, long stop) {{", 1)
        self.line("for (long r = from + team.me; r < stop; r += team.size) {", 2)
        for b in self.program.prevs:
            to, source = ends(b)
            self.line(f"copy({to}, {source}, {size_text(b.numel)});", 3)
        self.line("}", 2)
        self.line("};", 1)

    def _resets(self, when: str) -> None:
        if not self.program.prevs:
            return
        self.line(f"if (call.resets && {when})", 2)
        self.line("for (long r = from; r < end; ++r)", 3)
        self.line("if (call.resets[at + r]) {", 4)
        for b in self.program.prevs:
            self.line(
                f"copy({b.name}_tile + r * scratch.{b.name}_row, call.to_{b.name} + "
                f"(row0 + r) * {size_text(b.numel)}, {size_text(b.numel)});",
                5,
            )
        self.line("}", 4)

    def _swap(self) -> None:
        written = {id(s.target.buffer) for p in self.plan.phases for n in p.nests for s in n.statements}
        for prev, after in zip(self.program.prevs, self.program.nexts):
            if id(after) in written and after.index not in self.plan.in_place:
                self.line(
                    f"{{ auto old = {prev.name}_tile; {prev.name}_tile = {after.name}_tile; "
                    f"{after.name}_tile = old; }}",
                    2,
                )

    def _phase(self, phase: Phase) -> None:
        if phase.products:
            self.line("team.wait();", 2)
            for product in phase.products:
                self._product(product)
            self.line("team.wait();", 2)
        if not phase.nests:
            return
        self.line("for (long r = from; r < end; ++r) {", 2)
        used: dict[int, Buffer] = {}
        body: list[str] = []
        program = self.program
        known = (*program.inputs, *program.kept, *program.nexts, *self.scratch.buffers)
        taken = {b.name for b in known} | set(program.symbols)

        def base(buffer: Buffer) -> str:
            used[id(buffer)] = buffer
            return buffer.name

        apart = len(phase.nests) >= MANY
        for number, nest in enumerate(phase.nests):
            printer = NestPrinter(nest, base, self.program.make.names, taken, 3)
            if apart and number % TOGETHER == 0:
                body.append("      [&]() APART {")
            body += printer.print()
            if apart and (number % TOGETHER == TOGETHER - 1 or nest is phase.nests[-1]):
                body.append("      }();")
            self.names.update(printer.taken, (f"{name}_at" for name in printer.taken))
        written = {id(s.target.buffer) for n in phase.nests for s in n.statements}
        for buffer in used.values():
            const = "" if id(buffer) in written else "const "
            self.line(f"{const}{CTYPES[buffer.dtype]}* {buffer.name} = {self._row(buffer)};", 3)
        if phase is next(p for p in self.plan.phases if p.nests):
            self.lines += self.early.row()
        self.lines += body
        self._break(phase)
        self.line("}", 2)

    def _break(self, phase: Phase) -> None:
        """The deliberate mistake: the first number of a state is a little too large."""
        wanted = [b for b in self.program.nexts if b.dtype.is_floating_point]
        done = {id(s.target.buffer) for n in phase.nests for s in n.statements}
        if self.broken and wanted and id(wanted[0]) in done:
            self.line(f"put({wanted[0].name}, {wanted[0].name}[0] * 1.01 + 0.001);", 3)

    def _row(self, b: Buffer, row: str = "r") -> str:
        """The pointer to one row of a buffer."""
        size = size_text(b.numel)
        if b.place == "temp" and id(b) in self.scratch.local:
            return f"{b.name}_tile"
        if b.place == "next" and b.index in self.plan.in_place:
            b = self.program.prevs[b.index]
        if b.place in ("temp", "prev", "next"):
            return f"{b.name}_tile + {row} * scratch.{b.name}_row"
        if in_rows(b):
            return sequence_row(b, "at", "here", row)
        if b.place == "kept" or (b.place == "step" and b.rows):
            return f"call.{b.name} + (here + {row}) * {size}"
        if b.place == "step":
            return f"call.{b.name} + (p - call.start) * {size}"
        return f"call.{b.name} + (row0 + {row}) * {size}" if b.rows else f"call.{b.name}"

    def _row_stride(self, b: Buffer) -> str:
        if b.place in ("temp", "prev", "next"):
            return f"scratch.{b.name}_row"
        return size_text(b.numel) if b.rows else "0"

    def _product(self, product: Product) -> None:
        left, target = product.left, product.target.buffer
        weight = self._weight_of(product)
        rows, k = (size_text(s) for s in left.shape)
        n = size_text(product.right.shape[1])
        where = f"  // {product.line}" if product.line else ""
        start = f"{self._row(left.buffer, '0')} + {size_text(left.offset)}"
        if rows == "1":
            self.line(
                f"multiply({start}, {self._row_stride(left.buffer)}, n, call.{weight.name}, "
                f"{target.name}_tile, scratch.{target.name}_row, team);{where}",
                2,
            )
            return
        self.line(
            f"multiply_each({start}, {self._row_stride(left.buffer)}, (long){k}, {rows}, n, "
            f"call.{weight.name}, {target.name}_tile, scratch.{target.name}_row, (long){n}, team);{where}",
            2,
        )
