"""Prints a fused plan as one C++ function: all steps for a tile of rows.

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
from dataclasses import dataclass

from .emit_early import Early, in_rows, sequence_row
from .emit_nest import CTYPES, NestPrinter, size_text
from .fuse import Phase, Plan
from .language import Buffer, Load, Product, Program, loads, same
from .reserved import HEADERS, KERNELS, REMARK, WORD

NUMBERS = ("batch", "start", "stop", "down", "tile_rows", "threads", "first", "pack", "team", "ahead")
TAIL = ("sizes", "offsets", "resets", "fault")
# Nests of a phase from which on they stand in functions of their own, so many in each: what a compiler knows of a
# function's variables grows with the square of its length.
MANY, TOGETHER = 24, 8

# What stands before and after a buffer's name in names that are made of it.
_AROUND = (("", ""), ("in_", ""), ("to_", ""), ("out_", ""), ("", "_at"), ("", "_row"), ("", "_tile"), ("", "_early"),
           ("", "_last"))  # fmt: skip


def canonical(text: str, names: set[str]) -> str:
    """A kernel's text without remarks, with names by their order: loops that differ in names alone share a kernel."""
    new: dict[str, str] = {}
    return WORD.sub(
        lambda m: new.setdefault(m[0], f"v{len(new)}") if m[0] in names else m[0], REMARK.sub("", text)
    )


@dataclass(frozen=True, eq=False)
class Weight:
    """A right side of products, packed once per call."""

    right: Load
    name: str
    early: bool = False  # read once for several steps

    @property
    def ctype(self) -> str:
        return CTYPES[self.right.dtype]

    @property
    def products(self) -> str:
        """The library that multiplies with it."""
        return f"{self.ctype}_products"


def prelude() -> str:
    return "\n".join((KERNELS / name).read_text() for name in HEADERS)


def emit(plan: Plan, broken: bool = False) -> str:
    """The body of the kernel. `broken` makes it wrong on purpose, for tests that must notice."""
    return Printer(plan, broken).text()


