"""A remembering operation as one call of the step graph that is being captured."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..compiler.memory_operator import call_memory
from ..frame import Frame, run_in
from ..step import states_below
from ..tree import flatten, unflatten


def opaque_step(op: Any, frame: Frame, xs: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
    """One step of `op` inside a running step: an opaque call while the compiler traces, else its step form."""
    if frame.sizing is not None:
        return op.step(*xs, **arguments)
    xs, arguments = op.sequences_of(xs, arguments)  # what has a slice per step is no constant
    named = list(states_below(op))
    names, states = [n for n, _ in named], [s for _, s in named]
    x_leaves, x_tree = flatten(xs)
    constant_leaves, constant_tree = flatten(arguments)
    returned: dict[str, Any] = {}

    def one_step(x: list[Tensor], c: list[Tensor], prevs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        inner = Frame({s: f"{n}" for n, s in named}, dict(zip(states, prevs)), "step", frame.batch)
        with run_in(inner):
            result = op.step(*unflatten(x, x_tree), **unflatten(c, constant_tree))
        leaves, returned["tree"] = flatten(result)
        return leaves, inner.nexts(states)

    def whole_sequence(
        x: list[Tensor],
        c: list[Tensor],
        start: list[Tensor],
        back: list[Tensor],
        lengths: Any,
        resets: Any,
        steps: int,
    ) -> tuple[list[Tensor], list[Tensor]]:
        with run_in(None):
            result, after = op.sequence(
                unflatten(x, x_tree), unflatten(c, constant_tree), dict(zip(names, start)),
                dict(zip(names, back)), lengths, resets, **({"steps": steps} if op.takes_steps else {}),
            )  # fmt: skip
        return flatten(result)[0], [after[n] for n in names]

    def frames(x: list[Tensor], c: list[Tensor], start: list[Tensor], back: list[Tensor], lengths: Any, resets: Any,
               steps: int) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        with run_in(None):
            outputs, after = op.frames_of_all_steps(
                unflatten(x, x_tree), dict(zip(names, start)), dict(zip(names, back)), lengths, resets
            )
        return list(outputs), [after[n] for n in names]

    prevs: list[Any] = [frame.prev[s] for s in states]
    once = frames if hasattr(op, "frames_of_all_steps") else None
    called = call_memory(op, one_step, whole_sequence, once, x_leaves, constant_leaves, prevs)
    if called is None:
        return op.step(*xs, **arguments)
    outputs, nexts = called
    for state, value in zip(states, nexts):
        frame.next[state] = value
    return unflatten(outputs, returned["tree"])
