"""A captured step, as it is kept: its graphs, what they depended on, and where their tensors come from."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .dependencies import Dependencies
from .free_numbers import FreeNumber
from .program import Call, Program
from .reads import Reads
from .trace import Signature, Trace
from .walk import Number

# torch's tracer patches classes while it runs: one trace at a time. A trace may start another (an inner loop).
lock = threading.RLock()


def hint(size: Any) -> int:
    """The size of an axis; under another trace the size it was seen with, without fixing it."""
    node = getattr(size, "node", None)
    return int(size) if node is None else int(node.hint)


@dataclass(frozen=True)
class ProgramFacts:
    """What a capture knows of its Program: not the Program itself, which would keep the user's step alive."""

    state_names: list[str]
    x_names: list[str]
    constant_names: list[str]
    constant_batched: list[bool]
    batched: bool

    @staticmethod
    def of(program: Program) -> ProgramFacts:
        return ProgramFacts(program.state_names, program.x_names, program.constant_names, program.constant_batched,
                     program.batched)  # fmt: skip


@dataclass(eq=False)
class Made:
    """What has been made of a capture so far.

    invocations: what runs a call, by the options of the call.
    lowered: the executables, which calls of several options share.
    bytes: of all that a backward may keep of a row and step, and of what it could make again, by which tensors require
        gradients.
    texts: the loop as text in exported programs (or the key of an invocation, where it has none).
    streams: a step as one kernel call, by backend; None where the backend does not take it.
    rowwise: whether all that it gives has its rows in front and does not mix them; None: nobody asked.
    calls: how many there were; counted where kept captures are checked.
    rows_apart: of a step for one number of rows, whether no row sees another; None: nobody asked.
    """

    invocations: dict[Hashable, Any] = field(default_factory=dict)
    lowered: dict[Hashable, Any] = field(default_factory=dict)
    bytes: dict[tuple[bool, ...], tuple[int, ...]] = field(default_factory=dict)
    texts: dict[Hashable, Any] = field(default_factory=dict)
    streams: dict[str, Any] = field(default_factory=dict)
    rowwise: bool | None = None
    calls: int = 0
    rows_apart: bool | None = None


# Where a captured tensor comes from: its number in the walk, itself, or free floats.
Slot = int | Tensor | FreeNumber


@dataclass(eq=False)
class Capture:
    """A captured step. `joint` is made when a gradient is first asked for.

    It is kept under its step and must not keep that alive: it refers to the step's tensors by number alone.

    reads, key, floats: what the step can have read, and the walk's key and floats then (None: the float is free).
    slots: for every captured tensor its number in the walk, or the tensor itself where the walk has not met
    it (a constant that the step makes), or how it is made of free floats.
    pinned: objects that its key names by their id.
    batch: the only B it holds for, or None.
    like: for B = 0 and B = 1, whether the step does the same as with several rows, once that was asked.
    by_tracing: the paths of Python values that a trace changes, and no run of the step for real.
    family: what calls must have in common with that for which it was made, sizes apart; set where it may serve others.
    not_free: the paths of floats that are inputs of it and can be none of its gradient.
    earlier: the slots as they were numbered for what the step was known to read before its gradient was captured.
    """

    program: ProgramFacts
    signature: Signature
    symbolic: bool
    forward: Trace
    reads: Reads
    key: Hashable
    floats: list[float | None]
    facts: list[tuple[str, Any]]
    slots: list[Slot]
    pinned: list[Any]
    batch: int | None
    inline: frozenset[int] = frozenset()
    joint: Trace | None = None
    joint_slots: list[Slot] = field(default_factory=list)
    no_joint: bool = False
    not_free: frozenset[str] = frozenset()
    made: Made = field(default_factory=Made)
    like: dict[int, bool] = field(default_factory=dict)
    by_tracing: frozenset[str] = frozenset()
    family: Hashable = None
    earlier: dict[Reads, list[Slot]] = field(default_factory=dict)

    def slots_in(self, dependencies: Dependencies) -> list[Slot]:
        """The slots by the numbers of a walk, which may be of a time when less was known to be read."""
        reads = dependencies.reads
        return self.slots if reads is self.reads or reads == self.reads else self.earlier[reads]

    @property
    def out_spec(self) -> Any:
        return self.forward.out_spec

    def tensors(self, dependencies: Dependencies, joint: bool = False) -> list[Tensor]:
        """The captured tensors, as they are now."""
        slots = self.joint_slots if joint else self.slots_in(dependencies)
        found: list[Tensor] = []
        for slot in slots:
            if isinstance(slot, int):
                found.append(dependencies.tensors[slot])
            else:
                found.append(slot.tensor(dependencies.float_values()) if isinstance(slot, FreeNumber) else slot)
        return found

    def sizes(self, call: Call) -> dict[str, int]:
        return symbol_values(self.forward, call)

    def free_axes(self) -> set[tuple[str, int, int]]:
        """The axes, besides the batch, whose size is a symbol."""
        return {place for place in self.forward.graph.symbols.values() if place[0] != "batch"}

    def has_floats(self, dependencies: Dependencies) -> bool:
        """Whether the floats that are no inputs are what they were."""
        now = dependencies.floats
        return len(now) == len(self.floats) and all(
            known is None or same_float(known, number.value) for known, number in zip(self.floats, now)
        )

    def free(self, dependencies: Dependencies) -> list[Number]:
        return [n for n, known in zip(dependencies.floats, self.floats) if known is None]


def same_float(a: float, b: float) -> bool:
    """Whether two floats compute alike: 0.0 and -0.0 do not, NaN equals itself."""
    return a.hex() == b.hex()


def symbol_values(trace: Trace, call: Call) -> dict[str, Any]:
    """The values of the symbols of a trace in a call, by name."""
    found = {}
    for name, kind, index, dim in trace.symbols:
        if kind == "batch":
            found[name] = call.batch
        elif kind == "x":
            found[name] = call.xs[index].shape[dim + 1]
        elif kind == "constant":
            found[name] = call.constants[index].shape[dim]
        else:
            found[name] = call.initial[index].shape[dim]
    return found


def is_batch(trace: Trace, name: str) -> bool:
    """Whether a symbol, by its name, is the batch size."""
    return trace.graph.batch is not None and str(trace.graph.batch) == name
