"""Python floats that are inputs of a graph, because they change from call to call: a temperature, a schedule.

While the step is traced, a symbol stands in the place of each. So torch records what is computed with it, and every
condition that Python code puts on it. Afterwards an operation that took the symbol as a number takes a tensor without
axes, which every call makes of the float's value then. Where an operation knows no such form, the float stays a number
of the capture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.printers import PythonPrinter

from .walk import Number

aten = torch.ops.aten
# What the text of an expression may name.
FUNCTIONS = {
    "__builtins__": {"min": min, "max": max, "int": int, "abs": abs, "float": float, "round": round},
    "math": math, "torch": torch,
}  # fmt: skip


class NotFree(Exception):
    """Floats, by their paths, that can't be inputs of the graph."""

    def __init__(self, paths: set[str]):
        super().__init__(", ".join(sorted(paths)))
        self.paths = paths


@dataclass(frozen=True)
class FreeNumber:
    """A tensor without axes, made at every call of the floats of then. names: symbol -> path of the float."""

    expression: str
    names: tuple[tuple[str, str], ...]
    dtype: torch.dtype
    device: torch.device

    def tensor(self, floats: dict[str, float]) -> Tensor:
        value = eval(self.expression, FUNCTIONS, {name: floats[path] for name, path in self.names})
        return torch.tensor(value, dtype=self.dtype, device=self.device)


class Symbols:
    """The symbols that stand for floats during one trace."""

    def __init__(self, env: ShapeEnv, numbers: Sequence[Number]):
        self.numbers = list(numbers)
        self.symbols: list[Any] = []
        self.paths: dict[sympy.Symbol, str] = {}
        for index, number in enumerate(self.numbers):
            source = ConstantSource(f"float_{index}")
            symbol = env.create_unspecified_symbol(number.value, source, DimDynamic.DYNAMIC)
            self.symbols.append(env.create_symfloatnode(symbol, hint=number.value, source=source))
            self.paths[symbol] = number.path

    @contextmanager
    def standing_in(self, symbols: Sequence[Any]) -> Iterator[None]:
        """Puts the symbols where the floats are, and these back afterwards."""
        for number, symbol in zip(self.numbers, symbols):
            number.put(symbol)
        kind: Any = torch.SymFloat
        plain = kind.__repr__
        if self.numbers:  # as text a float is what it is now
            kind.__repr__ = lambda symbol: repr(float(symbol))
            kind.__format__ = lambda symbol, spec: format(float(symbol), spec)
        try:
            yield
        finally:
            for number in self.numbers:
                number.put(number.value)
            if self.numbers:
                kind.__repr__ = plain
                del kind.__format__

    def values_in(self, node: fx.Node) -> list[float]:
        """The Python floats in a node's arguments; of symbols, what they stood for."""
        values = {symbol: number.value for symbol, number in zip(self.paths, self.numbers)}
        found = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (float, FreeFloat))]
        return [float(a.expression.xreplace(values)) if isinstance(a, FreeFloat) else a for a in found]

    def pinned(self, env: ShapeEnv) -> set[str]:
        """The paths of floats that the trace took for one number: something needed a Python float there and then."""
        equal = [g.expr for g in env.guards if isinstance(g.expr, sympy.Eq)]
        return {p for e in equal if any(isinstance(side, sympy.Float) for side in e.args) for p in self.paths_in(e)}

    def paths_in(self, expression: sympy.Expr) -> set[str]:
        return {self.paths[s] for s in expression.free_symbols if s in self.paths}


class FreeFloat:
    """A symbolic Python float in a node's arguments, until `lift` has made a tensor of it."""

    def __init__(self, expression: sympy.Expr):
        self.expression = expression


def _scalar_to_tensor(name: str) -> Callable[[fx.Graph, fx.Node, Any], fx.Node]:
    """The same operation by its form that takes a tensor for the number."""

    def rule(graph: fx.Graph, node: fx.Node, tensor: Any) -> fx.Node:
        packet, overload = name.split(".")
        args = tuple(tensor(a) if isinstance(a, FreeFloat) else a for a in node.args)
        return graph.call_function(getattr(getattr(aten, packet), overload), args, dict(node.kwargs))

    return rule


def _alpha(packet: str) -> Callable[[fx.Graph, fx.Node, Any], fx.Node]:
    def rule(graph: fx.Graph, node: fx.Node, tensor: Any) -> fx.Node:
        first, second = (tensor(a) if isinstance(a, FreeFloat) else a for a in node.args)
        factor = node.kwargs.get("alpha", 1)
        if isinstance(factor, FreeFloat):
            second = _like(node, graph.call_function(aten.mul.Tensor, (second, tensor(factor))))
        return graph.call_function(getattr(aten, packet).Tensor, (first, second))

    return rule


def _clamp(graph: fx.Graph, node: fx.Node, tensor: Any) -> fx.Node:
    value, bounds = node.args[0], [*node.args[1:], None, None][:2]
    for bound, limit in zip(bounds, (aten.maximum.default, aten.minimum.default)):
        if isinstance(bound, FreeFloat):
            value = _like(node, graph.call_function(limit, (value, tensor(bound))))
        elif bound is not None:
            keep = (bound, None) if limit is aten.maximum.default else (None, bound)
            value = _like(node, graph.call_function(aten.clamp.default, (value, *keep)))
    return value


