"""The values that the stages of the compiler hand to each other: a step as a graph, and one loop of it.

The intermediate representation is `torch.fx`: straight-line ATen calls, functional, in topological order.
Every node carries in `node.meta`
    val    the fake tensor (or tuple of them) with its shape and dtype; the batch size is a symbol
    line   "file.py:14", the user's source line, or "" where none is known
    rows   a `Rows` (or a tuple of them, for several results): where the batch axis is; None: no batch axis
    varies whether the value differs from step to step
Sizes that depend on symbols stand in node arguments as `Size` (never as nodes), so that a piece of a graph
can be run for other batch sizes than the one it was captured with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves


class Size:
    """A symbolic size in a node's arguments, e.g. `4*B`."""

    __slots__ = ("expr",)

    def __init__(self, expr: sympy.Expr):
        self.expr = expr

    def at(self, sizes: Mapping[sympy.Symbol, int]) -> int:
        return int(self.expr.xreplace({k: sympy.Integer(v) for k, v in sizes.items()}))

    def __repr__(self) -> str:
        return f"Size({self.expr})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Size) and self.expr == other.expr

    def __hash__(self) -> int:
        return hash(self.expr)


def expression(size: Any) -> sympy.Expr | int:
    """The sympy expression of an int, SymInt or Size."""
    if isinstance(size, Size):
        return size.expr
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return size


def size_at(size: sympy.Expr | int, sizes: Mapping[str, int]) -> int:
    """A size as a number; `sizes` has the values of the symbols by their names."""
    if isinstance(size, int):
        return size
    return int(size.xreplace({s: sympy.Integer(sizes[str(s)]) for s in size.free_symbols}))


