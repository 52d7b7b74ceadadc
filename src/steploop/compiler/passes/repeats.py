"""Constants of which every row is repeated: a memory for all hypotheses of a row, B rows as B * K.

What is made of such a constant row by row, the keys of an attention for one, is made of the B rows, and its result is
repeated instead. That repetition is a view followed by a copy: a native loop takes both along (`absorb.py`), reads each
row where it stands, and makes no copy.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ..ir.edit import call, calls, remove_dead, sizes_of
from ..ir.graph import Rows, Size, StepGraph, expression, shape_of
from ..ops.table import is_random

aten = torch.ops.aten
_VIEWS = (aten._unsafe_view.default, aten.view.default, aten.reshape.default)


def repetition(node: fx.Node) -> list[fx.Node] | None:
    """The calls from (B, ...) to (B, K, ...), each row K times, and to a view of that, `node`. None: it is no such."""
    if node.target not in _VIEWS:
        return None
    found = [node]
    if found[-1].args[0].target is aten.clone.default:
        found.append(found[-1].args[0])
    for target in (aten.expand.default, aten.unsqueeze.default):
        found.append(found[-1].args[0])
        if found[-1].target is not target:
            return None
    wide, narrow = found[-2:]
    batch, one, *rest = shape_of(narrow)
    count = shape_of(wide)[1]
    repeats = narrow.args[1] == 1 and one == 1 and isinstance(count, int) and count > 1
    return found[::-1] if repeats and shape_of(wide) == (batch, count, *rest) else None


def repeat_late(step: StepGraph, in_loop: set[fx.Node]) -> bool:
    """f(repeated rows) = repeated f(rows), for what is the same at every step."""
    if step.batch is None:
        return False
    lone: dict[fx.Node, tuple[fx.Node, int]] = {}
    made: list[fx.Node] = []
    for node in calls(step):
        if node.meta["varies"] or node in in_loop:
            continue
        if (chain := repetition(node)) is not None and _in_front(node, count := shape_of(chain[1])[1]):
            shape, _ = _of_one((sizes_of(shape_of(node)), {}), lone, step.batch, count)
            if shape is not None:
                source = chain[0].args[0]
                same = list(shape_of(source)) == list(map(expression, shape))
                lone[node] = source if same else call(node, aten.reshape.default, source, shape), count
        elif (count := _common(node, lone, step.batch)) is not None:
            args, kwargs = _of_one((node.args, node.kwargs), lone, step.batch, count)
            if args is not None:
                lone[node] = call(node, node.target, *args, **kwargs), count
                made.append(node)
    changed = False
    for node in made:
        users = [u for u in node.users if u not in lone]
        value, count = lone[node]
        if users and shape_of(value)[0] == step.batch and shape_of(node)[0] == step.batch * count:
            again = _repeated(node, value, count)
            for user in users:
                user.replace_input_with(node, again)
            changed = True
    remove_dead(step)
    return changed


def _common(node: fx.Node, lone: dict[fx.Node, tuple[fx.Node, int]], batch: sympy.Symbol) -> int | None:
    """How often the rows are repeated of which a call makes its own, row by row; None where it is no such call."""
    counts = {lone[i][1] for i in node.all_input_nodes if i in lone}
    others = [i for i in node.all_input_nodes if i not in lone]
    if len(counts) != 1 or is_random(node) or not isinstance(node.meta["val"], Tensor):
        return None
    if any(batch in getattr(expression(s), "free_symbols", ()) for i in others for s in _sizes(i)):
        return None
    count = counts.pop()
    fits = _in_front(node, count) and not node.meta.get("contracted")
    return count if fits else None


def _in_front(node: fx.Node, count: int) -> bool:
    """Whether the first axis of a value holds its rows, each so often or some times as often."""
    rows = node.meta["rows"]
    return isinstance(rows, Rows) and (rows.dim, rows.outer) == (0, 1) and _divides(rows.inner, count)


def _sizes(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else ()


def _divides(size: Any, count: int) -> bool:
    return sympy.fraction(sympy.together(sympy.sympify(size) / count))[1] == 1


def _of_one(
    arguments: tuple[Any, Any], lone: dict[fx.Node, tuple[fx.Node, int]], batch: sympy.Symbol, count: int
) -> tuple[Any, Any]:
    """The arguments of a call with B for B * K; (None, None) where its sizes say something else."""
    fits = True

    def size(argument: Any) -> Any:
        nonlocal fits
        if not isinstance(argument, Size) or batch not in argument.expr.free_symbols:
            return argument
        found = sympy.expand(argument.expr.xreplace({batch: batch / count}))
        fits = fits and _divides(found, 1)
        return Size(found)

    def of_one(argument: Any) -> Any:
        return lone[argument][0] if argument in lone else size(argument)

    changed = fx.node.map_aggregate(arguments, of_one)
    return changed if fits else (None, None)


def _repeated(before: fx.Node, value: fx.Node, count: int) -> fx.Node:
    batch, *rest = value.meta["val"].shape
    wide = call(before, aten.unsqueeze.default, value, 1)
    wide = call(before, aten.expand.default, wide, sizes_of([batch, count, *rest]))
    wide = call(before, aten.clone.default, wide, memory_format=torch.contiguous_format)
    return call(before, aten._unsafe_view.default, wide, sizes_of([batch * count, *rest]))
