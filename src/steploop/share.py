"""share: the same weights a second time, with states of their own."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

from .errors import StepError, describe, message

M = TypeVar("M", bound=nn.Module)


def share(cell: M) -> M:
    """A second use of `cell` in the same step: the very same parameters and buffers, own States.

        self.cell2 = sl.share(self.cell1)

    The new module has no entries of its own in a state_dict and expects none; `parameters()` yields each
    parameter once. `.to()`, a parameter assigned anew on either, deepcopy and pickle of the parent keep the
    two tied. A learned `init` of a State is shared as well. Raises StepError if `cell` is not a module.
    """
    if not isinstance(cell, nn.Module):
        raise StepError(
            message(
                "sl.share takes a Step.",
                expected="a module",
                found=describe(cell),
                fix="sl.share(self.cell1)",
            )
        )
    twin = copy.deepcopy(cell, _keep_tensors(cell))
    for module in twin.modules():
        # plain functions on the instance: they survive deepcopy and pickle, unlike a class made here
        module.__dict__["_save_to_state_dict"] = save_nothing
        module.__dict__["_load_from_state_dict"] = load_nothing
    return twin


def _keep_tensors(cell: nn.Module) -> dict[int, Any]:
    """A deepcopy memo under which every tensor, and every dict of parameters or buffers, is its own copy."""
    memo: dict[int, Any] = {}
    for module in cell.modules():
        held = [module._parameters, module._buffers, *module._parameters.values(), *module._buffers.values()]
        held += [value for value in module.__dict__.values() if isinstance(value, Tensor)]
        memo.update((id(value), value) for value in held if value is not None)
    return memo


def save_nothing(destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """In the place of `_save_to_state_dict`: the tensors are saved where they were first made."""


def load_nothing(state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *rest: Any) -> None:
    """In the place of `_load_from_state_dict`: the tensors are loaded where they were first made."""
