"""A step graph as text: for people, and for golden files.

    x_x: float32[B, 3]  rows 0, each step
    mm: float32[B, 4] = mm(x_x, t)  rows 0, each step  # cell.py:14

Names are made of operations and of the order of the calls, so that the same step always reads the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .graph import RESULTS, Rows, Size, StepGraph, expression, line_of, op_name

_WORDS = {
    "ct_outputs": "d_output", "ct_nexts": "d_next", "outputs": "output", "nexts": "next",
    "grad_xs": "d_x", "grad_constants": "d_constant",
    "grad_prevs": "d_prev", "grad_captured": "d_captured",
}  # fmt: skip


def show(step: StepGraph) -> str:
    """The inputs, the calls, and what they give; where rows are, once that is known."""
    names = Names(step)
    lines = [_line(n, names, step, "") for n in step.graph.nodes if n.op == "placeholder"]
    lines += [_line(n, names, step, f" = {call(n, names)}") for n in step.graph.nodes if n.op == "call_function"]
    for role in RESULTS:
        found = [f"{_WORDS[role]}{i} = {names.of(n)}" for i, n in enumerate(getattr(step, role)) if n is not None]
        lines += [f"gives {', '.join(found)}"] if found else []
    return "\n".join(lines) + "\n"


class Names:
    """A name for every node, and for every size that only a call knows."""

    def __init__(self, step: StepGraph):
        self._nodes: dict[fx.Node, str] = {}
        for role in ("ct_outputs", "ct_nexts"):
            self._nodes.update({n: f"{_WORDS[role]}{i}" for i, n in enumerate(getattr(step, role)) if n is not None})
        counts: dict[str, int] = {}
        for node in step.graph.nodes:
            if node.op != "output" and node not in self._nodes:
                word = _word(node)
                counts[word] = counts.get(word, -1) + 1
                self._nodes[node] = f"{word}_{counts[word]}" if counts[word] else word
        others = [s for s in step.symbols if s != step.batch]
        self.sizes = {s: f"n{i}" for i, s in enumerate(others, 1)}
        if step.batch is not None:
            self.sizes[step.batch] = "B"

    def of(self, node: fx.Node) -> str:
        return self._nodes[node]

    def size(self, size: Any) -> str:
        size = expression(size)
        if isinstance(size, int):
            return str(size)
        return str(size.xreplace({s: type(s)(n) for s, n in self.sizes.items()}))


def _word(node: fx.Node) -> str:
    if node.op == "placeholder":
        return node.name  # those were given names that the user knows
    name = op_name(node)
    return "part" if name == "getitem" else name.replace("::", "_").lstrip("_")


def _line(node: fx.Node, names: Names, step: StepGraph, value: str) -> str:
    known = _rows(node) if step.known is not None else ""
    line = f"  # {line_of(node)}" if line_of(node) else ""
    return f"{names.of(node)}: {_types(node.meta.get('val'), names)}{value}{known}{line}"


def _types(value: Any, names: Names) -> str:
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(_types(v, names) for v in value) + ")"
    if not isinstance(value, Tensor):
        return "none" if value is None else type(value).__name__
    sizes = ", ".join(names.size(s) for s in value.shape)
    return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"


def _rows(node: fx.Node) -> str:
    rows = node.meta.get("rows")
    places = rows if isinstance(rows, tuple) else (rows,)
    where = "/".join(map(_place, places))
    if node.meta.get("contracted"):
        where = "summed over rows"
    return f"  {where}, {'each step' if node.meta.get('varies') else 'once'}"


def _place(rows: Rows | None) -> str:
    if rows is None:
        return "no rows"
    inside = "" if rows.plain else f" ({rows.outer} x B x {rows.inner})"
    return f"rows {rows.dim}{inside}"


def call(node: fx.Node, names: Names) -> str:
    """The call as it would be typed."""
    args = [_argument(a, names) for a in node.args]
    args += [f"{k}={_argument(v, names)}" for k, v in node.kwargs.items() if v is not None]
    overload = getattr(node.target, "_overloadname", "default")
    name = op_name(node) if overload in ("default", "") else f"{op_name(node)}.{overload}"
    return f"{name}({', '.join(args)})"


def _argument(argument: Any, names: Names) -> str:
    if isinstance(argument, fx.Node):
        return names.of(argument)
    if isinstance(argument, Size):
        return names.size(argument)
    if isinstance(argument, (list, tuple)):
        return "[" + ", ".join(_argument(a, names) for a in argument) + "]"
    if isinstance(argument, torch.dtype):
        return str(argument).removeprefix("torch.")
    plain = isinstance(argument, (bool, int, float, str, torch.device, type(None)))
    return str(argument) if plain else type(argument).__name__