class Printer:
    def __init__(self, plan: Plan, broken: bool):
        self.plan, self.program, self.broken = plan, plan.program, broken
        self.weights = _weights(plan)
        self.products = {w.products: w.ctype for w in self.weights}
        self.local = set(map(id, plan.local))
        self.sequences = [b for b in (*plan.program.inputs, *plan.program.kept) if in_rows(b)]
        self.early = Early(plan)
        self.lines: list[str] = []
        self.names = self._given_names()  # every name in the text that comes of the user's

    def _given_names(self) -> set[str]:
        program = self.program
        buffers = {b.name for b in (*program.inputs, *program.kept, *self._scratch_buffers(), *program.nexts)}
        made = {f"{before}{name}{after}" for name in buffers for before, after in _AROUND}
        return made | {w.name for w in self.weights} | set(map(str, program.symbols))

    def line(self, text: str = "", indent: int = 0) -> None:
        self.lines.append("  " * indent + text if text else "")

    def text(self) -> str:
        self._struct()
        self._scratch()
        self._tile()
        self._entry()
        return "\n".join(self.lines) + "\n"

    # The call

    def _struct(self) -> None:
        program = self.program
        self.line("// What one call was given.")
        self.line("struct Call {")
        for b in program.inputs:
            self.line(f"const {CTYPES[b.dtype]}* {b.name};{_comment(b)}", 1)
        for prefix in ("in", "to"):
            for b in program.prevs:
                self.line(f"const {CTYPES[b.dtype]}* {prefix}_{b.name};", 1)
        for b in program.prevs:
            self.line(f"{CTYPES[b.dtype]}* out_{b.name};", 1)
        for b in program.kept:
            self.line(f"{CTYPES[b.dtype]}* {b.name};{_comment(b)}", 1)
        self.line("const i64 *sizes, *offsets;", 1)
        self.line("const u8* resets;", 1)
        self.line("i64* fault;", 1)
        for name, ctype in self.products.items():
            self.line(f"const Products<{ctype}>* {name};", 1)
        for b in self.sequences:
            self.line(f"const i64* {b.name}_at;", 1)
        for w in self.weights:
            self.line(f"Weight<{w.ctype}> {w.name};", 1)
        self.line(f"long {', '.join((*NUMBERS, *program.symbols))};", 1)
        self.line("};")
        self.line()

    def _entry(self) -> None:
        program = self.program
        self.line(
            'extern "C" __attribute__((visibility("default"))) void steploop_run('
            "void** pointers, const i64* numbers, Parallel parallel) {"
        )
        self.line("Call call;", 1)
        names = [f"call.{b.name}" for b in program.inputs]
        names += [f"call.{prefix}_{b.name}" for prefix in ("in", "to", "out") for b in program.prevs]
        names += [f"call.{n}" for n in (*(b.name for b in program.kept), *TAIL, *self.products)]
        names += [f"call.{b.name}_at" for b in self.sequences]
        for number, name in enumerate(names):
            self.line(f"{name} = (decltype({name}))pointers[{number}];", 1)
        for number, name in enumerate((*NUMBERS, *program.symbols)):
            self.line(f"call.{name} = numbers[{number}];", 1)
        self._pack()
        self.line("long tiles = (call.batch + call.tile_rows - 1) / call.tile_rows;", 1)
        self.line(f"const Scratch scratch(call.tile_rows, call.threads, call.ahead{self._symbols()});", 1)
        self.line("char* memory = call.team ? (char*)aligned_alloc(64, scratch.bytes) : 0;", 1)
        self.line("run_tiles(run_tile, &call, tiles, call.threads, memory, parallel);", 1)
        self.line("free(memory);", 1)
        for w in self.weights:
            self.line(f"free(call.{w.name}.packed);", 1)
        self.line("}")

    def _pack(self) -> None:
        for symbol in self.program.symbols:
            self.line(f"long {symbol} = call.{symbol};", 1)
        for w in self.weights:
            k, n = (size_text(s) for s in w.right.shape)
            down, across = (size_text(s) for s in w.right.strides)
            start = f"call.{w.right.buffer.name} + {size_text(w.right.offset)}"
            self.line(f"call.{w.name} = {{call.{w.products}, {start}, {down}, {across}, {k}, {n}, 0}};", 1)
            # One row at a time reads a weight once, best as it is where its columns are contiguous.
            alone = "" if w.early else f" && !(call.batch == 1 && call.{w.name}.down == 1)"
            self.line(f"call.{w.name}.prepare(call.pack{alone}, call.threads, parallel);", 1)

    # The tile

    def _scratch(self) -> None:
        """Rows of a tile share most of it; what only one row needs at a time, every thread has once."""
        self.line("// Where the temporaries of a tile are, in bytes.")
        self.line("struct Scratch {")
        buffers, together = self._scratch_buffers(), self._together()
        for b in buffers:
            self.line(f"long {b.name}, {b.name}_row;", 1)
        self.line("long bytes;", 1)
        self.line(f"Scratch(long rows, long members, long ahead{self._symbols('long ')}) {{", 1)
        self.line("long at = 0;", 2)
        for b in buffers:
            size = CTYPES[b.dtype]
            apart = "whole" if id(b) in together else "padded"
            self.line(f"{b.name}_row = {apart}({size_text(b.numel)}, sizeof({size}));", 2)
            rows = "members" if id(b) in self.local else "rows * ahead" if b in self.early.buffers else "rows"
            self.line(f"{b.name} = at; at += ({rows} * {b.name}_row * sizeof({size}) + 127) / 64 * 64;", 2)
        self.line("bytes = (at + 127) / 64 * 64;", 2)
        self.line("}", 1)
        self.line("static long whole(long n, long size) { return (n * size + 63) / 64 * 64 / size; }", 1)
        self.line("static long padded(long n, long size) {  // whole vectors, and no two rows 4 KB apart", 1)
        self.line("long row = whole(n, size);", 2)
        self.line("return row * size % 4096 == 0 && row ? row + 64 / size : row;", 2)
        self.line("}", 1)
        self.line("};")
        self.line()

    def _symbols(self, ctype: str = "") -> str:
        """The sizes that are known when a kernel runs, behind other arguments or parameters."""
        return "".join(f", {ctype}{s}" for s in self.program.symbols)

    def _scratch_buffers(self) -> list[Buffer]:
        nexts = [b for b in self.program.nexts if b.index not in self.plan.in_place]
        return [*self.program.prevs, *nexts, *self.plan.shared, *self.plan.local, *self.early.buffers]

    def _together(self) -> set[int]:
        """Temporaries with several rows of a product in each row of the batch: best if all are one after the other."""
        products = [p for phase in self.plan.phases for p in phase.products if not same(p.left.shape[0], 1)]
        found = {id(b) for p in products for b in (p.left.buffer, p.target.buffer)}
        for prev, after in zip(self.program.prevs, self.program.nexts):  # they change places
            pair = {id(prev), id(after)}
            found |= pair if pair & found else set()
        return found

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
        self.line(f"const Scratch scratch(rows, team.size, call.ahead{self._symbols()});", 1)
        self.line("char* memory = team.memory ? team.memory : (char*)aligned_alloc(64, scratch.bytes);", 1)
        for b in self._scratch_buffers():
            ctype = CTYPES[b.dtype]
            mine = f" + team.me * scratch.{b.name}_row" if id(b) in self.local else ""
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
        self.line("if (team.me == 0) save_rows(n, loaded), load_rows(loaded, n);", 3)
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
        self.line("if (team.me == 0) save_rows(0, loaded);", 1)
        self.line("if (!team.memory) free(memory);", 1)
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
            size = f"{size_text(b.numel)} * sizeof({CTYPES[b.dtype]})"
            self.line(f"memcpy({self._row(b)}, {b.name}_last, {size});", 5)
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
        self.line("for (long r = from; r < stop; ++r) {", 2)
        for b in self.program.prevs:
            to, source = ends(b)
            self.line(f"memcpy({to}, {source}, {size_text(b.numel)} * sizeof({CTYPES[b.dtype]}));", 3)
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
                f"memcpy({b.name}_tile + r * scratch.{b.name}_row, call.to_{b.name} + "
                f"(row0 + r) * {size_text(b.numel)}, {size_text(b.numel)} * sizeof({CTYPES[b.dtype]}));",
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
        known = (*program.inputs, *program.kept, *program.nexts, *self._scratch_buffers())
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
            self.line(f"{wanted[0].name}[0] += 0.001 + 0.01 * {wanted[0].name}[0];", 3)

    def _row(self, b: Buffer, row: str = "r") -> str:
        """The pointer to one row of a buffer."""
        size = size_text(b.numel)
        if b.place == "temp" and id(b) in self.local:
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

    def _weight_of(self, product: Product) -> Weight:
        return next(w for w in self.weights if w.right is product.right)


def _weights(plan: Plan) -> list[Weight]:
    found: dict[int, Weight] = {}
    for number, products in enumerate([*(phase.products for phase in plan.phases), plan.early]):
        for right in (product.right for product in products):
            if id(right) not in found:
                early = number == len(plan.phases)
                found[id(right)] = Weight(right, f"weight{len(found)}_{right.buffer.name}", early)
    return list(found.values())


def _comment(b: Buffer) -> str:
    shape = ", ".join(map(str, b.shape))
    kind = {"step": "per step", "once": "the same at every step", "kept": "per step"}[b.place]
    return f"  // ({shape}) {kind}{'' if b.rows else ', for all rows'}"


__all__ = ["Program", "emit", "loads", "prelude"]
