"""Whether a capture holds for no row or for one, and what of a graph can tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import dropwhile
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from .capture import Capture
from .dependencies import Dependencies
from .free_numbers import FreeNumber
from .invocation import HELD
from .ir.graph import Size, StepGraph, expression
from .memory_operator import call_of, tracing
from .ops.table import operation_of
from .passes.manager import simplify
from .program import Program, roots_of
from .reads import EVERYTHING
from .recorder import Recorder
from .stages import aside
from .trace import Leaf, Observed, Signature, Trace
from .trace_step import trace_forward
from .walk import Number


def same_for_few(capture: Capture, batch: int, program: Program, dependencies: Dependencies) -> bool:
    """Whether the step does the same with 0 rows, or with 1, as with several: it may look at the batch size."""
    if batch not in capture.like:
        free = capture.free(dependencies)
        inline = set(capture.inline)
        slots = capture.slots_in(dependencies)
        tensors = [s if isinstance(s, FreeNumber) else t for s, t in zip(slots, capture.tensors(dependencies))]
        capture.like[batch] = does_the_same(
            capture.forward, capture.signature, batch, inline, program, free, tensors
        )
    return capture.like[batch]


def does_the_same(
    trace: Trace, signature: Signature, batch: int, inline: set[int], program: Program, free: Sequence[Number],
    tensors: Sequence[Any] | None = None,
) -> bool:  # fmt: skip
    """tensors: those of the trace, where it has forgotten them."""
    groups = (signature.xs, signature.constants, signature.states)
    xs, constants, states = ([_with_rows(leaf, batch) for leaf in group] for group in groups)
    few = Signature(xs, constants, states, batch, signature.dynamic)
    try:
        with aside(), tracing(inline) as memory:
            other = trace_forward(program, few, False, Observed(Recorder(), free))
        other.keep_alive.extend(memory.calls)
    except Exception:
        return False
    with aside():
        simplify(other.graph)
    if trace.detached != other.detached or trace.out_spec != other.out_spec:
        return False
    outside = _outside(program)
    names = [_names(found, outside) for found in (trace.tensors if tensors is None else tensors, other.tensors)]
    return essence(trace, batch, names[0]) == essence(other, batch, names[1])


def _outside(program: Program) -> set[int]:
    """The tensors that the step did not make itself, by their ids."""
    with _disable_current_modes():
        return set(map(id, Dependencies(roots_of(program), EVERYTHING).tensors))


def _names(tensors: Sequence[Any], outside: set[int]) -> list[Any]:
    """What tensors are: those from outside themselves, those that the step made of numbers by these."""
    found: list[Any] = []
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            found.append(tensor)
        elif id(tensor) in outside or not _has_plain_numbers(tensor):
            found.append(id(tensor))
        else:
            values = tensor.cpu().contiguous().flatten().view(torch.uint8)
            found.append((tensor.dtype, tensor.device, tuple(tensor.shape), bytes(values.numpy())))
    return found


def _has_plain_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is what its memory holds, and nothing else."""
    plain = type(tensor) is Tensor and tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_meta)
    return plain and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg())


def _with_rows(leaf: Leaf, batch: int) -> Leaf:
    shape = (batch, *leaf.shape[1:]) if leaf.batched else leaf.shape
    return Leaf(shape, leaf.dtype, leaf.device, leaf.batched)


def essence(trace: Trace, batch: int | None, tensors: Sequence[Any] | None = None) -> list[Any]:
    """What a trace computes with so many rows (None: any): its calls with their arguments.

    tensors: names of those that it captured (None: they are told apart by their order).

    Left out are calls that only shape, and those whose values nobody reads. Two equal calls are one. Where the number
    of rows is known, torch may write the same otherwise: a tensor full of one number is that number and its shape, and
    the product of a matrix with a vector is that of the vector with the matrix turned.
    """
    return _Essence(trace.graph, batch, tensors).found()


