"""What a compiled call does, for people: what runs before, in and after which loop, where it comes from, and why."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

from torch import Tensor, fx

from ..errors import InputError
from .ir.graph import Rows, expression, line_of, op_name
from .memory_operator import is_memory, operation_name
from .partition import Loop, Partition, State
from .patterns import is_linear_recurrence


@dataclass(frozen=True)
class Op:
    """One call. name: the ATen packet ("mm").  line: "file.py:14".  shape: of its result for one step, B symbolic.
    where: "once", "before", "loop k", "after".  why: what keeps it in its loop, or what it waits for."""

    name: str
    line: str
    shape: str
    where: str
    why: str


@dataclass(frozen=True)
class PlannedLoop:
    """One loop. states: paths of its States.  backend: what runs it.  reasons: why faster backends do not.
    kind: "linear recurrence" where it is one, else "".  launched: "in CUDA graphs" where it is, else ""."""

    index: int
    ops: list[Op]
    states: list[str]
    backend: str
    reasons: list[str]
    kind: str = ""
    launched: str = ""


@dataclass(eq=False)
class Plan:
    """What one call runs. before and after: batched over all steps (or once); loops: one step after the other.

    An op that some loop waits for is in `before`, also where it stands between two loops; the others, and all
    of them when nothing loops after them, are in `after` (in `before` when there is no loop at all).
    backward: the plan of the gradient, None where nothing asks for one.
    again: what `stages` runs.
    """

    title: str
    before: list[Op]
    loops: list[PlannedLoop]
    after: list[Op]
    notes: list[str] = field(default_factory=list)
    backward: Plan | None = None
    again: Callable[[], str] | None = field(default=None, repr=False)

    def stages(self) -> str:
        """The step as text after every stage of the compiler: as it was captured, after every pass, its loops.

        The step is captured once more for it, on the inputs that the plan was made for.
        """
        if self.again is None:
            raise InputError("this plan was loaded or copied: only the plan that Loop.plan gave has the stages")
        return self.again()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "again": None}

    def __str__(self) -> str:
        text = "\n".join(_table(self))
        if self.backward is not None:
            text += "\n\n" + "\n".join(_table(self.backward))
        return text

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain Python data."""
        backward = None if self.backward is None else self.backward.to_dict()
        return {
            "title": self.title, "before": [asdict(o) for o in self.before],
            "loops": [asdict(loop) for loop in self.loops], "after": [asdict(o) for o in self.after],
            "notes": list(self.notes), "backward": backward,
        }  # fmt: skip

    def to_json(self) -> str:
        """The plan as a JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def save_html(self, path: str | PathLike[str]) -> None:
        """Writes the plan as one HTML page that needs nothing else."""
        from ..view.page import render

        with open(path, "w", encoding="utf-8") as file:
            file.write(render(self.to_dict()))


# -- from a partition ----------------------------------------------------------------------------------------


def describe(partition: Partition, title: str, mixing: dict[fx.Node, str], notes: Sequence[str] = ()) -> Plan:
    """The plan of a partition whose loops have been given their backends."""
    numbers = {id(loop): i for i, loop in enumerate(partition.loops, 1)}
    loops = [_planned(loop, numbers[id(loop)], mixing) for loop in partition.loops]
    awaited = _awaited(partition)
    before = [_outside(n, "once", "the same at every step", partition) for n in partition.once if _shown(n)]
    after: list[Op] = []
    latest = ""
    for segment in partition.segments:
        if isinstance(segment, Loop):
            latest = f"loop {numbers[id(segment)]}"
            continue
        for node in segment.nodes:
            if not _shown(node, partition):
                continue
            early = node in awaited or not partition.loops
            why = f"batched; uses {latest}" if latest else "batched"
            (before if early else after).append(_outside(node, "before" if early else "after", why, partition))
    return Plan(title, before, loops, after, list(notes))


def _shown(node: fx.Node, partition: Partition | None = None) -> bool:
    if partition is not None and node in partition.delayed:
        return True
    return node.op == "call_function" and op_name(node) != "getitem"


def _outside(node: fx.Node, where: str, why: str, partition: Partition) -> Op:
    if node in partition.delayed:
        name = partition.delayed[node].name
        return Op("delay", "", _shape(node), where, f"{name}.prev is {name}.next of the step before")
    return Op(op_name(node), line_of(node), _shape(node), where, why)


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    rows = node.meta.get("rows")
    tensors = value if isinstance(value, (tuple, list)) else [value]
    places = rows if isinstance(rows, (tuple, list)) else [rows] * len(tensors)
    texts = []
    for tensor, place in zip(tensors, places):
        if isinstance(tensor, Tensor):
            dim = place.dim if isinstance(place, Rows) else None
            sizes = [_size(expression(s), i == dim) for i, s in enumerate(tensor.shape)]
            texts.append("(" + ", ".join(sizes) + ")")
    return " ".join(texts)


def _size(size: Any, has_batch: bool) -> str:
    # Which letters the tracer gave to the batch, and to other sizes that only a call knows, is of no interest.
    if isinstance(size, int) or size.is_number:
        return str(size)
    return "n" if not has_batch else "B" if size.is_Symbol else "n*B"


def _awaited(partition: Partition) -> set[fx.Node]:
    """Nodes outside loops that some loop waits for."""
    found: set[fx.Node] = set()
    stack = [n for loop in partition.loops for n in loop.inputs]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        stack.extend([partition.delayed[node].next] if node in partition.delayed else node.all_input_nodes)
    return found


def _planned(loop: Loop, number: int, mixing: dict[fx.Node, str]) -> PlannedLoop:
    ops = []
    for node in loop.nodes:
        if _shown(node):
            why = mixing.get(node) or recurrence(node, loop)
            name = op_name(node)
            if is_memory(node):
                name, why = operation_name(node), "its whole sequence at once: nothing that it reads depends on it"
            ops.append(Op(name, line_of(node), _shape(node), f"loop {number}", why))
    program = loop.program
    backend = getattr(program, "backend", "")
    reasons = [f"{line}: {text}" if line else text for text, line in getattr(program, "reasons", [])]
    kind = "linear recurrence" if is_linear_recurrence(program) else ""
    launched = getattr(program, "launched", "")
    return PlannedLoop(number, ops, [s.name for s in loop.states], backend, reasons, kind, launched)


def recurrence(node: fx.Node, loop: Loop) -> str:
    """Why a call is in its loop: the shortest way from a state through it to a state.

    "h.next <- tanh line 14 <- mm line 12 <- h.prev"
    """
    inside = {*loop.nodes, *(s.prev for s in loop.states)}
    nexts = {s.next: s for s in loop.states}
    prevs = {s.prev: s for s in loop.states}
    up = _path(node, nexts, lambda n: [u for u in n.users if u in inside])
    down = _path(node, prevs, lambda n: [i for i in n.all_input_nodes if i in inside])
    if up is None or down is None:
        return ""
    steps = [f"{nexts[up[-1]].name}.next", *(_word(n) for n in reversed(up)), *(_word(n) for n in down[1:-1])]
    if len(down) > 1:
        steps.append(f"{prevs[down[-1]].name}.prev")
    return " <- ".join(s for s in steps if s)


def _path(start: fx.Node, goals: dict[fx.Node, State], neighbours: Any) -> list[fx.Node] | None:
    """The shortest path from a node to one of the goals, both included."""
    came: dict[fx.Node, fx.Node | None] = {start: None}
    queue = deque([start])
    while queue:
        node = queue.popleft()
        if node in goals:
            path = []
            while node is not None:
                path.append(node)
                node = came[node]
            return path[::-1]
        for other in neighbours(node):
            if other not in came:
                came[other] = node
                queue.append(other)
    return None


def _word(node: fx.Node) -> str:
    if node.op != "call_function" or op_name(node) == "getitem":
        return ""
    line = line_of(node).rpartition(":")[2]
    return f"{op_name(node)} line {line}" if line else op_name(node)


# -- as a table ----------------------------------------------------------------------------------------------


def _table(plan: Plan) -> list[str]:
    groups: list[tuple[str, list[Op]]] = [("before", plan.before)]
    for loop in plan.loops:
        states = ", ".join(loop.states) or "no state"
        kind = "".join(f"  ({text})" for text in (loop.kind, loop.launched) if text)
        groups.append((f"loop {loop.index}  [{loop.backend or 'not chosen'}]  states: {states}{kind}", loop.ops))
    groups.append(("after", plan.after))
    rows = [(title, _grouped(ops)) for title, ops in groups]
    widths = [_width((r[i] for _, part in rows for r in part), most) for i, most in ((0, 34), (1, 24), (2, 16))]
    count = sum(len(loop.ops) for loop in plan.loops)
    lines = [f"{plan.title}: {_plural(len(plan.loops), 'loop')} with {_plural(count, 'operation')} per step; "
             f"{_plural(len(plan.before) + len(plan.after), 'operation')} outside"]  # fmt: skip
    for title, part in rows:
        lines.append(title if part else f"{title}: nothing")
        for names, line, shape, why in part:
            lines.append(f"  {names:<{widths[0]}}  {line:<{widths[1]}}  {shape:<{widths[2]}}  {why}".rstrip())
    for loop in plan.loops:
        lines.extend(f"loop {loop.index} not faster: {reason}" for reason in loop.reasons)
    return [*lines, *plan.notes]


def _grouped(ops: Sequence[Op]) -> list[tuple[str, str, str, str]]:
    """One row per source line and reason, with the calls that it makes."""
    rows: list[tuple[list[str], Op]] = []
    for op in ops:
        same = rows and (rows[-1][1].line, rows[-1][1].where) == (op.line, op.where)
        if same and (not op.where.startswith("loop") or len(rows[-1][0]) < 3) and op.line:
            rows[-1] = ([*rows[-1][0], op.name], op)
        else:
            rows.append(([op.name], op))
    return [(_names(names), op.line, op.shape, op.why) for names, op in rows]


def _names(names: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(n if c == 1 else f"{n} x{c}" for n, c in counts.items())


def _width(texts: Iterable[str], most: int) -> int:
    return min(most, max((len(t) for t in texts), default=1))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
