"""Edits a step graph: new calls with their values, replacing, removing what nobody uses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils._python_dispatch import _disable_current_modes

from .graph import Size, StepGraph, expression


def sizes_of(shape: Iterable[Any]) -> list[Any]:
    """Sizes as they stand in a node's arguments."""
    return [e if isinstance(e, int) else Size(e) for e in map(expression, shape)]


def values(argument: Any, mode: Any) -> Any:
    """An argument of a call with the fake values of its nodes, and symbolic sizes."""
    if isinstance(argument, fx.Node):
        return argument.meta["val"]
    if isinstance(argument, Size):
        return mode.shape_env.create_symintnode(argument.expr, hint=None)
    if isinstance(argument, (list, tuple)):
        return [values(a, mode) for a in argument]
    if isinstance(argument, dict):
        return {k: values(a, mode) for k, a in argument.items()}
    return argument


def call(before: fx.Node, target: Any, *args: Any, line: str | None = None, **kwargs: Any) -> fx.Node:
    """A new call in front of a node, with its value's metadata."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    fake = next(v for v in _tensors(args) if hasattr(v, "fake_mode"))
    with _disable_current_modes(), enable_python_dispatcher(), fake.fake_mode, torch.no_grad():
        node.meta["val"] = target(*values(args, fake.fake_mode), **kwargs)
    node.meta["line"] = before.meta.get("line", "") if line is None else line
    node.meta["ran"] = True  # the checker need not do it again
    return node


def made(before: fx.Node, target: Any, *args: Any, like: Tensor) -> fx.Node:
    """A value made from sizes, in front of a node, with the metadata of another."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, {"dtype": like.dtype, "device": like.device})
    node.meta.update(val=like, line=before.meta.get("line", ""))
    return node


def _tensors(args: Iterable[Any]) -> Iterable[Tensor]:
    for a in args:
        if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), Tensor):
            yield a.meta["val"]
        elif isinstance(a, (list, tuple)):
            yield from _tensors(a)


def replace(step: StepGraph, old: fx.Node, new: fx.Node) -> None:
    """Puts `new` wherever `old` is used, in the roles of the step too."""
    old.replace_all_uses_with(new)
    step.map_results(lambda node: new if node is old else node)
    step.edited()


def calls(step: StepGraph, *targets: Any) -> list[fx.Node]:
    return [n for n in step.graph.nodes if n.op == "call_function" and (not targets or n.target in targets)]


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def remove_dead(step: StepGraph) -> None:
    """Calls whose value nobody uses. Nothing in a captured step has side effects."""
    results = step.results()
    output = next((n for n in step.graph.nodes if n.op == "output"), None)
    if output is not None:
        output.args = (results,)
    else:
        step.graph.output(results)
    for node in reversed(list(step.graph.nodes)):
        if node.op == "call_function" and not node.users:
            step.graph.erase_node(node)
            step.edited()
