"""Prints one loop nest as C++ on vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import sympy
import torch

from ...errors import BuildError
from .fuse import Nest
from .language import (
    Buffer,
    Const,
    Dim,
    Expr,
    Iota,
    Load,
    Reduce,
    Routine,
    Scan,
    Scatter,
    Statement,
    Store,
    same,
    walk,
)
from .reserved import reserved
from .scalars import SCALARS

CTYPES = {
    torch.float32: "float", torch.float64: "double", torch.int64: "i64", torch.int32: "int32_t",
    torch.int16: "int16_t", torch.int8: "int8_t", torch.uint8: "u8", torch.bool: "u8",
}  # fmt: skip

_NEUTRAL = {"sum": "0", "prod": "1", "any": "0", "all": "1"}
_COMBINE = {
    "sum": "{0} + {1}", "prod": "{0} * {1}", "amax": "maximum({0}, {1})", "amin": "minimum({0}, {1})",
    "any": "{0} | {1}", "all": "{0} & {1}",
}  # fmt: skip
_FOLD = {"sum": "total", "prod": "total_product", "amax": "largest", "amin": "smallest", "any": "any_of",
         "all": "all_of"}  # fmt: skip


def size_text(size: Dim) -> str:
    """A size as C++; symbols are variables of the kernel."""
    if isinstance(size, int):
        return str(size)
    if not size.free_symbols:
        return str(int(size))  # a size of a graph that was captured for one batch size
    try:
        text = sympy.ccode(sympy.Poly(size, *sorted(size.free_symbols, key=str)).as_expr())
    except sympy.PolynomialError:  # torch.roll's sizes are remainders
        raise BuildError(f"no form for the size {size}") from None
    if "pow" in text:
        text = " + ".join(_monomial(t) for t in sympy.Add.make_args(sympy.expand(size)))
    return f"({text})"


def _monomial(term: sympy.Expr) -> str:
    factors = []
    for factor in sympy.Mul.make_args(term):
        base, power = factor.as_base_exp()
        factors += [str(base)] * int(power)
    return "*".join(factors)


class NestPrinter:
    """One nest. `base` names the row pointer of a buffer."""

    def __init__(
        self, nest: Nest, base: Callable[[Buffer], str], names: dict[int, str], taken: set[str], indent: int
    ):
        self.nest, self.base, self.names, self.indent = nest, base, names, indent
        self.lines: list[str] = []
        self.values: dict[int, str] = {}  # expression -> variable
        self.taken = set(taken)  # names of buffers, which a value must not hide
        self.rank = len(nest.shape)
        self.kept = self.rank - nest.reduced
        self.axis = self.kept - 1 if nest.across else self.rank - 1  # the axis that vectors run along
        self.wide = self._wide()

    def _wide(self) -> str:
        """The name of a number of lanes (vector.h): what a register holds, or less for a short axis."""
        widths: set[int] = set()

        def visit(expr: Expr) -> None:
            if expr.dtype != torch.bool:
                widths.add(expr.dtype.itemsize)

        for statement in self.nest.statements:
            if not isinstance(statement, Routine):
                walk(statement.value, visit)
        kind, lanes = ("D", 8) if widths == {8} else ("W", 16)
        size = self.nest.shape[self.axis] if self.rank else 1
        while isinstance(size, int) and lanes > 4 and size <= lanes // 2:
            lanes //= 2
        return f"{kind}{lanes}"

    def line(self, text: str, deeper: int = 0) -> None:
        self.lines.append("  " * (self.indent + deeper) + text)

    def index(self, axis: int) -> str:
        return "i" if axis == self.axis else f"j{axis}"

    def new(self, hint: str) -> str:
        name, count = hint, 1
        while name in self.taken:
            count += 1
            name = f"{hint}_{count}"
        self.taken.add(name)
        return name

    # Addresses

    def address(self, strides: tuple[Dim, ...], offset: Dim, skip_vector: bool = False) -> str:
        terms = [] if same(offset, 0) else [size_text(offset)]
        for axis, stride in enumerate(strides):
            if same(stride, 0) or (skip_vector and axis == self.axis):
                continue
            name = self.index(axis)
            terms.append(name if same(stride, 1) else f"{name} * {size_text(stride)}")
        return " + ".join(terms) or "0"

    def stride(self, strides: tuple[Dim, ...]) -> Dim:
        return strides[self.axis] if self.rank else 0

    def pointer(self, load: Load) -> str:
        """The address of the first lane, the look-ups of one index for all lanes included."""
        text = f"{self.base(load.buffer)} + {self.address(load.strides, load.offset)}"
        for index, step in load.at:
            text += f" + {self.scalar(index)} * {size_text(step)}"
        return text

    def scalar(self, expr: Expr) -> str:
        """An index that all lanes share."""
        if id(expr) in self.values:  # it may be in a register only
            return f"{self.values[id(expr)]}[0]"
        if isinstance(expr, Const):
            return str(int(expr.value))
        if isinstance(expr, Iota):
            return f"({self.address(expr.strides, expr.offset)})"
        assert isinstance(expr, Load)
        return f"({self.pointer(expr)})[0]"

    # Expressions

    def value(self, expr: Expr) -> str:
        found = self.values.get(id(expr))
        if found is None:
            text = self.text(expr)
            found = self.new(self.hint(expr))
            self.line(f"auto {found} = {text};")
            self.values[id(expr)] = found
        return found

    def hint(self, expr: Expr) -> str:
        name = self.names.get(id(expr))
        if name is None:
            return f"{expr.buffer.name}_i" if isinstance(expr, Load) else "x"
        return f"{name}_" if name in reserved() else name

    def text(self, expr: Expr) -> str:
        if isinstance(expr, Const):
            return self.constant(expr)
        if isinstance(expr, Iota):
            step = size_text(self.stride(expr.strides))
            return f"counting<{self.wide}>({self.address(expr.strides, expr.offset)}, {step})"
        if isinstance(expr, Load):
            return self.loaded(expr)
        args = [self.value(a) for a in expr.args]
        if expr.name == "cast":
            return self.cast(args[0], expr.args[0].dtype, expr.dtype)
        return SCALARS[expr.name].text.format(*args)

    def constant(self, expr: Const) -> str:
        if expr.dtype == torch.bool:
            return f"every_mask<{self.wide}>({'true' if expr.value else 'false'})"
        ctype = CTYPES[expr.dtype]
        return f"every<{self.wide}>(({ctype}){number(expr.value, ctype)})"

    def cast(self, arg: str, before: torch.dtype, after: torch.dtype) -> str:
        if after == torch.bool:
            return f"to_mask({arg})"
        name = "from_mask" if before == torch.bool else "convert"
        return f"{name}<{CTYPES[after]}>({arg})"

    def loaded(self, load: Load) -> str:
        mask = load.dtype == torch.bool
        if any(not self._uniform(index) for index, _ in load.at):
            return self.gathered(load)
        stride = self.stride(load.strides)
        pointer = self.pointer(load)
        if same(stride, 0):
            if mask:
                return f"every_mask<{self.wide}>(({pointer})[0] != 0)"
            return f"every<{self.wide}>(({pointer})[0])"
        kind = "load_mask" if mask else "load"
        if same(stride, 1):
            return f"{kind}({pointer}, m)"
        return f"{kind}_strided({pointer}, {size_text(stride)}, m)"

    def _uniform(self, index: Expr) -> bool:
        if isinstance(index, Const):
            return True
        if isinstance(index, (Load, Iota)):
            return same(self.stride(index.strides), 0) and not getattr(index, "at", ())
        return False

    def gathered(self, load: Load) -> str:
        """Every lane looks up its own index."""
        (index, step), *rest = sorted(load.at, key=lambda a: self._uniform(a[0]))
        assert all(self._uniform(other[0]) for other in rest)
        pointer = f"{self.base(load.buffer)} + {self.address(load.strides, load.offset, skip_vector=True)}"
        for other, jump in rest:
            pointer += f" + {self.scalar(other)} * {size_text(jump)}"
        along = self.stride(load.strides)
        start = "" if same(along, 0) else f" + i * {size_text(along)}"
        kind = "gather_mask" if load.dtype == torch.bool else "gather"
        return f"{kind}({pointer}{start}, {self.value(index)}, {size_text(step)}, {size_text(along)}, m)"

    def save(self, target: Load, value: str) -> None:
        stride = self.stride(target.strides)
        pointer = f"{self.base(target.buffer)} + {self.address(target.strides, target.offset)}"
        kind = "store_mask" if target.dtype == torch.bool else "store"
        if same(stride, 1) or self.rank == 0:
            self.line(f"{kind}({pointer}, {value}, m);")
        else:
            self.line(f"{kind}_strided({pointer}, {size_text(stride)}, {value}, m);")

    # Nests

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

    def _body(self, statement: Statement, sums: dict[int, str]) -> None:
        value = self.value(statement.value)
        if isinstance(statement, Store):
            if id(statement) not in self.nest.silent:
                self.save(statement.target, value)
            self.values[id(statement.target)] = value
            return
        assert isinstance(statement, Reduce)
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
        pointer = f"({self.base(target.buffer)} + {self._outer_address(target)})[0]"
        if reduce.kind.startswith("arg"):
            biggest = "true" if reduce.kind == "argmax" else "false"
            self.line(f"{pointer} = first_best({total}, {total}_at, {biggest});")
        else:
            self.line(f"{pointer} = {_FOLD[reduce.kind]}({total});")

    def _outer_address(self, target: Load) -> str:
        terms = [] if same(target.offset, 0) else [size_text(target.offset)]
        for axis, stride in enumerate(target.strides):
            if not same(stride, 0):
                terms.append(f"j{axis} * {size_text(stride)}")
        return " + ".join(terms) or "0"

    def _across(self) -> None:
        """Vectors along the last axis that stays; the reduced axes are loops inside."""
        opened = self._open(range(self.kept - 1))
        self._begin_span()
        sums = {id(s): self._start(s) for s in self.nest.statements}
        inner = self._open(range(self.kept, self.rank))
        for statement in self.nest.statements:
            total = sums[id(statement)]
            value = self.value(statement.value)
            self.line(f"{total} = {_COMBINE[statement.kind].format(total, value)};")
        self._close(inner)
        for statement in self.nest.statements:
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
        self.line(f"{routine.name}<{options}>({', '.join(arguments)});")
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
            pointer += f" + {self.value(index)}[0] * {size_text(step)}"
        number_ = f"({value}[0] != 0)" if target.dtype == torch.bool else f"{value}[0]"
        self.line(f"({pointer})[0] {'+=' if scatter.add else '='} {number_};")
        self._end_span()


def number(value: object, ctype: str) -> str:
    if isinstance(value, sympy.Basic):
        return size_text(value)
    if isinstance(value, float):
        if math.isnan(value):
            return "NAN"
        if math.isinf(value):
            return "INFINITY" if value > 0 else "-INFINITY"
        return repr(value) if ctype == "double" else f"{value!r}f" if ctype == "float" else repr(value)
    if value == -(2**63):
        return "(-9223372036854775807 - 1)"
    return f"{int(value)}"


def _extreme(dtype: torch.dtype, largest: bool) -> float | int:
    if dtype.is_floating_point:
        return math.inf if largest else -math.inf
    limits = torch.iinfo(dtype)
    return limits.max if largest else limits.min
