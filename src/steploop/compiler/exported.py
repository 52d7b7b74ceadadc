"""A whole loop as one line of text: what a program that leaves this process carries in the place of a Loop.

    steploop-loop <format> <digest> <data>

The data are the captured step (with its gradient, if one was wanted), how its tensors stand in the operator's list, and
the options of the call: as JSON, packed and in base64. No Python is in it, and nothing in it is evaluated: operators
and functions of sizes are named, and `graph_data` looks them up. Weights are not in it; they are among the operator's
tensors.
docs/export.md says what a user sees of it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import DataError, InputError, UnsupportedError, describe, message
from .capture import ProgramFacts, symbol_values
from .choices import choice
from .conditions import condition, conditions_of
from .graph_data import Damaged, NotPlain, Reader, graph_to_data, one_line, size_from_data, size_to_data
from .invocation import Invocation
from .ir.graph import StepGraph, expression
from .layout import Layout
from .loop_operator import invocation_of
from .lower import Needs
from .program import Call
from .trace import Trace

FORMAT = 1
_NAME = "steploop-loop"
_LARGEST = 1 << 28  # bytes of unpacked data
_LOOPS = (torch.ops.steploop.inner_loop.default, torch.ops.steploop.loop.default)
_GRADIENTS = (torch.ops.steploop.inner_loop_backward.default, torch.ops.steploop.loop_backward.default)


@dataclass(frozen=True)
class Options:
    """How a loop is run. differentiable: the captured tensors whose gradient the graph has.
    ones: the sets of symbols that may be 1 together, see `ones.py`."""

    reverse: bool
    on_masked: str
    training: bool
    backend: str
    save: str
    differentiable: list[bool]
    ones: list[list[str]]


# -- writing -------------------------------------------------------------------------------------------------


def to_text(
    trace: Trace, facts: ProgramFacts, layout: Layout, options: Options, hints: dict[str, int],
    tensors: Sequence[Tensor],
) -> str:  # fmt: skip
    """hints: a size for each symbol.  tensors: those of a call.

    Raises UnsupportedError where something in the step has no form as text.
    """
    devices = dict(zip(_inputs(trace.graph), (t.device for t in _given(layout, tensors))))
    try:
        data = _loop_to_data(trace, facts, layout, options, hints, devices)
    except NotPlain as error:
        raise UnsupportedError(
            message(
                f"This loop can't be exported: its step holds {error}.",
                expected="operators of torch, or operators registered with torch.library",
                fix='sl.Loop(step, backend="reference") is exported step by step, for one length',
            )
        ) from error
    packed = zlib.compress(json.dumps(data, separators=(",", ":"), allow_nan=False).encode(), 9)
    return f"{_NAME} {FORMAT} {_digest(packed)} {base64.b64encode(packed).decode()}"


def _digest(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()[:32]


def _inputs(graph: StepGraph) -> list[fx.Node]:
    return [*graph.xs, *graph.constants, *graph.prevs, *graph.captured]


def _given(layout: Layout, tensors: Sequence[Any]) -> list[Any]:
    """What stands for `_inputs` in the operator's list."""
    parts = layout.split(tensors)
    return [*parts["xs"], *parts["constants"], *parts["initial"], *parts["captured"]]


def _loop_to_data(
    trace: Trace, facts: ProgramFacts, layout: Layout, options: Options, hints: dict[str, int],
    devices: dict[fx.Node, torch.device],
) -> dict[str, Any]:  # fmt: skip
    loops: list[Any] = []
    numbers: dict[Any, int] = {}

    def inner(node: fx.Node) -> tuple[int, Any]:
        if node.target not in (*_LOOPS, *_GRADIENTS):
            return -1, None
        place = 3 if node.target in _GRADIENTS else 1
        key = node.args[place]
        if key not in numbers:
            numbers[key] = len(loops)
            tensors = node.args[1 if node.target in _GRADIENTS else 0]
            loops.append(_inner_to_data(invocation_of(key), tensors, devices))
        return place, {"loop": numbers[key]}

    graph = graph_to_data(trace.graph, hints, devices, inner)
    return {
        "made by": f"torch {torch.__version__}", "facts": _plain(asdict(facts)), "layout": asdict(layout),
        "options": asdict(options), "graph": graph, "conditions": [size_to_data(c) for c in trace.conditions],
        "loops": loops,
    }  # fmt: skip


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """Names as `one_line` reads them."""
    for key, names in facts.items():
        if key.endswith("_names"):
            facts[key] = ["".join(c if c.isprintable() and c != "\\" else "?" for c in n) for n in names]
    return facts


