"""What a compiled call does, for people: what runs before, in and after which loop, where it comes from, and why."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import Any, cast

from torch import Tensor, fx

from ..errors import InputError
from ..view import page, plan_table
from .execute import Executable
from .ir.graph import LoopProgram, Rows, expression, line_of, op_name
from .memory_operator import is_memory, operation_name
from .ops.table import is_view
from .patterns import is_linear_recurrence
from .problem import BatchedPart, LoopPart, Partition, StateNodes
from .sources import Source, Sources, caller_of


@dataclass(frozen=True)
class Op:
    """One call. name: the ATen packet ("mm").  line: "file.py:14".  shape: of its result for one step, B symbolic.
    where: "once", "before", "loop k", "after".  why: what keeps it in its loop, or what it waits for.

    hop: the shortest form of `why`: "h -> line 14 -> h".
    product: the factors of a matrix product, "(T*B, 8) @ (8, 32)"; T*B where it is one product for all steps.
    view: it computes nothing: another view of the same numbers.
    piece: what runs it, by the name that `Profile.pieces` has.
    caller: the line of the user's own code that led there: `line` itself, unless that is in an installed package.
    places: [number in `Plan.sources`, line] of the line and of those that called it, innermost first.
    """

    name: str
    line: str
    shape: str
    where: str
    why: str
    hop: str = ""
    product: str = ""
    view: bool = False
    piece: str = ""
    caller: str = ""
    places: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class PlannedLoop:
    """One loop. states: paths of its States.  backend: what runs it.  reasons: why faster backends do not.
    kind: "linear recurrence" where it is one, else "".  launched: "in CUDA graphs" where it is, else "".
    kernel: the source of its native kernel, else ""."""

    index: int
    ops: list[Op]
    states: list[str]
    backend: str
    reasons: list[str]
    kind: str = ""
    launched: str = ""
    kernel: str = ""


@dataclass(frozen=True)
class Profile:
    """What a call took, in seconds: the run in the middle of `runs` runs.

    seconds: the whole pass.  pieces: each part of it, by name, in the order in which they run; what is missing to
    `seconds` is spent around them (checks, packing of rows, autograd).
    """

    runs: int
    seconds: float
    pieces: dict[str, float]


@dataclass(eq=False, repr=False)
class Plan:
    """What one call runs. before and after: batched over all steps (or once); loops: one step after the other.

    An operation that some loop waits for is in `before`, also where it stands between two loops. All others are in
    `after`. Without any loop all operations are in `before`.
    backward: the plan of the gradient, None where nothing asks for one.
    sources: the functions of the user's that its lines are in.  profile: what it took, from `Loop.profile`.
    again: what `stages` runs.

    `str(plan)` is a table with one row per source line; `plan.text(full=True)` has a row per call, views included,
    and the whole way from state to state. In a notebook a plan shows itself as a page.
    """

    title: str
    before: list[Op]
    loops: list[PlannedLoop]
    after: list[Op]
    notes: list[str] = field(default_factory=list)
    backward: Plan | None = None
    sources: list[Source] = field(default_factory=list)
    profile: Profile | None = None
    again: Callable[[], str] | None = field(default=None, repr=False)

    def text(self, full: bool = False) -> str:
        """The plan as a table; full: a row per call, with the whole reason."""
        return plan_table.text(self, full)

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
        return self.text()

    def __repr__(self) -> str:
        return f"<Plan of {plan_table.summary(self)}>"

    def _repr_html_(self) -> str:
        return page.in_a_frame(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain Python data."""
        found = asdict(replace(self, backward=None, again=None))
        del found["again"]
        found["backward"] = None if self.backward is None else self.backward.to_dict()
        return found

    def to_json(self) -> str:
        """The plan as a JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def save_html(self, path: str | PathLike[str]) -> None:
        """Writes the plan as one HTML page that needs nothing else: no network, no other file."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(page.render(self.to_dict()))


# -- from what runs it ---------------------------------------------------------------------------------------


def describe(executable: Executable, title: str, notes: Sequence[str] = ()) -> Plan:
    """The plan of a graph whose loops have been given their backends."""
    executable.settle()
    return _Described(executable).plan(title, list(notes))


class _Described:
    def __init__(self, executable: Executable):
        self.executable, self.partition = executable, executable.partition
        self.mixing = executable.problem.stepwise
        self.sources = Sources()
        self.names = piece_names(self.partition)
        self.absorbed = {n: self.names[loop] for loop, ran in executable.widened.items() for n in ran.nodes}

    def plan(self, title: str, notes: list[str]) -> Plan:
        partition = self.partition
        awaited = _awaited(partition)
        before = [self._outside(n, "once", "the same at every step", ONCE) for n in partition.once if _shown(n)]
        loops: list[PlannedLoop] = []
        after: list[Op] = []
        for segment in partition.segments:
            if isinstance(segment, LoopPart):
                loops.append(self._planned(segment, len(loops) + 1))
                continue
            why = f"batched; uses loop {len(loops)}" if loops else "batched"
            for node in (n for n in segment.nodes if _shown(n, partition)):
                early = node in awaited or not partition.loops
                where = "before" if early else "after"
                piece = self.absorbed.get(node, self.names[segment])
                (before if early else after).append(self._outside(node, where, why, piece))
        return Plan(title, before, loops, after, notes, sources=self.sources.found)

    def _outside(self, node: fx.Node, where: str, why: str, piece: str) -> Op:
        if node in self.partition.delayed:
            name = self.partition.delayed[node].name
            why = f"{name}.prev is {name}.next of the step before"
            return Op("delay", "", _shape(node), where, why, hop=why, view=True, piece=piece)
        return self._op(node, where, why, why.removeprefix("batched; "), piece)

    def _op(self, node: fx.Node, where: str, why: str, hop: str, piece: str) -> Op:
        line = line_of(node)
        return Op(
            op_name(node), str(line), _shape(node), where, why, hop, _product(node, where), is_view(node), piece,
            caller_of(line), self.sources.places(line),
        )  # fmt: skip

    def _planned(self, loop: LoopPart, number: int) -> PlannedLoop:
        name, ops = self.names[loop], []
        for node in loop.nodes:
            if not _shown(node):
                continue
            chain, hop = recurrence(node, loop)
            if (mixing := self.mixing.get(node)) is not None:
                chain = hop = mixing
            op = self._op(node, name, chain, hop, name)
            if is_memory(node):
                why = "its whole sequence at once: nothing that it reads depends on it"
                op = replace(op, name=operation_name(node), why=why, hop="its whole sequence at once")
            ops.append(op)
        program = cast(LoopProgram, loop.program)
        reasons = [f"{line}: {text}" if line else text for text, line in program.reasons]
        return PlannedLoop(
            number, ops, [s.name for s in loop.states], program.backend, reasons,
            "linear recurrence" if is_linear_recurrence(program) else "", program.launched,
            self.executable.runners[loop].text,
        )  # fmt: skip


