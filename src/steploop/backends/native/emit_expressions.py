"""Prints what a loop nest computes with as C++ on vectors: addresses, numbers, and expressions of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

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
    Routine,
    same,
    walk,
)
from .reserved import reserved
from .scalars import SCALARS

CTYPES = {
    torch.float32: "float", torch.float64: "double", torch.int64: "i64", torch.int32: "int32_t",
    torch.int16: "int16_t", torch.int8: "int8_t", torch.uint8: "u8", torch.bool: "u8", torch.bfloat16: "bf16",
    torch.float16: "f16",
}  # fmt: skip


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


class ExpressionPrinter:
    """The values of one nest. `base` names the row pointer of a buffer."""

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
            return f"at0({self.values[id(expr)]})"
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


def number(value: Any, ctype: str) -> str:
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
