"""Checks a step graph: what every pass may take for granted, and must leave behind.

    Calls stand after what they read, and all of it is in the graph.
    Inputs are placeholders; results are nodes of the graph.
    Nothing is changed in place.
    Sizes in arguments are ints or `Size`s of symbols that an input has.
    Every value is known, and torch gives one of that shape and dtype for the call.
    Where rows are known, they are what a new analysis finds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from .edit import values
from .graph import INPUTS, RESULTS, Size, StepGraph, expression
from .show import Names, call

aten = torch.ops.aten


class Broken(AssertionError):
    """A step graph that can't be one: a mistake in the pass that is named."""


def checking() -> bool:
    """Whether tests run: every graph is checked then, and what would be mended on the way is raised."""
    return os.environ.get("STEPLOOP_CHECK_GRAPHS", "0") != "0"


def check(step: StepGraph, after: str, values_too: bool = True) -> None:
    """Raises `Broken`. after: what has been done to the graph last, for the message.

    values_too: torch runs every call that is new since the last check, to see that its value is right. Of a graph that
        torch itself has just recorded that is known.
    """
    for problem in _problems(step, values_too):
        raise Broken(f"after {after}: {problem}\nThis is a mistake of steploop: please report it with the step.")


def _problems(step: StepGraph, values_too: bool) -> Iterator[str]:
    yield from _of_roles(step)
    names = Names(step)
    symbols = set(step.symbols) | ({step.batch} if step.batch is not None else set())
    seen: set[fx.Node] = set()
    for node in step.graph.nodes:
        if node.op == "output":
            continue
        text = names.of(node) if node.op == "placeholder" else f"{names.of(node)} = {call(node, names)}"
        yield from (f"{text} reads {i.name} before it is there" for i in node.all_input_nodes if i not in seen)
        seen.add(node)
        if node.op == "call_function":
            yield from (f"{text}: {p}" for p in _of_call(node, symbols, values_too))
        elif node.op != "placeholder":
            yield f"{text} is a {node.op}, not a call or an input"


def _of_roles(step: StepGraph) -> Iterator[str]:
    alive = set(step.graph.nodes)
    for role in (*INPUTS, *RESULTS):
        for i, node in enumerate(getattr(step, role)):
            if node is not None and node not in alive:
                yield f"{role}[{i}] is not in the graph any more"
            elif node is not None and role in INPUTS and node.op != "placeholder":
                yield f"{role}[{i}] is computed, not given"


def _of_call(node: fx.Node, symbols: set[Any], values_too: bool) -> Iterator[str]:
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        yield "changes something in place"
    for leaf in tree_leaves((node.args, node.kwargs)):
        if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            yield "has a symbolic number of the tracer as an argument, not a Size"
        if isinstance(leaf, Size) and not leaf.expr.free_symbols <= symbols:
            yield f"has the size {leaf.expr}, which no input has"
    if node.meta.get("val") is None and node.users and not _may_be_none(node):
        yield "has no value"
    elif node.meta.get("val") is not None and node.meta.get("checked") != (key := _key(node)):
        if values_too and not node.meta.pop("ran", False):
            yield from _of_value(node)
        node.meta["checked"] = key


def _may_be_none(node: fx.Node) -> bool:
    """One part of a result with several parts, of which some are not asked for."""
    return len(node.args) == 2 and isinstance(node.args[1], int)


def _key(node: fx.Node) -> Any:
    """What the value of a call depends on, as far as its type goes: a call is run again where that has changed."""
    leaves = tree_leaves((node.args, node.kwargs))
    return node.target, [_type(leaf) for leaf in leaves], [_type(leaf) for leaf in tree_leaves(node.meta.get("val"))]


def _type(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return [_type(leaf) for leaf in tree_leaves(value.meta.get("val"))]
    if isinstance(value, Tensor):
        return value.dtype, tuple(map(expression, value.shape))
    return value if isinstance(value, (bool, int, float, str, Size)) else repr(value)


def _of_value(node: fx.Node) -> Iterator[str]:
    """Torch runs the call once more on values without numbers."""
    if getattr(node.target, "namespace", "aten") != "aten" or not hasattr(node.target, "_schema"):
        return
    fakes = [v for v in tree_leaves([i.meta.get("val") for i in node.all_input_nodes]) if hasattr(v, "fake_mode")]
    if not fakes or torch.Tag.nondeterministic_seeded in cast(torch._ops.OpOverload, node.target).tags:
        return
    mode = fakes[0].fake_mode
    # Copies are left out of a graph, so that the strides of what a view reads may be others: it is run as a reshape.
    target: Any = aten.reshape.default if node.target in (aten.view.default, aten._unsafe_view.default) else node.target
    try:
        with _disable_current_modes(), enable_python_dispatcher(), mode, torch.no_grad():
            found = target(*values(node.args, mode), **values(node.kwargs, mode))
    except Exception as error:
        yield f"can't be called: {error}"
        return
    for known, given in zip(tree_leaves(node.meta["val"]), tree_leaves(found), strict=False):
        if isinstance(known, Tensor) and isinstance(given, Tensor):
            shapes = [tuple(map(expression, t.shape)) for t in (known, given)]
            if known.dtype != given.dtype or not _same(*shapes):
                yield f"is said to give {known.dtype} {shapes[0]} and gives {given.dtype} {shapes[1]}"


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(x == y or (getattr(x - y, "expand", lambda: 1)() == 0) for x, y in zip(a, b))
