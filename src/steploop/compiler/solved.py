"""Linear algebra that torch checks: where it can't be done, a loop raises as the plain loop does.

A trace has no numbers to look at, so it takes the forms of torch.linalg that check nothing (`solve_ex`, ...). What they
give goes through one operator that does nothing but look at their `info` when it runs, for all steps at once or in a
native loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import singular
from .ops.rules import first_axis
from .ops.table import add


def _look(value: Tensor, info: Tensor, operation: str) -> Tensor:
    # While a CUDA graph records, nothing has a value yet.
    if not (info.is_cuda and torch.cuda.is_current_stream_capturing()) and bool(info.any()):
        raise singular(operation)
    return value.clone()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None: ...


def _over_an_axis(_: Any, in_dims: tuple[Any, ...], value: Tensor, info: Tensor, operation: str) -> tuple[Tensor, Any]:
    return torch.ops.steploop.solved(value, info, operation), in_dims[0]


_library = torch.library.Library("steploop", "FRAGMENT")
_library.define("solved(Tensor value, Tensor info, str operation) -> Tensor")
_library.impl("solved", _look, "CompositeExplicitAutograd")
torch.library.register_fake("steploop::solved", lambda value, info, operation: torch.empty_like(value), lib=_library)
torch.library.register_autograd(
    "steploop::solved", lambda ctx, gradient: (gradient, None, None), setup_context=_setup, lib=_library
)
torch.library.register_vmap("steploop::solved", _over_an_axis, lib=_library)
add("solved", rows=first_axis())


def looked_at(name: str, results: int = 1) -> Callable[..., Any]:
    """The function of torch.linalg of that name, for a trace. results: how many it gives."""
    function = getattr(torch.linalg, f"{name}_ex")

    def call(*args: Any, **kwargs: Any) -> Any:
        first, *rest = function(*args, **kwargs)
        first = torch.ops.steploop.solved(first, rest[-1], f"linalg.{name}")
        return first if results == 1 else (first, *rest[: results - 1])

    return call
