"""A loop run by torch: a Python loop over its small graph.

The graph of a loop is printed as one Python function, so that a step costs its ATen calls and little else.
This backend takes every loop; its speed is bounded by one dispatch per operation and step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.ir.graph import LoopProgram, Rows, rows_of, shape_at, symbols_of
from ..compiler.printing import Source, call_text, fuse_addmm, last_uses, print_size
from ..compiler.span import Span
from . import contract


@dataclass(eq=False)
class Run:
    """Steps one after the other on the same rows.

    down: they run from the last to the first.
    packed: every input that has a value per step, the values of these steps in one tensor, upwards.
    places: where its rows are.
    marks: which rows are reset at which step, (count * rows,) bool; None where none is at any.
    hits: for every step whether any is, in running order.  back: what each state is reset to, (rows, ...).
    shapes: of one step's value, where its size follows the rows without having them on an axis (see `join`).
    """

    rows: int
    count: int
    down: bool
    states: list[Tensor]
    constants: list[Tensor]
    packed: list[Tensor]
    places: list[Rows | None]
    marks: Tensor | None = None
    hits: Sequence[bool] = ()
    back: list[Tensor] = field(default_factory=list)
    shapes: Sequence[list[int] | None] = ()

    def part(self, begin: int, count: int) -> Run:
        """`count` of its steps, from number `begin` in running order on, with the states as they are now."""
        first = self.count - begin - count if self.down else begin
        marks = None if self.marks is None else _steps_of(self.marks, Rows(0), first, count, self.rows)
        packed = [_steps_of(p, place, first, count, self.rows) for p, place in zip(self.packed, self.places)]
        hits = self.hits[begin : begin + count]
        return replace(self, count=count, packed=packed, marks=marks, hits=hits)

    def sequences(self) -> list[Sequence[Tensor]]:
        """For every such input its values, in running order."""
        steps = [_one_by_one(p, place, self.count, self.rows) for p, place in zip(self.packed, self.places)]
        for k, shape in enumerate(self.shapes):
            if shape is not None:
                steps[k] = [value[tuple(map(slice, shape))] for value in steps[k]]
        return list(map(self._in_order, steps))

    def marks_or_none(self) -> list[Tensor | None]:
        """For every step its marks, in running order, where any row is reset."""
        marks: Any = self.marks
        steps = self._in_order(_one_by_one(marks, Rows(0), self.count, self.rows))
        return [mark if hit else None for mark, hit in zip(steps, self.hits)]

    def _in_order(self, steps: Sequence[Tensor]) -> Sequence[Tensor]:
        return steps[::-1] if self.down else steps


def _steps_of(packed: Tensor, place: Rows | None, first: int, count: int, rows: int) -> Tensor:
    """Some steps of a tensor that holds the values of many, each of `rows` rows."""
    if place is None:
        return packed.narrow(0, first, count)
    size = rows * place.inner
    if place.outer == 1:
        return packed.narrow(place.dim, first * size, count * size)
    wide = packed.unflatten(place.dim, (place.outer, -1)).narrow(place.dim + 1, first * size, count * size)
    return wide.flatten(place.dim, place.dim + 1)


def _one_by_one(packed: Tensor, place: Rows | None, count: int, rows: int) -> Sequence[Tensor]:
    """The values of all its steps."""
    if place is None:
        return packed.unbind(0)
    sizes = [rows * place.inner] * count
    if place.outer == 1:
        return packed.split(sizes, place.dim)
    parts = packed.unflatten(place.dim, (place.outer, -1)).split(sizes, place.dim + 1)
    return [p.flatten(place.dim, place.dim + 1) for p in parts]


@dataclass(eq=False)
class Joined:
    """The kept values of several steps, as `Runner.join` gives them."""

    values: Tensor


class Runner(contract.Runner):
    """One compiled loop."""

    def __init__(self, loop: LoopProgram):
        self.loop = loop
        self._plain = _print_steps(loop, resets=False, after=False)
        self._resetting: dict[bool, Callable[..., Any]] = {}
        steps = [i for i in loop.inputs if i.kind == "step"]
        self._follow = [i.node if i.rows is None and loop.batch in symbols_of(i.node) else None for i in steps]

    def __call__(
        self,
        inputs: Sequence[Tensor],
        states: Sequence[Tensor],
        reset_to: Sequence[Tensor] | None,
        span: Span,
        down: bool,
        sizes: dict[str, int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs the steps of a span, upwards or (for gradients) downwards.

        inputs: in the order of `loop.inputs`.  states: (B, ...) before the first step of the run.
        reset_to: what a reset gives each state. Upwards a reset comes before its step; downwards after it.
        sizes: values of all symbols but the batch, by name.
        Returns the states after the run, (B, ...), and the kept values, packed or stacked.
        """
        loop = self.loop
        full = list(states)
        kept: list[list[Tensor | Joined]] = [[] for _ in loop.kept]
        steps = range(span.start, span.stop)
        resets = span.schedule.resets is not None and reset_to is not None
        places = [i.rows if i.rows is None else i.rows.at(sizes) for i in loop.inputs]
        moving = [(v, place) for v, place, i in zip(inputs, places, loop.inputs) if i.kind == "step"]
        for size, run in groupby(reversed(steps) if down else steps, key=self._group(span)):
            chosen = list(run)
            if loop.batch is not None and size in (0, (0, chosen[0])):
                self._no_row(len(chosen), sizes, kept)
                continue
            rows = self._rows(span, chosen[0])
            part = [_take(s, Rows(0), rows, size) if loop.batch is not None else s for s in full]
            constants = [
                v if place is None else _take(v, place, rows, size)
                for v, place, i in zip(inputs, places, loop.inputs) if i.kind == "once"
            ]
            first, last = min(chosen[0], chosen[-1]), max(chosen[0], chosen[-1])
            packed = [_between(v, place, span, first, last + 1) for v, place in moving]
            number = size if not isinstance(size, tuple) else size[0]
            made = Run(number, len(chosen), down, part, constants, packed, [place for _, place in moving])
            if any(self._follow):
                now = {**sizes, str(loop.batch): number}
                made.shapes = [shape_at(n.meta["val"], now) if n is not None else None for n in self._follow]
            hits = [span.schedule.reset_steps[k] for k in chosen] if resets else ()
            if any(hits):
                marks: Any = span.resets
                back: Any = reset_to
                made.marks, made.hits = _between(marks, Rows(0), span, first, last + 1), hits
                made.back = [_take(r, Rows(0), rows, size) for r in back]
            part = self._steps(made, sizes, kept)
            full = [_put(f, p, rows, size) if loop.batch is not None else p for f, p in zip(full, part)]
        known = {**sizes, str(loop.batch): span.schedule.batch}
        return full, [self.join(k, node, down, known) for k, node in zip(kept, loop.kept)]

    def _no_row(self, count: int, sizes: dict[str, int], kept: list[list[Tensor | Joined]]) -> None:
        """Steps that no row takes do not run, as not every operation of torch takes no rows: what they keep is zero."""
        known = {**sizes, str(self.loop.batch): 0}
        for node, values in zip(self.loop.kept, kept):
            if rows_of(node) is None:
                like = node.meta["val"]
                values += [torch.zeros(shape_at(like, known), dtype=like.dtype, device=like.device)] * count

    def _steps(self, run: Run, sizes: dict[str, int], kept: list[list[Tensor | Joined]]) -> list[Tensor]:
        """Runs steps on the same rows; appends their kept values and gives the states after them."""
        given = (sizes, run.rows, run.count, run.states, run.constants, run.sequences(), kept)
        if run.marks is None:
            return self._plain(*given)
        return self._with_resets(run.down)(*given, run.marks_or_none(), *run.back)

    def _with_resets(self, down: bool) -> Callable[..., Any]:
        if down not in self._resetting:
            self._resetting[down] = _print_steps(self.loop, resets=True, after=down)
        return self._resetting[down]

    def _group(self, span: Span) -> Callable[[int], Any]:
        """Steps with the same rows run in one go."""
        if self.loop.batch is None:
            return lambda k: 1
        if span.schedule.members is not None:
            return lambda k: (span.schedule.sizes[k], k)
        return lambda k: span.schedule.sizes[k]

    def _rows(self, span: Span, k: int) -> Tensor | None:
        members = span.schedule.members
        return None if members is None else members[k]

    def join(
        self, values: list[Any], node: fx.Node, down: bool, sizes: dict[str, int] | None = None
    ) -> Tensor:
        """The values of a node at all steps (or `Joined` ones of several), given in running order, as one tensor,
        upwards. sizes: where none ran."""
        rows = rows_of(node)
        if down:
            values = values[::-1]
        if not values:
            return _empty(node, sizes or {})
        if any(isinstance(v, Joined) for v in values):
            single: Callable[[Tensor], Tensor] = (lambda v: v.unsqueeze(0)) if rows is None else (lambda v: v)
            values = [v.values if isinstance(v, Joined) else single(v) for v in values]
            if len(values) == 1:
                return values[0]
            if rows is None:
                return torch.cat(values)
        if rows is None:
            if sizes and self.loop.batch in symbols_of(node):
                # Fewer rows give a smaller value: all take the room of the largest, and their own corner of it.
                whole = shape_at(node.meta["val"], sizes)
                values = [_in_corner(v, whole) for v in values]
            return torch.stack(values)
        if rows.outer != 1:
            wide = [v.unflatten(rows.dim, (rows.outer, -1)) for v in values]
            return torch.cat(wide, rows.dim + 1).flatten(rows.dim, rows.dim + 1)
        return torch.cat(values, rows.dim)