def _full(graph: fx.Graph, node: fx.Node, tensor: Any) -> fx.Node:
    number = next(a for a in node.args if isinstance(a, FreeFloat))
    if node.target is aten.scalar_tensor.default:
        return tensor(number)
    zeros = aten.zeros_like.default if node.target is aten.full_like.default else aten.full.default
    args = (node.args[0],) if node.target is aten.full_like.default else (node.args[0], 0)
    start = _like(node, graph.call_function(zeros, args, dict(node.kwargs)))
    return graph.call_function(aten.add.Tensor, (start, tensor(number)))


def _like(node: fx.Node, made: fx.Node) -> fx.Node:
    made.meta.update(node.meta)
    return made


_RULES: dict[Any, Callable[[fx.Graph, fx.Node, Any], fx.Node]] = {
    aten.mul.Tensor: _scalar_to_tensor("mul.Tensor"), aten.mul.Scalar: _scalar_to_tensor("mul.Tensor"),
    aten.div.Tensor: _scalar_to_tensor("div.Tensor"), aten.div.Scalar: _scalar_to_tensor("div.Tensor"),
    aten.add.Tensor: _alpha("add"), aten.sub.Tensor: _alpha("sub"),
    aten.pow.Tensor_Scalar: _scalar_to_tensor("pow.Tensor_Tensor"),
    aten.pow.Scalar: _scalar_to_tensor("pow.Tensor_Tensor"),
    aten.lerp.Scalar: _scalar_to_tensor("lerp.Tensor"),
    aten.masked_fill.Scalar: _scalar_to_tensor("masked_fill.Tensor"),
    aten.clamp.default: _clamp, aten.clamp_min.default: _clamp,
    aten.full_like.default: _full, aten.full.default: _full, aten.scalar_tensor.default: _full,
    **{getattr(aten, n).Scalar: _scalar_to_tensor(f"{n}.Tensor") for n in ("gt", "ge", "lt", "le", "eq", "ne")},
}  # fmt: skip


def lift(graph: fx.Graph, symbols: Symbols, first: fx.Node | None) -> tuple[list[fx.Node], list[FreeNumber]]:
    """Makes a placeholder for every number that an operation takes and that holds symbols.

    first: the node before which placeholders are put. Gives the placeholders, and how each call makes their tensors.
    Raises NotFree where an operation knows no form with a tensor.
    """
    nodes: list[fx.Node] = []
    numbers: list[FreeNumber] = []
    known: dict[FreeNumber, fx.Node] = {}
    unfit: set[str] = set()

    def tensor_for(node: fx.Node) -> Callable[[FreeFloat], fx.Node]:
        def tensor(number: FreeFloat) -> fx.Node:
            found = _number(number.expression, symbols, node)
            if found is None:
                raise NotFree(symbols.paths_in(number.expression))
            if found not in known:
                anchor = first if first is not None else next(iter(graph.nodes))
                with graph.inserting_before(anchor):
                    made = graph.placeholder(f"number_{len(nodes)}")
                made.meta.update(val=torch.empty((), dtype=found.dtype, device=found.device), line="")
                known[found] = made
                nodes.append(made)
                numbers.append(found)
            return known[found]

        return tensor

    for node in list(graph.nodes):
        if node.op != "call_function" or not any(isinstance(a, FreeFloat) for a in _leaves(node)):
            continue
        try:
            rule = _RULES[node.target]
            with graph.inserting_before(node):
                made = rule(graph, node, tensor_for(node))
        except (KeyError, NotFree, StopIteration):
            for leaf in _leaves(node):
                if isinstance(leaf, FreeFloat):
                    unfit |= symbols.paths_in(leaf.expression)
            continue
        if made not in nodes:
            made.meta.update(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    if unfit:
        raise NotFree(unfit)
    return nodes, numbers


def _leaves(node: fx.Node) -> list[Any]:
    found: list[Any] = []
    stack: list[Any] = [*node.args, *node.kwargs.values()]
    while stack:
        value = stack.pop()
        if isinstance(value, (list, tuple)):
            stack.extend(value)
        else:
            found.append(value)
    return found


def _number(expression: sympy.Expr, symbols: Symbols, node: fx.Node) -> FreeNumber | None:
    if any(s not in symbols.paths for s in expression.free_symbols):
        return None  # sizes too: what a call makes of floats alone it can't be
    value = node.meta["val"]
    given = [a.meta.get("val") for a in node.all_input_nodes]
    operand: Any = next((v for v in given if isinstance(v, Tensor)), value)
    dtype = value.dtype if value.dtype.is_floating_point else operand.dtype
    if dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    if not dtype.is_floating_point:
        dtype = torch.get_default_dtype() if value.dtype is not torch.bool else torch.float64
    names = tuple(sorted((str(s), symbols.paths[s]) for s in expression.free_symbols))
    found = FreeNumber(PythonPrinter().doprint(expression), names, dtype, value.device)
    return found if _can_be_made(found, symbols) else None


def _can_be_made(number: FreeNumber, symbols: Symbols) -> bool:
    """Whether the text of an expression is one that Python can compute."""
    try:
        number.tensor({n.path: n.value for n in symbols.numbers})
    except Exception:
        return False
    return True


def is_float(symbol: sympy.Symbol) -> bool:
    """Whether a symbol stands for a Python float."""
    return symbol.name.startswith("zf")  # as torch names them


def has_symbols(value: Any) -> bool:
    """Whether a Python value still holds a symbol of a trace."""
    return isinstance(value, (torch.SymFloat, torch.SymInt, torch.SymBool))


