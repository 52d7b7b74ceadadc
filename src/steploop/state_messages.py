"""What a State says to those who use it in another way than it is made for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .errors import StateError, describe, message
from .frame import running


def checked_shape(shape: tuple[Any, ...]) -> tuple[int, ...]:
    for size in shape:
        if isinstance(size, bool) or not hasattr(size, "__index__") or size.__index__() < 0:
            raise StateError(
                message(
                    "A State's shape is given as integers, without the batch axis.",
                    expected="sl.State(64) or sl.State(8, 16)",
                    found=describe(size),
                    fix="sl.State(*shape, init=..., dtype=...)",
                )
            )
    return tuple(size.__index__() for size in shape)


def bad_init(found: str) -> str:
    return message(
        "A State's `init` is not one of the known kinds.",
        expected='a number, a tensor of the State\'s shape, "learned", or None (begin sets it)',
        found=found,
        fix='sl.State(64, init="learned")',
    )


def bad_unsized_init(init: Any) -> str:
    learned = isinstance(init, str) and init == "learned"
    return message(
        "The `init` of a State whose shape the first step tells is not one of the known kinds.",
        expected="a number, a tensor or Parameter that broadcasts to one row's value, or a function (shape, dtype, "
        "device) -> tensor",
        found=describe(init) + (": nothing tells the shape of a Parameter yet" if learned else ""),
        fix="init=nn.Parameter(torch.zeros(size))  is a learned one" if learned else "init=0.0",
    )


def fix_type(value: Any, shape: Any, dtype: torch.dtype | None) -> str:
    if not isinstance(value, Tensor):
        return "assign a tensor (torch.full_like(self.<name>.prev, number) for a number)"
    if dtype is not None and value.dtype != dtype:
        name = str(dtype)
        own = str(value.dtype)
        return f"value.to({name}), or declare the State with dtype={own}"
    if value.dim() == len(shape) - 1 or math.prod(value.shape[1:]) != math.prod(shape[1:]):
        sizes = ", ".join(str(n) for n in value.shape[1:])
        return f"declare it as sl.State({sizes}) if that is the value's shape; the batch axis comes first"
    return "reshape the value to the State's shape; the batch axis comes first"


def needs_prev(state: Any, used: str, attribute: str = "") -> str:
    frame = running()
    name = frame.names.get(state) if frame is not None else None
    path = f"self.{name}" if name else "self.<name>"
    return message(
        f"State{f' {name!r}' if name else ''} was {used}: it is a slot, not a tensor.",
        expected=f"{path}.prev, its value after the step before; {path}.next once this step has written it",
        found=path,
        fix=f"{path}.prev{attribute}",
    )
