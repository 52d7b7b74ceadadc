"""Where the batch axis is in every value of a step, and whether rows stay apart.

If every row of a step's results depends on the same row of its inputs alone, the step can be run on any rows:
all rows of all steps at once (what makes batching over time possible), sorted by length, or one beam. The
analysis is exact where it has a rule for an operation; an operation without one counts as mixing rows,
which is slower and never wrong.

In a joint graph sums over rows are what gradients of parameters are made of. Such sums have no batch axis
any more; they are harmless when only linear operations lead from them to a gradient (`ops.table`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import sympy
from torch import Tensor, fx

from ..ir.graph import Rows, Size, StepGraph, expression
from ..ops.rules import CONTRACTED, Axis, Mixed, has, made_up
from ..ops.table import is_random, linear_in, operation_of


def annotate(step: StepGraph, per_step: Sequence[fx.Node] = ()) -> dict[fx.Node, str]:
    """Writes `rows` and `varies` on every node; returns the nodes that mix rows, each with the reason.

    per_step: nodes of which the value of every step is wanted, not only a sum over the steps.
    With no symbolic batch, or once rows are mixed, `rows` is None where it means nothing.
    """
    forced: set[fx.Node] = set()
    while True:
        mixing = _annotate_once(step, forced)
        more = _needed_each_step(mixing, per_step)
        if not more:
            return mixing
        forced |= more


def _annotate_once(step: StepGraph, forced: set[fx.Node]) -> dict[fx.Node, str]:
    mixing: dict[fx.Node, str] = {}
    varying = {*step.xs, *step.prevs, *(n for n in (*step.ct_outputs, *step.ct_nexts) if n is not None)}
    for node in step.graph.nodes:
        if node.op == "placeholder":
            if "saved" not in node.meta:
                node.meta["varies"] = node in varying
                node.meta["rows"] = _placeholder_rows(node, step)
            node.meta["contracted"] = False
        elif node.op == "call_function":
            _annotate_call(node, step, mixing, forced)
    return mixing


def _needed_each_step(mixing: dict[fx.Node, str], per_step: Sequence[fx.Node]) -> set[fx.Node]:
    """Sums over rows that something uses step by step: they can't be sums over the rows of all steps."""
    found: set[fx.Node] = set()
    stack = [i for n in mixing for i in n.all_input_nodes] + list(per_step)
    while stack:
        node = stack.pop()
        if node.target is operator.getitem and node.meta["contracted"] is True:
            node = cast(fx.Node, node.args[0])
        contracted = node.meta["contracted"]
        if node not in found and (contracted is True or (isinstance(contracted, tuple) and any(contracted))):
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found - set(mixing)


def _annotate_call(node: fx.Node, step: StepGraph, mixing: dict[fx.Node, str], forced: set[fx.Node]) -> None:
    inputs = node.all_input_nodes
    node.meta["varies"] = is_random(node) or any(n.meta["varies"] for n in inputs)
    node.meta["rows"], node.meta["contracted"] = None, False
    if step.batch is None:
        return
    if node.target is operator.getitem:
        rows, contracted = inputs[0].meta["rows"], inputs[0].meta["contracted"]
        index = cast(int, node.args[1])
        node.meta["rows"] = rows[index] if isinstance(rows, tuple) else rows
        node.meta["contracted"] = contracted[index] if isinstance(contracted, tuple) else contracted
        return
    stray = next((n for n in inputs if n.meta["varies"] and not _has_place(n)), None)
    try:
        if stray is not None:
            raise Mixed(mixing.get(stray, "follows a value without a batch axis"))
        if node in forced:
            raise Mixed("sums over the rows of the batch")
        axis = _rule(node, step.batch)
        _check_other_axes(node, axis, step.batch)
    except Mixed as reason:
        mixing[node] = str(reason)
        node.meta["rows"] = _visible_rows(node, step.batch)
        node.meta["varies"] = True  # it is computed at every step, on the rows of that step
        return
    if isinstance(axis, tuple):
        node.meta["rows"] = tuple(a if isinstance(a, Rows) else None for a in axis)
        node.meta["contracted"] = tuple(a is CONTRACTED for a in axis)
    else:
        node.meta["rows"] = axis if isinstance(axis, Rows) else None
        node.meta["contracted"] = axis is CONTRACTED
    if any(n.meta["contracted"] is True for n in inputs):
        _after_contraction(node, mixing)
    elif node.meta["varies"] and not _has_place(node):
        mixing[node] = "differs from step to step and has no batch axis"