class Eager(contract.Backend):
    """It takes every loop."""

    name = "eager"
    words = "batched pieces run by torch, a Python loop over the rest; any device"

    def reasons_against(self, loop: LoopProgram) -> contract.Reasons:
        return []

    def compile(self, loop: LoopProgram) -> Runner:
        return Runner(loop)


def _in_corner(value: Tensor, shape: Sequence[int]) -> Tensor:
    if list(value.shape) == list(shape):
        return value
    made = value.new_zeros(shape)
    made[tuple(map(slice, value.shape))] = value
    return made


def _between(value: Tensor, place: Rows | None, span: Span, begin: int, end: int) -> Tensor:
    """What a tensor with the values of a span's steps holds of the steps begin .. end - 1."""
    if begin == span.start and end == span.stop:
        return value
    if place is None:
        return value[begin - span.start : end - span.start]
    offsets = span.schedule.offsets
    return _steps_of(value, place, offsets[begin] - span.first, offsets[end] - offsets[begin], 1)


def _empty(node: fx.Node, sizes: dict[str, int]) -> Tensor:
    value, rows = node.meta["val"], rows_of(node)
    shape = shape_at(value, sizes)
    if rows is None:
        shape = [0, *shape]
    else:
        shape[rows.dim] = 0
    return torch.empty(shape, dtype=value.dtype, device=value.device)


