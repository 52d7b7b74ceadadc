"""Started: a model for search together with the States and constants that one batch gives it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError, message
from ..step import Step
from .search import checked_step


@dataclass(eq=False)
class Started:
    """What a model's `search_step(inputs)` gives: searches take it in the place of a model.

    step: from the label before this step to scores.  state: its States by path.  constants: by name.
    `sl.Loop(started.step)(labels, state=started.state, **started.constants)` runs it over given labels.
    """

    step: Step
    state: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)


def taken_apart(model: Any, state: Any, constants: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """(the Step, its state, its constants) of a model as a caller gives it."""
    if not isinstance(model, Started):
        return checked_step(model, "the model"), state, constants
    twice = [*(["state"] if state is not None else []), *(n for n in constants if n in model.constants)]
    if twice:
        raise InputError(
            message(
                f"`{twice[0]}` was given, and the model brings its own.",
                expected="a call without it",
                fix=f"leave out {twice[0]}=",
            )
        )
    return model.step, model.state, {**model.constants, **constants}
