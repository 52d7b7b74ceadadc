"""In-place operations that are left in a traced graph.

What a step's own values go through is functional already. Left are operations on tensors that the step did
not get from its inputs: a closed-over tensor itself, whose change is refused, or something made of such
tensors alone (`scale = self.scale.clone(); scale.add_(1)`), which is rewritten.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from ..errors import StepError
from .refusals import KEEP

aten = torch.ops.aten


def changes_in_place(line: str) -> StepError:
    return StepError(f"the step changes a tensor in place that is not its own ({line}).\n{KEEP}")


def writes_real_tensor(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether a torch call is about to write into a tensor of the user's: a trace runs such a call for real."""
    name = getattr(function, "__name__", "")
    if isinstance(kwargs.get("out"), Tensor):
        return _is_real(kwargs["out"])
    if name == "__set__":
        return _is_real(args[0]) and getattr(function, "__self__", None) is Tensor.data
    in_place = name in _OPERATORS or (name.endswith("_") and not name.endswith("__") and name not in _HARMLESS)
    return in_place and len(args) > 0 and _is_real(args[0])


def _is_real(value: Any) -> bool:
    """Tracing types are subclasses; the user's own are plain. What torch.func wraps (plain too) is looked at."""
    while isinstance(value, Tensor) and is_functorch_wrapped_tensor(value):
        value = get_unwrapped(value)
    return type(value) in (Tensor, torch.nn.Parameter)


_HARMLESS = {"requires_grad_", "share_memory_", "rename_"}
_OPERATORS = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
              "__ipow__", "__iand__", "__ior__", "__ixor__"}  # fmt: skip


def make_functional(graph: fx.Graph) -> None:
    """Rewrites every in-place operation of a graph, or raises StepError with the user's line."""
    position = {n: i for i, n in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        changed = _changed(node)
        if changed is not None:
            _rewrite(graph, node, changed, position)


def _changed(node: fx.Node) -> fx.Node | None:
    """The value that a call writes into."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return None
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.kwargs.get(argument.name, node.args[i] if i < len(node.args) else None)
            if isinstance(value, fx.Node):
                return value
    return None


def _origin(node: fx.Node) -> fx.Node:
    """The value whose memory a node shows."""
    while node.op == "call_function" and _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not node.all_input_nodes:
        return False
    return any(r.alias_info is not None for r in schema.returns)


def _rewrite(graph: fx.Graph, node: fx.Node, changed: fx.Node, position: dict[fx.Node, int]) -> None:
    origin = _origin(changed)
    line = node.meta.get("line", "")
    if origin.op != "call_function":
        raise changes_in_place(line)
    name = cast(torch._ops.OpOverload, node.target).overloadpacket.__name__
    functional = getattr(aten, name[:-1], None) if name.endswith("_") else None
    overload = getattr(functional, cast(torch._ops.OpOverload, node.target)._overloadname, None)
    viewed = any(_is_view(u) for u in origin.users if _changed(u) is None)
    if overload is None or origin is not changed or viewed or overload._schema.is_mutable:
        raise StepError(
            f"the step changes a part of a tensor in place that it made of closed-over tensors alone ({line}). "
            "Write it without in-place operations: torch.where, torch.cat, or index_put instead of index_put_."
        )
    with graph.inserting_before(node):
        made = graph.call_function(overload, node.args, node.kwargs)
    made.meta.update(node.meta)
    made = _in_dtype(graph, node, made, changed.meta["val"])
    later = position[node]
    node.replace_all_uses_with(made)
    changed.replace_all_uses_with(made, delete_user_cb=lambda user: position.get(user, -1) > later)
    graph.erase_node(node)


def _in_dtype(graph: fx.Graph, node: fx.Node, made: fx.Node, like: Any) -> fx.Node:
    """An in-place operation keeps the dtype of what it changes; the functional one may promote."""
    if not isinstance(like, Tensor):
        return made
    with graph.inserting_before(node):
        cast = graph.call_function(aten._to_copy.default, (made,), {"dtype": like.dtype})
    cast.meta.update(node.meta)
    return cast
