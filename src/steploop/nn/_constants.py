"""How a step that wraps others hands on its constants (keyword arguments)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import StepError, message
from ..signature import signature_of
from ..step import Step


def constants_for(cell: nn.Module, constants: dict[str, Any], begin: bool = False) -> dict[str, Any]:
    """Those constants that the cell's step (or forward, for an ordinary module) takes.

    begin: also those that a `begin` in it takes, for a cell that is run by a Loop of its own.

    A Step that takes any constants only to hand them on says to whom, by a method `_hands_constants_to`.
    """
    return {n: v for n, v in constants.items() if _takes(cell, n) or (begin and _begins_with(cell, n))}


def check_constants_used(wrapper: nn.Module, cells: Iterable[nn.Module], constants: dict[str, Any]) -> None:
    """Raise StepError for a constant that no step of the cells takes, nor any `begin` below them."""
    cells = list(cells)
    for name in constants:
        if not any(_takes(cell, name) or _begins_with(cell, name) for cell in cells):
            kinds = ", ".join(dict.fromkeys(type(cell).__name__ for cell in cells))
            raise StepError(
                message(
                    f"{type(wrapper).__name__} got a constant that no cell in it takes: `{name}`.",
                    expected=f"a name that the step or begin of {kinds} takes",
                    found=f"`{name}=`",
                    fix=f"add {name} to the arguments of a cell's step, or leave it out",
                )
            )


def _takes(cell: nn.Module, name: str) -> bool:
    if isinstance(cell, Step):
        inside = getattr(cell, "_hands_constants_to", None)
        return signature_of(cell).takes(name) if inside is None else any(_takes(part, name) for part in inside())
    parameters = inspect.signature(cell.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _begins_with(cell: nn.Module, name: str) -> bool:
    steps = (m for m in cell.modules() if isinstance(m, Step) and type(m).begin is not Step.begin)
    return any(signature_of(step, "begin").takes(name) for step in steps)