def _take(value: Tensor, rows: Rows, members: Tensor | None, size: Any) -> Tensor:
    """The rows of a step out of all B rows. size: how many; not read where `members` are given."""
    if members is None and value.shape[rows.dim] == size * rows.inner * rows.outer:
        return value
    if rows.inner == 0:
        return value  # no numbers at all
    if not rows.plain:
        wide = value.unflatten(rows.dim, (rows.outer, -1, rows.inner))
        narrow = _take(wide, Rows(rows.dim + 1), members, size)
        return narrow.flatten(rows.dim, rows.dim + 2)
    if members is not None:
        return value.index_select(rows.dim, members)
    return value.narrow(rows.dim, 0, size)


def _put(full: Tensor, part: Tensor, members: Tensor | None, size: Any) -> Tensor:
    """All B rows with those of a step replaced."""
    if members is not None:
        return full.index_copy(0, members, part)
    return part if size == full.shape[0] else torch.cat([part, full[size:]])


def _print_steps(loop: LoopProgram, resets: bool, after: bool) -> Callable[..., Any]:
    """def steps(sizes, B, count, states, constants, sequences, kept, [marks, *reset_to]) -> states"""
    source = Source()
    add = source.add
    names: dict[fx.Node, str] = {}
    for node in loop.graph.nodes:
        if node.op in ("placeholder", "call_function"):
            names[node] = node.name
    back = [f"back{i}" for i in range(len(loop.prevs))]
    heading = "sizes, rows, count, states, constants, sequences, kept"
    add(f"def steps({heading}{', marks, ' + ', '.join(back) if resets else ''}):", 0)
    add(_bind_symbols(loop))
    _unpack(add, [names[p] for p in loop.prevs], "states")
    _unpack(add, [names[i.node] for i in loop.inputs if i.kind == "once"], "constants")
    for i in range(len(loop.kept)):
        add(f"keep{i} = kept[{i}].append")
    add("for step in range(count):")
    for j, item in enumerate([i for i in loop.inputs if i.kind == "step"]):
        add(f"{names[item.node]} = sequences[{j}][step]", 2)
    if resets:
        add("mark = marks[step]", 2)
        if not after:
            _print_reset(add, [names[p] for p in loop.prevs], back, loop)
    _print_body(source, loop, names)
    for i, node in enumerate(loop.kept):
        add(f"keep{i}({names[node]})", 2)
    left = [names[p] for p in loop.prevs]
    if left:
        add(f"{', '.join(left)}, = {', '.join(names[n] for n in loop.nexts)},", 2)
    if resets and after:
        _print_reset(add, left, back, loop)
    add(f"return [{', '.join(left)}]")
    return source.build("steps")