class _Essence:
    def __init__(self, graph: StepGraph, batch: int | None, tensors: Sequence[Any] | None) -> None:
        self.graph, self.batch = graph, batch
        self.captured = dict(zip(graph.captured, tensors)) if tensors is not None else {}
        inputs = [*graph.xs, *graph.constants, *graph.prevs, *(graph.captured if tensors is None else ())]
        self.given = {node: f"input {i}" for i, node in enumerate(inputs)}
        self.values = {s: sympy.Symbol("_".join(map(str, place))) for s, place in graph.symbols.items()}
        if graph.batch is not None and batch is not None:
            self.values[graph.batch] = sympy.Integer(batch)
        self.named: dict[fx.Node, str] = {}
        self.calls: list[Any] = []
        self.numbers: dict[str, str] = {}  # of calls that may be taken for each other
        self.turns: dict[str, tuple[str, list[int], list[Any]]] = {}  # see `_turned`

    def found(self) -> list[Any]:
        read = _read(self.graph)
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                self.named[node] = self.given.get(node) or f"tensor {self.captured.get(node, node.name)}"
            elif node.op == "call_function" and node in read:
                self.named[node] = self._name(node)
        results = [*self.graph.outputs, *self.graph.nexts]
        return [*self.calls, *((self.named[n], n.meta["val"].dtype, self._shape(n)) for n in results)]

    def _name(self, node: fx.Node) -> str:
        name = _packet(node)
        if operation_of(node).view == "shape":
            return self._shaped(node)
        if name in ("permute", "transpose", "t"):
            return self._turned(node.args[0], _order_of_axes(node, name))
        if _number_in(node) is not None:
            value = node.meta["val"]
            return self._numbered("full", self._long(node), _number_in(node), value.dtype, value.device)
        if name in ("mm", "bmm"):
            return self._product(node)
        kwargs = tuple((k, self._plain(v)) for k, v in sorted(node.kwargs.items()))
        args = [self._made(node) if i == _HANDLE_AT.get(node.target) else self._plain(a)
                for i, a in enumerate(node.args)]  # fmt: skip
        dtypes = [v.dtype for v in tree_leaves(node.meta["val"]) if isinstance(v, Tensor)]
        return self._numbered(
            str(node.target), args, kwargs, self._layout(node), dtypes, repeatable=_repeatable(node)
        )

    def _made(self, node: fx.Node) -> Any:
        """What a call names by a number: a loop inside the step, or a call of a remembering operation."""
        if node.target in _OF_MEMORY:
            call = call_of(node)
            return id(call.op), call.xs, call.constants, call.states, call.whole
        loop = HELD[node.args[_HANDLE_AT[node.target]]]
        rows = None if loop.trace.graph.batch is None else self.batch
        return essence(loop.trace, rows), loop.trace.detached, loop.reverse, loop.on_masked

    def _numbered(self, *call: Any, repeatable: bool = True) -> str:
        """The name of a call's value. Calls that only shape have no names: the shapes are part of the calls."""
        number = f"call {len(self.calls)}"
        if repeatable and (known := self.numbers.setdefault(repr(call), number)) != number:
            return known
        self.calls.append(call)
        return number

    def _shaped(self, node: fx.Node) -> str:
        """The name of what is shaped, unless its numbers are repeated."""
        source = node.args[0]
        if isinstance(node.meta["val"], Tensor) and math.prod(self._shape(node)) != math.prod(self._shape(source)):
            shapes = [self._shape(source), self._shape(node)]
            return self._numbered("repeated", self.named[source], _broadcast(shapes))
        return self.named[source]

    def _product(self, node: fx.Node) -> str:
        left, right = node.args
        *batch, rows, inner = self._shape(left)
        columns = self._shape(right)[-1]
        if columns == 1 != rows:
            turned = [*range(len(batch)), -1, -2]
            left, right, rows, columns = right, self._turned(left, turned), columns, rows
        names = [n if isinstance(n, str) else self.named[n] for n in (left, right)]
        return self._numbered("product", *names, [*batch, rows, inner, columns])

    def _turned(self, source: fx.Node, axes: Sequence[int]) -> str:
        """The name of a value whose axes come in another order. Axes of size 1 do not count, and two turns are one."""
        shape = self._shape(source)
        long = [d for d, n in enumerate(shape) if n != 1]
        order = [long.index(d % len(shape)) for d in axes if d % len(shape) in long]
        name, sizes = self.named[source], self._long(source)
        first = self.turns.get(name)
        if first is not None and [first[2][i] for i in first[1]] == sizes:
            name, order, sizes = first[0], [first[1][i] for i in order], first[2]
        if order == sorted(order):
            return name
        number = self._numbered("turned", name, order, sizes)
        self.turns[number] = name, order, sizes
        return number

    def _layout(self, node: fx.Node) -> list[Any]:
        """What the shapes of its inputs say of a call."""
        if operation_of(node).pointwise:
            return _broadcast([self._shape(i) for i in node.all_input_nodes if isinstance(i.meta["val"], Tensor)])
        shapes = list(map(self._shapes, node.all_input_nodes))
        if _packet(node) == "index_put":  # its values are broadcast
            shapes[-1] = [list(dropwhile(lambda n: n == 1, s)) for s in shapes[-1]]
        return shapes

    def _plain(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self.named[argument]
        if isinstance(argument, Size):
            return str(argument.expr.xreplace(self.values))
        if isinstance(argument, (list, tuple)):
            return tuple(map(self._plain, argument))
        if isinstance(argument, torch.ScriptObject):  # Python makes a new name for it at every look
            return str(argument._type())
        return str(argument) if isinstance(argument, int) and not isinstance(argument, bool) else repr(argument)

    def _shapes(self, node: fx.Node) -> list[Any]:
        return [self._shape_of(v) for v in tree_leaves(node.meta["val"]) if isinstance(v, Tensor)]

    def _shape(self, node: fx.Node) -> list[Any]:
        return self._shape_of(node.meta["val"])

    def _long(self, node: fx.Node) -> list[Any]:
        """The shape without axes of size 1."""
        return [n for n in self._shape(node) if n != 1]

    def _shape_of(self, value: Tensor) -> list[Any]:
        return [sympy.sympify(expression(n)).xreplace(self.values) for n in value.shape]


def _broadcast(shapes: list[list[Any]]) -> list[tuple[Any, list[bool]]]:
    """The axes of a result whose numbers each depend on one number of every input: the size of an axis, and which
    inputs have one number for all of it. Neighbours of one kind are one axis."""
    rank = max(map(len, shapes), default=0)
    axes: list[tuple[Any, list[bool]]] = []
    for sizes in zip(*([*[1] * (rank - len(s)), *s] for s in shapes)):
        size, alike = next((n for n in sizes if n != 1), 1), [n == 1 for n in sizes]
        if size != 1 and axes and axes[-1][1] == alike:
            axes[-1] = axes[-1][0] * size, alike
        elif size != 1:
            axes.append((size, alike))
    return axes


def _read(graph: StepGraph) -> set[fx.Node]:
    """The nodes whose values the step's results are made of, and all calls that do not only compute."""
    left = [*graph.outputs, *graph.nexts, *(n for n in graph.graph.nodes if not _repeatable(n))]
    found: set[fx.Node] = set()
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes if node.op == "call_function" and _number_in(node) is None else []
    return found


def _repeatable(node: fx.Node) -> bool:
    """Whether a call computes the same each time, and does nothing else."""
    of_torch = getattr(node.target, "namespace", "aten") in ("aten", "prims")
    return node.op == "call_function" and of_torch and not operation_of(node).random


def _number_in(node: fx.Node) -> str | None:
    """The number that a call fills a tensor with, where it is known."""
    name = _packet(node)
    if name in ("zeros", "zeros_like", "new_zeros"):
        return "0"
    if name in ("ones", "ones_like", "new_ones"):
        return "1"
    at = {"full": 1, "full_like": 1, "new_full": 2}.get(name)
    return None if at is None or isinstance(node.args[at], fx.Node) else repr(node.args[at])


def _packet(node: fx.Node) -> str:
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


_OF_MEMORY = (torch.ops.steploop.memory.default, torch.ops.steploop.memory_backward.default)
# Which argument is the number of something made in the trace: a loop, or a remembering operation.
_HANDLE_AT = {
    torch.ops.steploop.inner_loop.default: 1, torch.ops.steploop.inner_loop_backward.default: 3,
    torch.ops.steploop.memory.default: 1, torch.ops.steploop.memory_backward.default: 2,
}  # fmt: skip


def _order_of_axes(node: fx.Node, name: str) -> list[int]:
    rank = node.args[0].meta["val"].dim()
    if name == "permute":
        return list(node.args[1])
    order = list(range(rank))
    if rank:
        a, b = (0, rank - 1) if name == "t" else node.args[1:3]
        order[a], order[b] = order[b], order[a]
    return order
