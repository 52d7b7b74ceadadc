"""From what torch has traced to a graph of ATen calls, with real tensors as inputs and sizes as expressions."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .free_numbers import FreeFloat, is_float
from .ir.graph import Size, expression
from .ops.table import operation_of
from .passes.gradients import FIRST_FACTOR
from .refusals import traces_itself

_SQUEEZES = {torch.ops.aten.squeeze.default, torch.ops.aten.squeeze.dim, torch.ops.aten.squeeze.dims}


class RealTensors:
    """The real tensors of a traced module, each once, in the order they were met.

    objects: what else it refers to, by name: random generators, packed weights of quantised layers.
    fixed: numbers that the trace made of sizes, and that are fixed in the graph.
    detached: what was detached, by the names of torch's trace: a graph without gradients does not show it.
    """

    def __init__(self, module: fx.GraphModule, env: ShapeEnv):
        self.tensors: list[Tensor] = []
        self.index: dict[str, int] = {}
        self.objects: dict[str, Any] = {}
        self.fixed: list[Any] = []
        self.detached: list[str] = []
        numbers: dict[int, int] = {}
        for node in module.graph.nodes:
            if node.op != "get_attr" or node.target in self.index:
                continue
            tensor = operator.attrgetter(node.target)(module)
            if not isinstance(tensor, Tensor):
                self.objects[node.target] = tensor
                continue
            if isinstance(tensor, FakeTensor):
                if tensor.constant is None and tensor.fake_mode.shape_env is env:
                    raise traces_itself()
                tensor = tensor.constant if tensor.constant is not None else tensor
            if id(tensor) not in numbers:
                numbers[id(tensor)] = len(self.tensors)
                self.tensors.append(tensor)
            self.index[node.target] = numbers[id(tensor)]


def rebuild(graph: fx.Graph, captured: RealTensors, env: ShapeEnv) -> fx.Graph:
    """The traced graph with real tensors as inputs, sizes as `Size`, and without copies of whole values."""
    aten = torch.ops.aten
    new = fx.Graph()
    made: dict[fx.Node, Any] = {}
    real = []
    for i in range(len(captured.tensors)):
        node = new.placeholder(f"captured_{i}")
        real.append(node)
    copies = {
        aten.clone.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default,
        aten.lift_fresh.default, aten.lift.default, aten.view_as.default if hasattr(aten, "view_as") else None,
        aten.contiguous.default,
    }  # fmt: skip

    def convert(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return made[argument]
        if isinstance(argument, torch.SymInt):
            return _size(env, argument)
        if isinstance(argument, torch.SymFloat):
            return _plain(argument, captured.fixed)
        if isinstance(argument, (list, tuple)):
            return type(argument)(convert(a) for a in argument) if type(argument) in (list, tuple) else [
                convert(a) for a in argument
            ]
        if isinstance(argument, dict):
            return {k: convert(v) for k, v in argument.items()}
        return argument

    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "get_attr" and node.target in captured.objects:
            made[node] = captured.objects[node.target]
        elif node.op == "get_attr":
            made[node] = real[captured.index[node.target]]
            made[node].meta.setdefault("val", _value(captured, node, value))
            made[node].meta.setdefault("line", "")
        elif node.op == "placeholder" and isinstance(value, torch.SymFloat):
            made[node] = _plain(value, captured.fixed)
        elif node.op == "placeholder":
            made[node] = new.placeholder(node.name)
            made[node].meta.update(val=value, line="")
        elif node.op == "output":
            new.output([convert(a) for a in node.args[0]])
        elif isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
            made[node] = _size(env, value)
        elif isinstance(value, (torch.SymFloat, torch.SymBool, float, bool)) and not _has_tensor(node):
            made[node] = _plain(value, captured.fixed)
        elif node.target in copies and not _changes_memory(node):
            if node.target is aten.detach.default:
                captured.detached.append(_source(node))
            made[node] = made[node.args[0]]
        elif node.target in _SQUEEZES and not (axes := _axes_of_one(node)):
            made[node] = made[node.args[0]]
        else:
            target, args = node.target, node.args
            if target in _SQUEEZES and target is not aten.squeeze.dim:
                target, args = aten.squeeze.dims, (args[0], axes)
            call = new.call_function(target, convert(args), convert(dict(node.kwargs)))
            call.meta.update(val=value, line=node.meta.get("line", ""))
            if node.target in FIRST_FACTOR:  # by its strides, which a copy may have changed
                call.meta["contiguous"] = node.args[0].meta["val"].is_contiguous()
            made[node] = call
    return new


def _axes_of_one(node: fx.Node) -> list[int]:
    """The axes that a squeeze takes away in the trace. One of the batch's size stays, also where a call has one row."""
    shape = cast(fx.Node, node.args[0]).meta["val"].shape
    asked = node.args[1] if len(node.args) > 1 else range(len(shape))
    dims = [asked] if isinstance(asked, int) else cast("Sequence[int]", asked)
    return [d % len(shape) for d in dims if len(shape) and expression(shape[d]) == 1]


def _source(node: fx.Node) -> str:
    """What a value was computed as, before it was shaped. (How often names have come before differs with few rows.)"""
    while node.op == "call_function" and (operation_of(node).view or operation_of(node).moves) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    name = node.name if node.op == "placeholder" else re.sub(r"_\d+$", "", node.name)
    return name.replace("select_scatter", "slice_scatter")


def _changes_memory(node: fx.Node) -> bool:
    """Whether a copy is more than the same numbers again.

    It may resolve a tensor that is only marked as conjugate or negative. Or it may lay out a tensor of the step's own
    anew, where an operation after it needs that.
    """
    source, made = cast(fx.Node, node.args[0]), node.meta.get("val")
    value = source.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(made, Tensor):
        return False
    if value.is_conj() != made.is_conj() or value.is_neg() != made.is_neg():
        return True
    return source.op == "get_attr" and made.is_contiguous() and not value.is_contiguous()


def _has_tensor(node: fx.Node) -> bool:
    return any(isinstance(n.meta.get("val"), Tensor) for n in node.all_input_nodes)


def _plain(value: Any, fixed: list[Any]) -> Any:
    if isinstance(value, torch.SymFloat):
        expr = value.node.expr
        if expr.free_symbols and all(map(is_float, expr.free_symbols)):
            return FreeFloat(expr)
        fixed.append(expr)
        return float(value)  # a number made of sizes is fixed here, by a condition on them
    return bool(value) if isinstance(value, torch.SymBool) else value


def _value(captured: RealTensors, node: fx.Node, value: Any) -> Any:
    if value is not None:
        return value
    tensor = captured.tensors[captured.index[cast(str, node.target)]]
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def _size(env: ShapeEnv, value: Any) -> Any:
    expr = env.simplify(expression(value)) if isinstance(value, torch.SymInt) else value
    if any(map(is_float, getattr(expr, "free_symbols", ()))):
        return int(value)  # a size made of a float is fixed here, by a condition on that
    return int(expr) if isinstance(expr, int) or expr.is_number else Size(expr)
