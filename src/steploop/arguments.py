"""What a caller gives, taken apart: the step's sequences and constants, and the constants for `begin`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .errors import InputError, describe, message
from .inputs import constant_leaves, sequences
from .signature import RESERVED, signature_of
from .step import Step, Survey
from .tree import Structure


@dataclass(eq=False)
class Arguments:
    """One call's sequences and constants, taken apart.

    xs, constants: tensors.
    x_structure: of the tuple of positional arguments.  constant_structure: of the dict of constants.
    constant_batched: per constant tensor.
    """

    xs: list[Tensor]
    x_structure: Structure
    constants: list[Tensor]
    constant_structure: Structure
    constant_batched: list[bool]


def take_apart(
    step: Step, tree: Survey, xs: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Arguments, dict[str, Any]]:
    """(the step's arguments, flat; all constants by name, for `begin`). Raises StepError, InputError."""
    tensors, structure = sequences(xs)
    signature = signature_of(step)
    wanted = constants
    if constants:
        if any(name in RESERVED for name in constants):
            raise InputError(_reserved_constant(constants))
        begins = [signature_of(child, "begin") for child in tree.begins]
        only_begin = {
            name
            for name in constants
            if not signature.takes(name) and any(begin.takes(name) for begin in begins)
        }
        wanted = {name: value for name, value in constants.items() if name not in only_begin}
    signature.check(step, len(xs), wanted, inside=False)
    constant_tensors, constant_structure, batched, plain = constant_leaves(wanted)
    if len(wanted) < len(constants):
        rest = {name: value for name, value in constants.items() if name not in wanted}
        plain = {**plain, **constant_leaves(rest)[3]}
    return Arguments(tensors, structure, constant_tensors, constant_structure, batched), plain


def _reserved_constant(constants: dict[str, Any]) -> str:
    name = next(name for name in constants if name in RESERVED)
    return message(
        f"`{name}=` is not an argument of a call.",
        expected="constants of the step",
        fix=f"sl.Loop(step, {name}=...) where the Loop is made",
    )


def check_on_masked(on_masked: str) -> None:
    if on_masked not in ("zero", "repeat"):
        raise InputError(
            message(
                "`on_masked` says what outputs are at masked steps.",
                expected='"zero" or "repeat"',
                found=describe(on_masked),
                fix='on_masked="zero"',
            )
        )
