"""Rows of the table for operations that are not torch's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...errors import InputError, describe, message
from ..ir.graph import packet_name
from .rules import first_axis, pointwise
from .table import Operation, put

_ROWS = {"pointwise": pointwise, "front": first_axis()}


def register(
    operation: Any, rows: str, linear: Sequence[Sequence[int]], written_as: Callable[..., Any] | None
) -> None:
    """Puts an operation into the table."""
    packet = _packet_of(operation)
    overloads = [getattr(packet, name) for name in packet.overloads()] if hasattr(packet, "overloads") else []
    name = packet_name(overloads[0]) if overloads else ""
    if "::" not in name:
        raise InputError(
            message(
                "Only operations of your own can be registered.",
                expected="an operation of torch.library: torch.ops.mylib.clip, or what @torch.library.custom_op gave",
                found=describe(operation),
                fix='@torch.library.custom_op("mylib::clip", mutates_args=()) makes one of a function',
            )
        )
    if rows not in _ROWS:
        raise InputError(
            message(
                f"`rows` says what {name} does with the rows of a batch.",
                expected=" or ".join(repr(known) for known in _ROWS),
                found=describe(rows),
                fix="leave an operation that mixes rows unregistered: it runs step by step",
            )
        )
    _check_groups(name, max(len(o._schema.arguments) for o in overloads), linear)
    groups = tuple(tuple(group) for group in linear)
    alone = rows == "pointwise"
    put(name, Operation(name, rows=_ROWS[rows], pointwise=alone, linear=groups, written_as=written_as))


def _packet_of(operation: Any) -> Any:
    overload = getattr(operation, "_opoverload", operation)  # what @custom_op gives holds its overload
    return getattr(overload, "overloadpacket", overload)


def _check_groups(name: str, most: int, linear: Any) -> None:
    listed = isinstance(linear, (list, tuple)) and all(isinstance(g, (list, tuple)) and g for g in linear)
    if not listed or any(not isinstance(at, int) or not 0 <= at < most for group in linear for at in group):
        raise InputError(
            message(
                f"`linear` names the arguments in which {name} is additive.",
                expected=f"groups of positions from 0 to {most - 1}, e.g. [(0,)] or [(0, 1)]",
                found=describe(linear),
                fix="linear=[(0,)] where op(a + b, c) = op(a, c) + op(b, c)",
            )
        )