def _inner_to_data(
    invocation: Invocation, tensors: Sequence[fx.Node], outer: dict[fx.Node, torch.device]
) -> Any:
    """A loop inside the step."""
    if isinstance(invocation, Exported):
        return {"text": invocation.key}
    trace, layout = invocation.trace, invocation.layout
    devices = dict(zip(_inputs(trace.graph), (outer.get(n, n.meta["val"].device) for n in _given(layout, tensors))))
    hints = invocation.hints
    differentiable = [g is not None for g in trace.graph.grad_captured] or [False] * layout.captured
    options = Options(
        invocation.reverse, invocation.on_masked, invocation.training, invocation.lowered.backend,
        invocation.lowered.save, differentiable, _sets(hints),
    )  # fmt: skip
    return _loop_to_data(trace, invocation.program, layout, options, hints, devices)


def _sets(names: Iterable[str]) -> list[list[str]]:
    """All sets: what an inner loop may be given was tried with the step around it."""
    names = sorted(names)
    return [list(chosen) for count in range(1, len(names) + 1) for chosen in combinations(names, count)]


# -- reading -------------------------------------------------------------------------------------------------


def from_text(text: str, lower: Callable[..., Any]) -> Exported:
    """The loop that a text is. lower: makes the executables, see `Exported`.

    Raises UnsupportedError for another format, DataError for a text that is damaged.
    """
    with _disable_current_modes(), torch._C._DisableFuncTorch(), torch.no_grad():
        return _from_data(_unpacked(text), lower, text)


def _unpacked(text: str) -> Any:
    parts = text.split(" ")
    if len(parts) != 4 or parts[0] != _NAME:
        raise _damaged("it does not begin as one")
    if parts[1] != str(FORMAT):
        raise UnsupportedError(
            message(
                "An exported loop is written in another format than this version of steploop reads.",
                expected=f"format {FORMAT}",
                found=f"format {parts[1][:20]}",
                fix="install the version that the program was exported with, or export it again",
            )
        )
    try:
        packed = base64.b64decode(parts[3], validate=True)
    except (binascii.Error, ValueError):
        raise _damaged("it has characters that do not belong there") from None
    if _digest(packed) != parts[2]:
        raise _damaged("its content is not that of which it holds the digest")
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(packed, _LARGEST)
        if not unpacker.eof:
            raise _damaged("it is cut off, or much too large")
        return json.loads(data)
    except (zlib.error, ValueError, RecursionError) as error:
        raise _damaged(str(error)) from error


def _damaged(why: str) -> DataError:
    return DataError(
        message(
            f"An exported loop can't be read: {why}.",
            expected="what torch.export wrote",
            fix="save the program again, and copy its file whole",
        )
    )