def _check_other_axes(node: fx.Node, axis: Axis | tuple[Axis, ...], batch: sympy.Symbol) -> None:
    """A value with a number of a row for every other row is none of one row alone, whatever it was made of."""
    value = node.meta["val"]
    tensors, axes = ([value], [axis]) if isinstance(value, Tensor) else (value, axis)
    for tensor, rows in zip(tensors, axes if isinstance(axes, (list, tuple)) else [axes] * len(tensors)):
        if isinstance(rows, Rows) and isinstance(tensor, Tensor):
            if any(has(expression(s), batch) for d, s in enumerate(tensor.shape) if d != rows.dim):
                raise Mixed("has the rows of the batch on several axes")


def _has_place(node: fx.Node) -> bool:
    rows, contracted = node.meta["rows"], node.meta["contracted"]
    if isinstance(rows, tuple):
        return any(r is not None for r in rows) or any(contracted)
    return rows is not None or contracted is True


def _visible_rows(node: fx.Node, batch: sympy.Symbol) -> Axis | tuple[Axis, ...]:
    """Where a value that mixes rows has the batch's size."""
    value = node.meta["val"]
    found = []
    for tensor in [value] if isinstance(value, Tensor) else value:
        sizes = [expression(s) for s in tensor.shape] if isinstance(tensor, Tensor) else []
        dims = [d for d, s in enumerate(sizes) if s == batch]
        found.append(Rows(dims[0]) if len(dims) == 1 else None)
    return found[0] if isinstance(value, Tensor) else tuple(found)


def _after_contraction(node: fx.Node, mixing: dict[fx.Node, str]) -> None:
    contracted = [n for n in node.all_input_nodes if n.meta["contracted"] is True]
    others = [n for n in node.all_input_nodes if n.meta["contracted"] is not True]
    fixed = node.meta["rows"] is None and not any(n.meta["varies"] for n in others)
    if fixed and linear_in(node, contracted):
        node.meta["contracted"] = True
    else:
        mixing[node] = "uses a sum over the rows of the batch"


def _placeholder_rows(node: fx.Node, step: StepGraph) -> Rows | None:
    value = node.meta.get("val")
    if step.batch is None or not isinstance(value, Tensor) or value.dim() == 0:
        return None
    return Rows(0) if expression(value.shape[0]) == step.batch else None


def _rule(node: fx.Node, batch: sympy.Symbol) -> Axis | tuple[Axis, ...]:
    operation = operation_of(node)
    if _computes_with(node, batch, operation.sizes):
        raise Mixed("computes with the batch size")
    if not any(isinstance(n.meta["rows"], (Rows, tuple)) for n in node.all_input_nodes):
        return made_up(node, batch)
    if operation.rows is None:
        raise Mixed(f"steploop has no rule for the batch axis of {node.target}")
    return operation.rows(node, batch)


def _computes_with(node: fx.Node, batch: sympy.Symbol, sizes: tuple[int, ...]) -> bool:
    """Whether the batch size is used as a number, and not only as the size of an axis of the result: run on the
    rows of all steps at once, the call would see another number."""
    args = [a for i, a in enumerate(node.args) if i not in sizes]
    return _mentions(args, batch) or _mentions(list(node.kwargs.values()), batch)


def _mentions(argument: Any, batch: sympy.Symbol) -> bool:
    if isinstance(argument, Size):
        return batch in argument.expr.free_symbols
    if isinstance(argument, (list, tuple)):
        return any(_mentions(a, batch) for a in argument)
    return False
