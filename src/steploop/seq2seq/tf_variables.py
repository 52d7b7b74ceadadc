"""TF1's names for parameters: which part of which parameter each variable of a checkpoint is.

A module says it in `tf_variables(scope)`; `HasTFVariables` loads a checkpoint's arrays by these names and gives
them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedError, describe, message


def _whole(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, eq=False)
class Variable:
    """One variable of a checkpoint. view: from the parameter (or its gradient) to this variable, in TF's shape."""

    name: str
    parameter: Tensor
    view: Callable[[Tensor], Tensor] = _whole

    @property
    def shape(self) -> tuple[int, ...]:
        """The variable's shape in TF."""
        return tuple(self.view(self.parameter.detach()).shape)


class Variables(dict[str, np.ndarray]):
    """Arrays by TF1 name, "scope/kernel:0"; `variables["scope/kernel"]` finds the same."""

    def __missing__(self, name: str) -> np.ndarray:
        if name.endswith(":0"):
            raise KeyError(name)
        return self[f"{name}:0"]


def variables_of(module: nn.Module, scope: str) -> Iterator[Variable]:
    """The variables of a cell or layer under a scope. UnsupportedError for one that TF1 did not have."""
    if not hasattr(module, "tf_variables"):
        raise UnsupportedError(
            message(
                f"{type(module).__name__} has no names in a TF1 checkpoint.",
                expected="a cell of steploop.seq2seq.tf_cells, whose weights lie as TF1's do",
                found=type(module).__name__,
                fix="model.load_state_dict(...) loads any model's own state_dict",
            )
        )
    return cast(HasTFVariables, module).tf_variables(scope)


def joined(scope: str, name: str) -> str:
    """A name below a scope, which may be empty."""
    return f"{scope}/{name}" if scope else name


class HasTFVariables(nn.Module):
    """A model whose weights a TF1 checkpoint can fill. Subclasses have `tf_variables(scope)`."""

    scope: str = ""

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        """Every variable of the model, its name below `scope`."""
        raise NotImplementedError

    def load_tf_variables(self, variables: Mapping[str, Any]) -> None:
        """Copy the arrays of a TF1 checkpoint into the parameters.

        variables: {name: array}, names with or without ":0"; exactly this model's, no fewer and no more.
        Raises InputError that lists every name that is unknown, missing, or of another shape; then nothing is
        changed.
        """
        wanted = {variable.name: variable for variable in self.tf_variables(self.scope)}
        given = _by_plain_name(variables)
        _check(type(self).__name__, wanted, given)
        with torch.no_grad():
            for name, variable in wanted.items():
                place = variable.view(variable.parameter)
                place.copy_(torch.as_tensor(np.asarray(given[name])).to(place.dtype))

    def to_tf_variables(self) -> Variables:
        """{name: array} of every variable under its TF1 name with ":0": copies, in TF's shapes."""
        found = Variables()
        for variable in self.tf_variables(self.scope):
            found[f"{variable.name}:0"] = variable.view(variable.parameter.detach()).cpu().numpy().copy()
        return found


def plain_name(name: str) -> str:
    """A variable's name without ":0"."""
    return name.removesuffix(":0")


def _by_plain_name(variables: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(variables, Mapping):
        raise InputError(
            message(
                "load_tf_variables takes arrays by name.",
                expected="{name: array}",
                found=describe(variables),
                fix='model.load_tf_variables(dict(numpy.load("checkpoint.npz")))',
            )
        )
    given = {plain_name(name): value for name, value in variables.items()}
    if len(given) < len(variables):
        twice = sorted(name for name in given if name in variables and f"{name}:0" in variables)
        raise InputError(message('Names are given with ":0" and without it.', found=", ".join(twice)))
    return given


def _check(owner: str, wanted: Mapping[str, Variable], given: Mapping[str, Any]) -> None:
    problems = [f"unknown: {name} {_shape(value)}" for name, value in given.items() if name not in wanted]
    problems += [f"missing: {name} {v.shape}" for name, v in wanted.items() if name not in given]
    for name, variable in wanted.items():
        if name in given and _shape(given[name]) != variable.shape:
            problems.append(f"wrong shape: {name} is {_shape(given[name])}, the model has {variable.shape}")
    if not problems:
        return
    raise InputError(
        message(
            f"{owner}: these variables are not those of this model; nothing was loaded.",
            expected=f"{len(wanted)} variables, named by model.to_tf_variables()",
            found="\n            ".join(problems),
            fix="leave out what is not the model's (optimizer slots, global_step), "
            "and make the model with the sizes, cell and scope= of the checkpoint",
        )
    )


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in np.shape(value))