ONCE = "once"
_Neighbours = Callable[[fx.Node], list[fx.Node]]


def piece_names(partition: Partition) -> dict[BatchedPart | LoopPart, str]:
    """What each part of a partition is called: "before loop 1", "loop 1", "after the loops"."""
    names: dict[BatchedPart | LoopPart, str] = {}
    numbers = {loop: k for k, loop in enumerate(partition.loops, 1)}
    following = len(numbers) + 1
    for segment in reversed(partition.segments):
        if isinstance(segment, LoopPart):
            following = numbers[segment]
            names[segment] = f"loop {following}"
        else:
            last = "after the loops" if numbers else "all steps at once"
            names[segment] = f"before loop {following}" if following <= len(numbers) else last
    return {segment: names[segment] for segment in partition.segments}


def _shown(node: fx.Node, partition: Partition | None = None) -> bool:
    if partition is not None and node in partition.delayed:
        return True
    return node.op == "call_function" and op_name(node) != "getitem"


_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "convolution": 0, "dot": 0, "mv": 0, "addmv": 1}


def _product(node: fx.Node, where: str) -> str:
    """The factors of a matrix product; those with rows have the rows of all steps where it runs once for all."""
    first = _PRODUCTS.get(op_name(node))
    if first is None:
        return ""
    rows = "B" if where.startswith("loop") else "T*B"
    shapes = []
    for factor in node.args[first : first + 2]:
        if not isinstance(factor, fx.Node):
            return ""
        shapes.append(_shape(factor, rows if factor.meta.get("varies") else "B"))
    return " @ ".join(shapes)


def _shape(node: fx.Node, batch: str = "B") -> str:
    value = node.meta.get("val")
    rows = node.meta.get("rows")
    tensors = value if isinstance(value, (tuple, list)) else [value]
    places = rows if isinstance(rows, (tuple, list)) else [rows] * len(tensors)
    texts = []
    for tensor, place in zip(tensors, places):
        if isinstance(tensor, Tensor):
            dim = place.dim if isinstance(place, Rows) else None
            sizes = [_size(expression(s), batch if i == dim else "") for i, s in enumerate(tensor.shape)]
            texts.append("(" + ", ".join(sizes) + ")")
    return " ".join(texts)


def _size(size: Any, batch: str) -> str:
    # Which letters the tracer gave to the batch, and to other sizes that only a call knows, is of no interest.
    if isinstance(size, int) or size.is_number:
        return str(size)
    return "n" if not batch else batch if size.is_Symbol else f"n*{batch}"


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


def recurrence(node: fx.Node, loop: LoopPart) -> tuple[str, str]:
    """Why a call is in its loop: the shortest way from a state through it to a state, whole and in one hop.

    ("h.next <- tanh line 14 <- mm line 12 <- h.prev", "h -> line 14 -> h")
    """
    inside = {*loop.nodes, *(s.prev for s in loop.states)}
    nexts = {s.next: s for s in loop.states}
    prevs = {s.prev: s for s in loop.states}
    up = _path(node, nexts, lambda n: [u for u in n.users if u in inside])
    down = _path(node, prevs, lambda n: [i for i in n.all_input_nodes if i in inside])
    if up is None or down is None:
        return "", ""
    steps = [f"{nexts[up[-1]].name}.next", *(_word(n) for n in reversed(up)), *(_word(n) for n in down[1:-1])]
    if len(down) > 1:
        steps.append(f"{prevs[down[-1]].name}.prev")
    number = caller_of(line_of(node)).rpartition(":")[2]
    hops = [prevs[down[-1]].name, *([f"line {number}"] if number else []), nexts[up[-1]].name]
    return " <- ".join(s for s in steps if s), " -> ".join(hops)


def _path(start: fx.Node, goals: dict[fx.Node, StateNodes], neighbours: _Neighbours) -> list[fx.Node] | None:
    """The shortest path from a node to one of the goals, both included."""
    came: dict[fx.Node, fx.Node | None] = {start: None}
    queue = deque([start])
    node: fx.Node | None
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
    if node.op != "call_function" or is_view(node):
        return ""
    line = line_of(node).rpartition(":")[2]
    return f"{op_name(node)} line {line}" if line else op_name(node)
