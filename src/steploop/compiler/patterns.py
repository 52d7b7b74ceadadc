"""Loops that are a known operation over the whole sequence in disguise, recognised where that is exact.

    s = s + x                      cumulative sum
    n = n + 1                      counting, in integers
    s = torch.maximum(s, x)        cumulative maximum (and minimum)
    s = cat([s[:, 1:], x[:, None]], 1)   sliding window
    s = s                          a State that no step writes

x comes from outside the loop. With resets the loop runs as it stands: a sum since the last reset, as a difference
of sums, would lose digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from ..backends.contract import Runner
from ..marks import wide
from .ir.graph import LoopProgram, Rows, expression, rows_of
from .ops.table import linear_groups, operation_of
from .sequence_runner import Dense
from .span import Span

aten = torch.ops.aten


class Recognised(Runner):
    """Runs a recognised loop; takes and gives what `backends.eager.Runner` does.

    scan(before, x) -> values after every step, (P, B, ...), from the value before, (B, ...), and the sequence x,
    (P, B, ...), or the number of steps P where the loop reads none.
    accumulates: whether what it reads is a sequence as wide as the state.
    """

    accumulates = False

    def __init__(self, name: str, loop: LoopProgram, source: fx.Node | None, scan: Callable[..., Any], plain: Any):
        self.backend = name
        self.loop, self.scan, self.plain = loop, scan, cache(plain)  # (lowered once, if at all)
        given = [i.node for i in loop.inputs]
        self.position = None if source is None else given.index(source)

    def __call__(
        self, inputs: Sequence[Tensor], states: Sequence[Tensor], reset_to: Sequence[Tensor] | None, span: Span,
        down: bool, sizes: dict[str, int],
    ) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        odd = span.schedule.members is not None or (down and not span.schedule.full)
        if odd or span.total == 0 or (reset_to is not None and span.schedule.resets is not None):
            return self.plain()(inputs, states, reset_to, span, down, sizes)
        dense = Dense(span)
        if self.position is None:
            values = self.scan(states[0], dense.steps)
        else:
            x = dense.spread(inputs[self.position])
            values = self.scan(states[0], x.flip(0) if down else x)
        after = values[-1] if dense.lengths is None else _last(values, dense.lengths, states[0])
        values = values.flip(0) if down else values
        prev = torch.cat([values[1:], states[0][None]] if down else [states[0][None], values[:-1]])
        kept = [dense.collect(prev if n is self.loop.prevs[0] else values) for n in self.loop.kept]
        return [after], kept


def _last(values: Tensor, lengths: Tensor, before: Tensor) -> Tensor:
    index = (lengths - 1).clamp(min=0)
    found = values[index, torch.arange(values.shape[1], device=values.device)]
    mark = wide(lengths > 0, found)
    return torch.where(mark, found, before)


def recognise(loop: LoopProgram, plain: Callable[[], Any]) -> Recognised | None:
    """The known operation that a loop is, or None. `plain` makes the runner of the loop as it stands."""
    if loop.batch is None or len(loop.prevs) != 1:
        return None
    prev, following = loop.prevs[0], loop.nexts[0]
    if rows_of(following) != Rows(0) or any(n not in (prev, following) for n in loop.kept):
        return None
    calls = loop.calls
    if not calls and following is prev:
        return Recognised("as it was", loop, None, lambda before, steps: before.expand(steps, *before.shape), plain)
    if len(calls) == 1 and calls[0] is following:
        return _pointwise(loop, prev, following, plain)
    return _window(loop, prev, following, calls, plain)


def _pointwise(loop: LoopProgram, prev: fx.Node, node: fx.Node, plain: Callable[..., Any]) -> Recognised | None:
    known = _CUMULATIVE.get(node.target)
    if known is None or node.kwargs or len(node.args) != 2 or prev not in node.args:
        return None
    source = node.args[1] if node.args[0] is prev else node.args[0]
    if node.target is aten.add.Tensor and type(source) is int and not prev.meta["val"].is_floating_point():
        return Recognised("count", loop, None, _counting(source), plain)
    if not _same_sequence(source, prev, loop):
        return None
    if node.target is aten.add.Tensor and not _adds_up(prev.meta["val"].dtype):
        return None
    name, scan = known
    found = Recognised(name, loop, source, scan, plain)
    found.accumulates = True
    return found


def _adds_up(dtype: torch.dtype) -> bool:
    """Whether a running sum is what the loop gives: that of bools is an `or`, and 16 bits are rounded at each step."""
    return dtype != torch.bool and (not dtype.is_floating_point or dtype.itemsize >= 4)


def _same_sequence(source: Any, prev: fx.Node, loop: LoopProgram) -> bool:
    """Whether a value is a given sequence of the state's own shape and dtype."""
    given = {i.node: i for i in loop.inputs}
    if not isinstance(source, fx.Node) or source not in given or given[source].kind != "step":
        return False
    a, b = source.meta["val"], prev.meta["val"]
    same = [expression(s) for s in a.shape] == [expression(s) for s in b.shape]
    return given[source].rows == Rows(0) and same and a.dtype == b.dtype


