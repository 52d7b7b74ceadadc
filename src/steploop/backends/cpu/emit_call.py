"""Prints what a kernel holds of one call: what it was given, its packed weights, and where its temporaries are."""

from __future__ import annotations

from dataclasses import dataclass

from .emit_early import Early, in_rows
from .emit_expressions import CTYPES, size_text
from .fuse import Fused
from .language import Buffer, Load, Product, same

NUMBERS = ("batch", "start", "stop", "down", "tile_rows", "threads", "first", "pack", "team", "ahead")
TAIL = ("sizes", "offsets", "resets", "fault")

# What stands before and after a buffer's name in names that are made of it.
_AROUND = (("", ""), ("in_", ""), ("to_", ""), ("out_", ""), ("", "_at"), ("", "_row"), ("", "_tile"), ("", "_early"),
           ("", "_last"))  # fmt: skip


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


class CallPrinter:
    """What all parts of a kernel's text are printed with. broken: see `emit`."""

    def __init__(self, plan: Fused, broken: bool):
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

    def _weight_of(self, product: Product) -> Weight:
        return next(w for w in self.weights if w.right is product.right)


def _weights(plan: Fused) -> list[Weight]:
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
