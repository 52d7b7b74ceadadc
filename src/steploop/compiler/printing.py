"""Prints nodes of a graph as Python source, so that running a piece costs its ATen calls and little else."""

from __future__ import annotations

import linecache
import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._sympy.printers import PythonPrinter

from .ir.graph import Size, expression

_PLAIN = (bool, int, str, type(None))
_count = 0


class Source:
    """Python source under construction: lines, and the objects that they name."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.namespace: dict[str, Any] = {"torch": torch}
        self._held: dict[Any, str] = {}

    def hold(self, value: Any, hint: str = "k") -> str:
        """A name for an object in the source."""
        key = (type(value), id(value))
        if key not in self._held:
            name = f"{hint}{len(self._held)}"
            self._held[key] = name
            self.namespace[name] = value
        return self._held[key]

    def add(self, line: str, indent: int = 1) -> None:
        self.lines.append("    " * indent + line)

    def build(self, name: str) -> Callable[..., Any]:
        """Compiles the lines, which must define `name`. Tracebacks show the generated source."""
        global _count
        _count += 1
        text = "\n".join(self.lines) + "\n"
        filename = f"<steploop {name} {_count}>"
        linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
        exec(compile(text, filename, "exec"), self.namespace)
        function = self.namespace[name]
        weakref.finalize(function, linecache.cache.pop, filename, None).atexit = False
        return function


def print_size(size: Any) -> str:
    """A Size as an expression over variables named like its symbols."""
    expr = expression(size)
    return str(expr) if isinstance(expr, int) else f"({PythonPrinter().doprint(expr)})"


def print_argument(source: Source, argument: Any, name_of: Callable[[fx.Node], str]) -> str:
    if isinstance(argument, fx.Node):
        return name_of(argument)
    if isinstance(argument, Size):
        return print_size(argument)
    if isinstance(argument, (list, tuple)):
        inner = ", ".join(print_argument(source, a, name_of) for a in argument)
        return f"[{inner}]"
    if isinstance(argument, _PLAIN):
        return repr(argument)
    if isinstance(argument, float) and argument == argument and abs(argument) != float("inf"):
        return repr(argument)
    return source.hold(argument)


def call_text(source: Source, node: fx.Node, name_of: Callable[[fx.Node], str]) -> str:
    """The right-hand side that computes a node."""
    arguments = [print_argument(source, a, name_of) for a in node.args]
    if node.target is operator.getitem:
        return f"{arguments[0]}[{arguments[1]}]"
    arguments += [f"{k}={print_argument(source, v, name_of)}" for k, v in node.kwargs.items()]
    # The strides of what a view reads are not those of the capture: rows were packed, copies left out.
    target = torch.ops.aten.reshape.default if node.target is torch.ops.aten.view.default else node.target
    if node.target in _READ_MEMORY:
        arguments[0] = f"{source.hold(by_itself, 'f')}({arguments[0]})"
    # The overload's own C++ entry: calling the Python OpOverload around it costs about as much as a small op.
    function = getattr(target, "_op", target)
    return f"{source.hold(function, 'f')}({', '.join(arguments)})"


# Operations that take the numbers of a tensor as they lie in memory. In the capture its value was by itself there.
_READ_MEMORY = {torch.ops.aten.view_as_complex.default, torch.ops.aten.view.dtype, torch.ops.aten.as_strided.default}


def by_itself(value: torch.Tensor) -> torch.Tensor:
    """The value contiguous, and at the beginning of its memory where another dtype would have to begin in between."""
    value = value.contiguous()
    return value if value.storage_offset() % 16 == 0 else value.clone()


def last_uses(
    nodes: list[fx.Node], kept: set[fx.Node], sums: dict[fx.Node, tuple[fx.Node, fx.Node]]
) -> dict[fx.Node, list[fx.Node]]:
    """For each node of a straight line: the values nobody needs after it (so that memory is freed early).

    sums: from `fuse_addmm`; such a sum reads the factors of its product, which is never computed by itself.
    """
    dying: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set(kept)
    products = {product for product, _ in sums.values()}
    for node in reversed(nodes):
        if node in products:
            continue
        reads = [*sums[node][0].all_input_nodes, sums[node][1]] if node in sums else node.all_input_nodes
        for value in [node, *reads]:
            if value not in seen:
                seen.add(value)
                dying.setdefault(node, []).append(value)
    return dying


def fuse_addmm(nodes: list[fx.Node], keep: set[fx.Node]) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
    """Sums that can be one addmm: {add: (mm, other)} where nobody else wants the product."""
    aten = torch.ops.aten
    inside, taken = set(nodes), set()
    found: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    position = {n: i for i, n in enumerate(nodes)}
    for node in nodes:
        if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
            continue
        for product, other in (node.args, node.args[::-1]):
            if not (isinstance(product, fx.Node) and isinstance(other, fx.Node)):
                continue
            # (a product added to itself has one user as well)
            single = product in inside and len(product.users) == 1 and product not in keep and product is not other
            if not single or product.target is not aten.mm.default or product in taken:
                continue
            if position.get(other, -1) > position[product] and other.target is aten.mm.default:
                continue  # the later of two products is the one to fuse
            shape, wanted = other.meta["val"].shape, product.meta["val"].shape
            same = tuple(map(expression, shape)) == tuple(map(expression, wanted))
            bias = len(shape) == 1 and expression(shape[0]) == expression(wanted[1])
            if (same or bias) and other.meta["val"].dtype == product.meta["val"].dtype:
                found[node] = (product, other)
                taken.add(product)
                break
    return found
