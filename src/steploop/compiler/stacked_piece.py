"""Pieces of a step that mixes rows: for all steps at once by torch's vmap, with a loop where that has no rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from ..errors import UnsupportedError
from .ir.graph import shape_at, symbols_of
from .ops.table import is_random
from .printing import Source, call_text
from .problem import StateNodes
from .rowwise import Rowwise


class StackedPiece:
    """Calls of a step without a known batch axis, for all steps: one `vmap` over T."""

    def __init__(self, nodes: Sequence[fx.Node], results: Sequence[fx.Node], delayed: dict[fx.Node, StateNodes]):
        self.results = list(results)
        self.delays = [n for n in nodes if n in delayed]
        self.runs = _runs(nodes, delayed)
        inside = set(nodes)
        self.delayed = delayed
        self.reads = list(dict.fromkeys(
            s for n in nodes for s in ([delayed[n].next] if n in delayed else n.all_input_nodes) if s not in inside
        ))  # fmt: skip
        self.functions = [run if isinstance(run, fx.Node) else _stacked_function(run) for run in self.runs]

    def __call__(self, rowwise: Rowwise, sizes: dict[str, int], values: Sequence[Tensor]) -> Sequence[Tensor]:
        known = dict(zip(self.reads, values))
        for run in self.functions:
            if isinstance(run, fx.Node):
                state = self.delayed[run]
                following = known[state.next]
                if not state.next.meta["varies"]:
                    following = rowwise.spread(following, state.next)
                known[run] = rowwise.delay(state.prev, following)
                continue
            reads, made, drawn_from, function = run
            in_dims = tuple(0 if n.meta["varies"] or n in drawn_from else None for n in reads)
            # A draw in the shape of something that does not vary would be drawn once for all steps by vmap.
            arguments = [
                rowwise.spread(known[n], n) if n in drawn_from and not n.meta["varies"] else known[n] for n in reads
            ]
            if rowwise.steps == 0:
                outputs = [_empty_stack(n, sizes) for n in made]
            elif any(d == 0 for d in in_dims):
                outputs = _mapped(lambda *a: function(sizes, a), in_dims, arguments)
            else:  # random numbers from nothing
                dummy = torch.empty(rowwise.steps, device="cpu")
                outputs = _mapped(lambda _, *a: function(sizes, a), (0, *in_dims), [dummy, *arguments])
            known.update(zip(made, outputs))
        return [known[n] for n in self.results]


def _mapped(function: Callable[..., Any], in_dims: tuple[int | None, ...], arguments: Sequence[Tensor]) -> Any:
    """vmap over the steps. Where torch has no rule for an operation, it runs the steps one by one, and would warn: the
    caller can do nothing about it. Of some operations it says instead that they need a rule."""
    functorch: Any = torch._C._functorch
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        return torch.func.vmap(function, in_dims, randomness="different")(*arguments)
    except (RuntimeError, UnsupportedError) as error:  # (a loop inside the step knows no transforms)
        if not isinstance(error, UnsupportedError) and "atching rule" not in str(error):
            raise
        steps = next(len(a) for a, dim in zip(arguments, in_dims) if dim == 0)
        parts = [function(*(a if d is None else a[t] for a, d in zip(arguments, in_dims))) for t in range(steps)]
        return [_stacked(results) for results in zip(*parts)]
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)


def _stacked(results: Sequence[Any]) -> Any:
    """The results of all steps, each a tensor or several."""
    if isinstance(results[0], Tensor):
        return torch.stack(list(results))
    return [_stacked(part) for part in zip(*results)]


def _parts(node: fx.Node) -> Sequence[Any]:
    value = node.meta["val"]
    return value if isinstance(value, (tuple, list)) else (value,)


def _empty_stack(node: fx.Node, sizes: dict[str, int]) -> Any:
    def empty(value: Tensor) -> Tensor:
        return torch.empty((0, *shape_at(value, sizes)), dtype=value.dtype, device=value.device)

    return tree_map_only(Tensor, empty, node.meta["val"])


def _runs(nodes: Sequence[fx.Node], delayed: dict[fx.Node, StateNodes]) -> list[Any]:
    runs: list[Any] = []
    for node in nodes:
        if node in delayed:
            runs.append(node)
        elif runs and isinstance(runs[-1], list):
            runs[-1].append(node)
        else:
            runs.append([node])
    return runs


def _stacked_function(
    nodes: list[fx.Node],
) -> tuple[list[fx.Node], list[fx.Node], set[fx.Node], Callable[..., Any]]:
    """What a run of calls reads and makes, what its draws read, and the function of one step."""
    inside = set(nodes)
    drawn_from = {i for n in nodes if is_random(n) for i in n.all_input_nodes}
    reads = list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside))
    made = [n for n in nodes if all(isinstance(v, Tensor) for v in _parts(n))]
    source = Source()
    source.add("def stacked(sizes, values):", 0)
    if reads:
        source.add(f"{', '.join(n.name for n in reads)}, = values")
    for symbol in sorted({s for n in [*nodes, *reads] for s in symbols_of(n)}, key=str):
        source.add(f"{symbol} = sizes['{symbol}']")
    for node in nodes:
        source.add(f"{node.name} = {call_text(source, node, lambda n: n.name)}")
    source.add(f"return ({', '.join(n.name for n in made)}{',' if made else ''})")
    return reads, made, drawn_from, source.build("stacked")
