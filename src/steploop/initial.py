"""What the States of a loop are before the first step: their `init`, then `begin`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .errors import InputError, StateError, message
from .frame import Frame, run_in
from .signature import signature_of
from .step import Survey


def own_values(
    tree: Survey, batch: Any, xs: list[Tensor], constants: list[Tensor], named: dict[str, Any]
) -> list[Tensor | None]:
    """Each State's own initial value (B, ...), None for one that neither `init` nor `begin` sets.

    named: the constants by name, for `begin`.
    """
    if not tree.states and not tree.begins:
        return []
    dtype, device = dtype_and_device(tree, xs, constants)
    values = [state.start(batch, state.own_dtype() or dtype, device) for state in tree.states]
    return _run_begins(tree, values, batch, named) if tree.begins else values


def require(values: list[Tensor | None], names: list[str]) -> list[Tensor]:
    """StateError if some State has no value to start from."""
    missing = [name for value, name in zip(values, names, strict=True) if value is None]
    if missing:
        raise StateError(
            message(
                f"State '{missing[0]}' has no value before the first step: it was made with init=None.",
                expected="its step's begin assigns .prev, or state= gives a value (resets need begin)",
                found="nothing set " + ", ".join(f"'{name}'" for name in missing),
                fix="def begin(self, ...): self.<name>.prev = ...",
            )
        )
    return cast("list[Tensor]", values)


def dtype_and_device(
    tree: Survey, xs: list[Tensor], constants: list[Tensor]
) -> tuple[torch.dtype, torch.device]:
    """Those of States that do not say their own."""
    return _dtype(tree, [*xs, *constants]), _device(tree, xs, constants)


def _dtype(tree: Survey, inputs: list[Tensor]) -> torch.dtype:
    if tree.parameter is not None:
        return tree.parameter.dtype
    for tensor in inputs:
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()


def _device(tree: Survey, xs: list[Tensor], constants: list[Tensor]) -> torch.device:
    for tensor in (*xs, *constants):
        return tensor.device
    return tree.parameter.device if tree.parameter is not None else torch.get_default_device()


def _run_begins(tree: Survey, values: list[Tensor | None], batch: Any, named: dict[str, Any]) -> list[Any]:
    names = dict(zip(tree.states, tree.names, strict=True))
    frame = Frame(names, dict(zip(tree.states, values, strict=True)), "begin", batch)
    with run_in(frame):
        for step in tree.begins:
            signature = signature_of(step, "begin")
            wanted = {name: value for name, value in named.items() if signature.takes(name)}
            missing = signature.required - set(wanted)
            if missing:
                raise InputError(
                    message(
                        f"{signature.owner}.begin needs the constant {', '.join(sorted(missing))}.",
                        expected=f"begin is defined at {signature.at}",
                        found=", ".join(named) or "no constants",
                        fix=f"loop(xs, {', '.join(f'{n}={n}' for n in sorted(missing))})",
                    )
                )
            step.begin(**wanted)
    return [frame.prev[state] for state in tree.states]