def _counting(number: int) -> Callable[[Tensor, int], Tensor]:
    def scan(before: Tensor, steps: int) -> Tensor:
        counts = torch.arange(1, steps + 1, device=before.device, dtype=before.dtype) * number
        return before + counts.view(-1, *[1] * before.dim())

    return scan


def _cumulative_sum(before: Tensor, x: Tensor) -> Tensor:
    # The state goes first into the same running sum, as it does in the loop.
    return torch.cumsum(torch.cat([before[None], x]), 0, dtype=x.dtype)[1:]


def _cumulative_maximum(before: Tensor, x: Tensor) -> Tensor:
    return torch.cummax(torch.cat([before[None], x]), 0).values[1:]


def _cumulative_minimum(before: Tensor, x: Tensor) -> Tensor:
    return torch.cummin(torch.cat([before[None], x]), 0).values[1:]


_CUMULATIVE: dict[Any, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    aten.add.Tensor: ("cumsum", _cumulative_sum),
    aten.maximum.default: ("cummax", _cumulative_maximum),
    aten.minimum.default: ("cummin", _cumulative_minimum),
}


def is_linear_recurrence(loop: LoopProgram) -> bool:
    """Whether every state's next is linear in the states, with factors from outside: h = a * h + b.

    Such a loop is element-wise work on channels; its gradient is the same kind of loop in reversed time.
    """
    depends: set[fx.Node] = set(loop.prevs)
    scaled = False
    for node in loop.calls:
        inside = {a for a in node.all_input_nodes if a in depends}
        if not inside:
            continue
        known = operation_of(node)
        if not (known.pointwise or known.view) or not any(inside <= group for group in linear_groups(node)):
            return False
        scaled |= _scales(node)
        depends.add(node)
    return bool(loop.prevs) and scaled


def _scales(node: fx.Node) -> bool:
    """Whether a call multiplies: something that it is linear in meets something that it is not added to."""
    known = operation_of(node)
    return known.pointwise and not known.view and len(node.args) > max((len(g) for g in known.linear), default=0)


def _window(
    loop: LoopProgram, prev: fx.Node, node: fx.Node, calls: list[fx.Node], plain: Callable[..., Any]
) -> Recognised | None:
    """cat([prev[:, 1:], x[:, None]], 1), the x axis added in the loop or outside."""
    if node.target is not aten.cat.default or len(node.args[0]) != 2:
        return None
    if (node.args[1] if len(node.args) > 1 else 0) != 1:
        return None
    older, newest = node.args[0]
    sliced = older.target is aten.slice.Tensor and older.args[0] is prev and tuple(older.args[1:3]) == (1, 1)
    size = expression(prev.meta["val"].shape[1])
    if not sliced or older.args[3] < size or (len(older.args) > 4 and older.args[4] != 1):
        return None
    if set(calls) != {node, older} or newest not in {i.node for i in loop.inputs if i.kind == "step"}:
        return None
    if expression(newest.meta["val"].shape[1]) != 1 or newest.meta["val"].dtype != prev.meta["val"].dtype:
        return None
    if rows_of(newest) != Rows(0):
        return None

    def scan(before: Tensor, x: Tensor) -> Tensor:
        frames = torch.cat([before.transpose(0, 1), x.squeeze(2)])  # (W + P, B, ...)
        windows = frames.unfold(0, before.shape[1], 1)[1:]  # (P, B, ..., W)
        return windows.movedim(-1, 2)

    return Recognised("window", loop, newest, scan, plain)


__all__ = ["Recognised", "recognise"]