def shape_at(value: Tensor, sizes: Mapping[str, int]) -> list[int]:
    """The shape of a node's value in a call with these sizes."""
    return [size_at(expression(n), sizes) for n in value.shape]


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of a tensor as ints and sympy expressions (comparable, without adding conditions)."""
    return tuple(expression(s) for s in node.meta["val"].shape)


def symbols_of(node: fx.Node) -> set[sympy.Symbol]:
    """The symbols of sizes in what a node gives and in what it is given."""
    found: set[sympy.Symbol] = set()
    for leaf in tree_leaves((node.meta.get("val"), node.args, node.kwargs)):
        for size in leaf.shape if isinstance(leaf, Tensor) else [leaf]:
            if isinstance(size, (torch.SymInt, Size)):
                found |= cast(sympy.Expr, expression(size)).free_symbols
    return found


@dataclass(frozen=True)
class Rows:
    """Where the batch axis is in a tensor: axis `dim` has size outer * B * inner, the batch index in the middle.

    inner may be a size that only a call knows, e.g. the length of a memory whose frames are all multiplied at once.
    """

    dim: int
    outer: int = 1
    inner: int | sympy.Expr = 1

    def at(self, sizes: Mapping[str, int]) -> Rows:
        """With numbers for what is a symbol, by the symbols' names."""
        return self if isinstance(self.inner, int) else Rows(self.dim, self.outer, size_at(self.inner, sizes))

    def split(self, value: Tensor) -> Tensor:
        """The value, whose inner size is a number, with its rows as an axis of its own: (..., outer, B, inner, ..)."""
        return value.unflatten(self.dim, (self.outer, value.shape[self.dim] // (self.outer * self.inner), self.inner))

    def narrow(self, value: Tensor, first: int, count: int) -> Tensor:
        """The value of rows first .. first + count - 1 alone."""
        if self.outer == 1:
            return value.narrow(self.dim, first * self.inner, count * self.inner)
        return self.split(value).narrow(self.dim + 1, first, count).flatten(self.dim, self.dim + 2)

    @property
    def plain(self) -> bool:
        return self.outer == 1 and self.inner == 1


# The lists of a StepGraph, by what stands in them.
INPUTS = ("xs", "constants", "prevs", "captured", "ct_outputs", "ct_nexts")
GRADIENTS = ("grad_xs", "grad_constants", "grad_prevs", "grad_captured")
RESULTS = ("outputs", "nexts", *GRADIENTS)
ROLES = (*INPUTS[:4], "outputs", "nexts", *INPUTS[4:], *GRADIENTS)


@dataclass(frozen=True)
class Analysis:
    """What `passes.rows` found: the nodes that mix rows, with the reason. The rest it wrote on the nodes.

    per_step: the nodes of which the value of every step is wanted, and not only a sum over the steps.
    """

    per_step: tuple[fx.Node, ...]
    mixing: dict[fx.Node, str]


@dataclass(eq=False)
class StepGraph:
    """One step (forward, or forward and backward together) as a graph with the roles of its inputs and outputs.

    In a joint graph the cotangents are inputs and the gradients results; these lists (`ct_*`, `grad_*`) are empty in a
    forward graph. Entries of `grad_*` are None where no gradient flows.
    known: the last analysis of the rows, None once the graph has changed since.
    """

    graph: fx.Graph
    batch: sympy.Symbol | None
    symbols: dict[sympy.Symbol, tuple[str, int, int]]  # symbol -> (kind of input, index, dim) it is read from
    xs: list[fx.Node]
    constants: list[fx.Node]
    prevs: list[fx.Node]
    captured: list[fx.Node]
    outputs: list[fx.Node]
    nexts: list[fx.Node]
    ct_outputs: list[fx.Node] = field(default_factory=list)
    ct_nexts: list[fx.Node] = field(default_factory=list)
    grad_xs: list[fx.Node | None] = field(default_factory=list)
    grad_constants: list[fx.Node | None] = field(default_factory=list)
    grad_prevs: list[fx.Node | None] = field(default_factory=list)
    grad_captured: list[fx.Node | None] = field(default_factory=list)
    ends: int | None = None  # see `Program`
    known: Analysis | None = None

    def results(self, *roles: str) -> list[fx.Node]:
        """The nodes in the given roles, each once; without roles, all that the step gives."""
        return list(dict.fromkeys(n for role in roles or RESULTS for n in getattr(self, role) if n is not None))

    def map_results(self, change: Callable[[fx.Node], fx.Node]) -> None:
        """Puts other nodes in the place of results."""
        for role in RESULTS:
            getattr(self, role)[:] = [None if n is None else change(n) for n in getattr(self, role)]

    def edited(self) -> None:
        """Whoever changes the graph says so: what was found out about it is forgotten."""
        self.known = None


@dataclass(eq=False)
class LoopInput:
    """An input of a loop.

    kind "step": one value per step. With rows at axis d it comes packed, the rows of all steps along d one
         step after the other; without rows it comes stacked, (T, ...).
    kind "once": the same at every step. With rows it has all B rows (in the schedule's row order).
    """

    node: fx.Node
    kind: str
    rows: Rows | None
    name: str


@dataclass(eq=False)
class LoopProgram:
    """What must run one step after the other: one component of the step graph, as a graph of its own.

    `graph` holds placeholders and ATen calls of one step, in order. `prevs[i]` is the placeholder of state i,
    `nexts[i]` its new value (a node, possibly a placeholder); axis 0 of a state is the batch unless
    `batch` is None. `kept` are values wanted from every step: packed along their rows axis, or
    stacked (T, ...) where they have none. `names` are the users' names of the states.

    ends: a state, (B,) bool. In a row where it is set before a step, no state changes any more, and what is kept of
    that step and of those after it may be the same.

    Once it is known what runs it: backend, its name; reasons, why faster ones don't, as (reason, source line);
    launched, how it is launched where that is not the usual way.
    """

    graph: fx.Graph
    batch: sympy.Symbol | None
    prevs: list[fx.Node]
    nexts: list[fx.Node]
    inputs: list[LoopInput]
    kept: list[fx.Node]
    names: list[str]
    mixes_rows: bool = False
    ends: int | None = None
    backend: str = ""
    reasons: list[tuple[str, str]] = field(default_factory=list)
    launched: str = ""

    @property
    def calls(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "call_function"]


def rows_of(node: fx.Node) -> Rows | None:
    return node.meta.get("rows")


def line_of(node: fx.Node) -> str:
    return node.meta.get("line", "")


def op_name(node: fx.Node) -> str:
    """The ATen packet of a call, e.g. "mm"; the name of an operation from elsewhere has its namespace: "mine::mm"."""
    return packet_name(node.target)


def packet_name(target: Any) -> str:
    packet = getattr(target, "overloadpacket", None)
    if packet is None:
        return getattr(target, "__name__", str(target))
    if target.namespace in ("aten", "prims", "steploop"):
        return packet.__name__
    return f"{target.namespace}::{packet.__name__}"