def _bind_symbols(loop: LoopProgram) -> str:
    symbols = {s for node in loop.graph.nodes for s in symbols_of(node)}
    lines = [f"{s} = rows" if s == loop.batch else f"{s} = sizes.get('{s}')" for s in sorted(symbols, key=str)]
    return "; ".join(lines) or "pass"


def _unpack(add: Callable[..., None], names: list[str], origin: str) -> None:
    if names:
        add(f"{', '.join(names)}, = {origin}")


def _print_reset(add: Callable[..., None], names: list[str], back: list[str], loop: LoopProgram) -> None:
    add("if mark is not None:", 2)
    for prev, name, to in zip(loop.prevs, names, back):
        ones = "".join(", 1" for _ in prev.meta["val"].shape[1:])
        add(f"{name} = torch.where(mark.view(-1{ones}), {to}, {name})", 3)


def _print_body(source: Source, loop: LoopProgram, names: dict[fx.Node, str]) -> None:
    calls = loop.calls
    keep = set(loop.kept) | set(loop.nexts)
    sums = fuse_addmm(calls, keep)
    skipped = {product for product, _ in sums.values()}
    dying = last_uses(calls, keep | set(loop.prevs) | {i.node for i in loop.inputs}, sums)
    for node in calls:
        if node in skipped:
            continue
        if node in sums:
            product, other = sums[node]
            a, b = product.args
            text = f"{source.hold(torch.addmm, 'f')}({names[other]}, {names[a]}, {names[b]})"
        else:
            text = call_text(source, node, names.__getitem__)
        source.add(f"{names[node]} = {text}", 2)
        gone = [names[d] for d in dying.get(node, []) if d is not node]
        if gone:
            source.add(f"del {', '.join(gone)}", 2)


__all__ = ["Eager", "Runner", "print_size"]
