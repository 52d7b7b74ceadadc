"""Prints what a kernel holds of one call: what it was given, its packed weights, and where its temporaries are."""

from __future__ import annotations

from dataclasses import dataclass

from .emit_early import Early, in_rows
from .emit_expressions import CTYPES, size_text
from .fuse import Fused
from .language import Buffer, Load, Product
from .scratch import Scratch

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
        self.sequences = [b for b in (*plan.program.inputs, *plan.program.kept) if in_rows(b)]
        self.early = Early(plan)
        self.scratch = Scratch(plan, self.early.buffers)
        self.lines: list[str] = []
        self.names = self._given_names()  # every name in the text that comes of the user's

    def _given_names(self) -> set[str]:
        program = self.program
        buffers = {b.name for b in (*program.inputs, *program.kept, *self.scratch.buffers, *program.nexts)}
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
        self._take()
        self._each_weight()
        self.line("};")
        self.line()

    def _take(self) -> None:
        """Where a call's values stand among the pointers and numbers that it was given."""
        program = self.program
        names = [b.name for b in program.inputs]
        names += [f"{prefix}_{b.name}" for prefix in ("in", "to", "out") for b in program.prevs]
        names += [b.name for b in program.kept] + [*TAIL, *self.products]
        names += [f"{b.name}_at" for b in self.sequences]
        symbols = (*NUMBERS, *program.symbols)
        self.line(f"static constexpr int kPointers = {len(names)}, kNumbers = {len(symbols)};", 1)
        self.line("void take(void* const* pointers, const i64* numbers) {", 1)
        for number, name in enumerate(names):
            self.line(f"{name} = (decltype({name}))pointers[{number}];", 2)
        for number, name in enumerate(symbols):
            self.line(f"{name} = numbers[{number}];", 2)
        for w in self.weights:
            k, n = (size_text(s) for s in w.right.shape)
            down, across = (size_text(s) for s in w.right.strides)
            start = f"{w.right.buffer.name} + {size_text(w.right.offset)}"
            self.line(f"{w.name} = {{{w.products}, {start}, {down}, {across}, {k}, {n}, 0}};", 2)
        self.line("}", 1)

    def _each_weight(self) -> None:
        """f(weight, whether it is read once for several steps), for all of them."""
        self.line("template <class F> void each_weight(F f) {", 1)
        for w in self.weights:
            self.line(f"f({w.name}, {'true' if w.early else 'false'});", 2)
        self.line("}", 1)

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
