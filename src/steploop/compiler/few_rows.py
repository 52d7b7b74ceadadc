"""Whether a capture holds for no row or for one, and what of a graph can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from .capture import trace_forward
from .captured import Capture
from .dependencies import Dependencies, Number
from .ir.graph import Size, expression
from .memory_operator import tracing
from .ops.table import operation_of
from .passes.manager import simplify
from .program import Program
from .recorder import Recorder
from .stages import aside
from .trace import Leaf, Observed, Signature, Trace


def same_for_few(capture: Capture, batch: int, program: Program, dependencies: Dependencies) -> bool:
    """Whether the step does the same with 0 rows, or with 1, as with several: it may look at the batch size."""
    if batch not in capture.like:
        free = capture.free(dependencies)
        inline = set(capture.inline)
        capture.like[batch] = does_the_same(capture.forward, capture.signature, batch, inline, program, free)
    return capture.like[batch]


def does_the_same(
    trace: Trace, signature: Signature, batch: int, inline: set[int], program: Program, free: Sequence[Number]
) -> bool:
    groups = (signature.xs, signature.constants, signature.states)
    few = Signature(*([_with_rows(leaf, batch) for leaf in group] for group in groups), batch, signature.dynamic)
    try:
        with aside(), tracing(inline) as memory:
            other = trace_forward(program, few, False, Observed(Recorder(), free))
        other.keep_alive.extend(memory.calls)
    except Exception:
        return False
    with aside():
        simplify(other.graph)
    return essence(trace, batch) == essence(other, batch)


def _with_rows(leaf: Leaf, batch: int) -> Leaf:
    shape = (batch, *leaf.shape[1:]) if leaf.batched else leaf.shape
    return Leaf(shape, leaf.dtype, leaf.device, leaf.batched)


def essence(trace: Trace, batch: int | None) -> list[Any]:
    """What a trace computes with so many rows (None: any): its calls with their arguments, but for those that only
    shape."""
    graph = trace.graph
    values = {s: sympy.Symbol("_".join(map(str, place))) for s, place in graph.symbols.items()}
    if graph.batch is not None and batch is not None:
        values[graph.batch] = sympy.Integer(batch)
    named: dict[fx.Node, Any] = {}
    calls: list[Any] = []

    def plain(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return named[argument]
        if isinstance(argument, Size):
            return str(argument.expr.xreplace(values))
        if isinstance(argument, (list, tuple)):
            return tuple(map(plain, argument))
        if isinstance(argument, torch.ScriptObject):  # Python makes a new name for it at every look
            return str(argument._type())
        return str(argument) if isinstance(argument, int) and not isinstance(argument, bool) else repr(argument)

    for node in graph.graph.nodes:
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        if node.op == "placeholder":
            named[node] = f"input {len(named)}"
        elif node.op == "call_function" and operation_of(node).view == "shape":
            named[node] = named[node.all_input_nodes[0]] if node.all_input_nodes else name
        elif node.op == "call_function" and name in ("permute", "transpose", "t"):
            order, source = _order_of_axes(node, name, values), named[node.args[0]]
            named[node] = source if order == sorted(order) else f"call {len(calls)}"
            calls += [("permute", source, order)] if order != sorted(order) else []
        elif node.op == "call_function":
            named[node] = f"call {len(calls)}"
            kwargs = tuple((k, plain(v)) for k, v in sorted(node.kwargs.items()))
            args = [a for i, a in enumerate(node.args) if i != _HANDLE_AT.get(node.target)]
            calls.append((str(node.target), plain(args), kwargs))
    return [*calls, *(named[n] for n in (*graph.outputs, *graph.nexts))]


# Which argument is the number of something made in the trace: a loop, or a remembering operation.
_HANDLE_AT = {
    torch.ops.steploop.inner_loop.default: 1, torch.ops.steploop.inner_loop_backward.default: 3,
    torch.ops.steploop.memory.default: 1, torch.ops.steploop.memory_backward.default: 2,
}  # fmt: skip


def _order_of_axes(node: fx.Node, name: str, values: dict[Any, Any]) -> list[int]:
    """The axes of a permutation, but for those of size 1: torch moves them otherwise where the batch is one."""
    rank = node.meta["val"].dim()
    order = list(range(rank))
    if name == "permute":
        order = [d % rank for d in node.args[1]]
    elif rank:
        a, b = (0, rank - 1) if name == "t" else (d % rank for d in node.args[1:3])
        order[a], order[b] = order[b], order[a]
    sizes = [sympy.sympify(expression(n)).xreplace(values) for n in node.args[0].meta["val"].shape]
    return [d for d in order if sizes[d] != 1]