def _from_data(data: Any, lower: Callable[..., Any], text: str | None) -> Exported:
    if isinstance(data, dict) and set(data) == {"text"}:
        text = str(data["text"])
        data = _unpacked(text)
    try:
        return _read(data, lower, text)
    except Damaged as error:
        raise _damaged(f"it names {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise _damaged(f"{type(error).__name__}: {error}") from error


def _read(data: dict[str, Any], lower: Callable[..., Any], text: str | None) -> Exported:
    inner = [_from_data(d, lower, None) for d in data["loops"]]
    reader = Reader(data["graph"], lambda key: inner[key["loop"]].key)
    symbols = reader.graph.symbols
    given = [size_from_data(c, reader.symbols) for c in data["conditions"]]
    if not all(isinstance(c, Boolean) and not isinstance(c, sympy.Symbol) for c in given):
        raise Damaged("a condition that is none")
    conditions = [*given, *conditions_of(reader.env, set(symbols))]
    trace = Trace(reader.graph, [], condition(conditions), None, keep_alive=inner, conditions=conditions)
    facts, layout = ProgramFacts(**data["facts"]), Layout(**data["layout"])
    options = Options(**data["options"])
    options = replace(options, ones=[sorted(str(reader.symbols[n]) for n in ones) for ones in options.ones])
    found = Exported(
        trace, facts, layout, options, lower, text, hints={
            str(reader.symbols[name]): hint for name, *_, hint in data["graph"]["symbols"]
        },
    )  # fmt: skip
    found.check_itself()
    return found


class Exported(Invocation):
    """A loop that came as text. Its executables are made when it first runs.

    lower: (graph, names, backend, save, one_loop, needs or None) -> executables; needs: every gradient there can be.
    """

    def __init__(
        self, trace: Trace, facts: ProgramFacts, layout: Layout, options: Options, lower: Callable[..., Any],
        text: str | None, hints: dict[str, int],
    ):  # fmt: skip
        from .passes.manager import mixing_reasons

        graph = trace.graph
        mixing = graph.batch is not None and bool(mixing_reasons(graph))
        self.options, self._lower, self._lowered = options, lower, None
        super().__init__(
            trace, facts, layout, options.reverse, options.on_masked, options.training, True, mixing, None,
            key=text or 0, hints=hints,
        )  # fmt: skip
        self._inputs = [(n.name, [*map(expression, n.meta["val"].shape)], n.meta["val"]) for n in _inputs(graph)]

    def check_itself(self) -> None:
        """Damaged unless the parts fit together."""
        graph, layout, facts = self.trace.graph, self.layout, self.program
        counts = [len(graph.xs), len(graph.constants), len(graph.prevs), len(graph.captured)]
        if counts != [layout.xs, layout.constants, layout.initial, layout.captured]:
            raise Damaged("another number of inputs than it has")
        if len(graph.nexts) != layout.initial or len(facts.constant_batched) != layout.constants:
            raise Damaged("another number of states than it has")
        for name in (*facts.state_names, *facts.x_names, *facts.constant_names):
            one_line(name)
        options = self.options
        if options.on_masked not in ("zero", "repeat"):
            raise Damaged("an option that there is not")
        try:
            choice(options.backend)
        except UnsupportedError as error:
            raise Damaged(str(error)) from None
        if any(n.op != "placeholder" for n in _inputs(graph)):
            raise Damaged("an input that is computed")
        if not all(map(_alike, graph.prevs, graph.nexts)):
            raise Damaged("a state of two types")
        pairs: list[tuple[Sequence[fx.Node | None], list[fx.Node]]] = [
            (graph.ct_outputs, graph.outputs), (graph.ct_nexts, graph.nexts), (graph.grad_xs, graph.xs),
            (graph.grad_constants, graph.constants), (graph.grad_prevs, graph.prevs),
            (graph.grad_captured, graph.captured),
        ]  # fmt: skip
        for gradients, of in pairs:
            if len(gradients) != (len(of) if options.training else 0) or not all(map(_alike, gradients, of)):
                raise Damaged("gradients of something else")

    @property
    def lowered(self) -> Any:
        if self._lowered is None:
            layout, one_loop = self.layout, self.mixing and (self.layout.lengths or self.layout.mask)
            needs = None
            if self.training:
                flags = [n.meta["val"].is_floating_point() for n in _inputs(self.trace.graph)]
                x, c, s = layout.xs, layout.constants, layout.initial
                at = x + c + s
                states = tuple(flags[x + c : at])
                needs = Needs(tuple(flags[:x]), tuple(flags[x : x + c]), states, states, tuple(flags[at:]))
            names, o = self.program.state_names, self.options
            self._lowered = self._lower(self.trace.graph, names, o.backend, o.save, one_loop, needs)
        return self._lowered

    @lowered.setter
    def lowered(self, _: Any) -> None:
        """Made when it is needed."""

    def schedule(self, tensors: Sequence[Tensor], steps: int, batch: int) -> Any:
        self._check_call(tensors, steps, batch)
        return super().schedule(tensors, steps, batch)

    def _check_call(self, tensors: Sequence[Tensor], steps: int, batch: int) -> None:
        """InputError unless the loop holds for these tensors: it was captured once, and is not again."""
        parts = self.layout.split(tensors)
        if self.layout.lengths and batch:
            low, high = (int(v) for v in parts["lengths"].aminmax())
            if low < 0 or high > steps:
                raise InputError(
                    message(
                        "`lengths` are not all between 0 and T.",
                        expected=f"0 <= length <= {steps}",
                        found=f"smallest {low}, largest {high}",
                    )
                )
        call = Call(parts["xs"], parts["constants"], parts["initial"], 0, batch)
        sizes = symbol_values(self.trace, call)
        rows = str(self.trace.graph.batch)
        for i, ((name, shape, like), tensor) in enumerate(zip(self._inputs, _given(self.layout, tensors), strict=True)):
            found = tensor.shape[1:] if i < self.layout.xs else tensor.shape
            wanted = [sizes[str(s)] if getattr(s, "is_Symbol", False) else s for s in shape]
            if [*found] != wanted or tensor.dtype != like.dtype or tensor.device.type != like.device.type:
                raise InputError(
                    message(
                        f"An exported loop holds for other tensors than it is given: {name}.",
                        expected=f"({', '.join(map(str, shape))}) {str(like.dtype).removeprefix('torch.')} on "
                        f"{like.device.type}, in one step",
                        found=describe(tensor),
                        fix="export again for such tensors; axes of which the size may change are named in "
                        "dynamic_shapes",
                    )
                )
        likely = {n: self.hints[n] if n == rows and v in (0, 1) else v for n, v in sizes.items()}
        ones = sorted(n for n, v in sizes.items() if v == 1)
        none = steps > 0 and any(n != rows and v == 0 for n, v in sizes.items())
        if none or (ones and ones not in self.options.ones) or not self.trace.holds_for(likely):
            raise InputError(
                message(
                    "An exported loop was captured for other sizes than it is given: its step does something else "
                    "for these.",
                    expected=" and ".join(["at least 2 along each dynamic axis", *map(str, self.trace.conditions)]),
                    found=", ".join(f"{n} = {v} ({_place(*at)})" for n, v, at in self._sizes_named(sizes)),
                    fix="export a program of its own for them",
                )
            )

    def _sizes_named(self, sizes: dict[str, int]) -> list[tuple[str, int, list[Any]]]:
        return [(name, sizes[name], place) for name, *place in self.trace.symbols]

    def require_gradient(self, needs: Needs) -> None:
        if not self.training:
            raise UnsupportedError(
                message(
                    "This loop was exported for values only and has no gradient.",
                    expected="an export with gradients on, of a model with a parameter that requires one",
                    fix="with torch.enable_grad(): torch.export.export(...)",
                )
            )
        for i, (needed, there) in enumerate(zip(needs.captured, self.options.differentiable)):
            if needed and not there:
                raise UnsupportedError(
                    message(
                        f"A weight of an exported loop requires a gradient that was not exported (number {i}).",
                        expected="requires_grad as it was at export",
                        fix="export the model while that weight requires a gradient",
                    )
                )


def _alike(a: fx.Node | None, b: fx.Node) -> bool:
    """Whether two values have one type; None is a gradient that is zero."""
    if a is None:
        return True
    one, other = a.meta["val"], b.meta["val"]
    return [*map(expression, one.shape)] == [*map(expression, other.shape)] and one.dtype == other.dtype


def _place(kind: str, index: int, dim: int) -> str:
    return "the batch" if kind == "batch" else f"axis {dim} of {kind} {index} in one step"
