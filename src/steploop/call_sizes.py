"""The number of steps and the number of rows of a call, from whatever tells them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .arguments import Arguments
from .errors import InputError, describe, message


@dataclass
class CallSizes:
    """T and B, from whatever tells them."""

    mask: Any
    resets: Any
    lengths: Any
    state: Any
    arguments: Arguments
    batch_first: bool

    def time(self, of_xs: Any, steps: Any) -> Any:
        if steps is not None and (isinstance(steps, bool) or not hasattr(steps, "__index__") or steps < 0):
            raise InputError(message("`steps` is a number of steps.", expected="an int >= 0", found=describe(steps)))
        if of_xs is not None:
            fix = "leave out steps=; it is for calls without sequences"
            _check_agrees("steps", steps, "T", of_xs, fix)
            return of_xs
        if steps is not None:
            return steps
        for given in (self.mask, self.resets):
            if isinstance(given, Tensor) and given.dim() == 2:
                return given.shape[1 if self.batch_first else 0]
        raise InputError(
            message("Nothing tells how many steps to run.", expected="a sequence, or steps=", fix="loop(steps=10)")
        )

    def batch(self, of_xs: Any, batch_size: Any) -> Any:
        if of_xs is not None:
            _check_agrees("batch_size", batch_size, "B", of_xs, "leave out batch_size=, or check batch_first")
            return of_xs
        if batch_size is not None:
            return batch_size
        for tensor, axis in self._others():
            if isinstance(tensor, Tensor) and tensor.dim() > axis:
                return tensor.shape[axis]
        raise InputError(
            message(
                "Nothing tells how many rows the batch has.",
                expected="a sequence, a state, a constant (B, ...), lengths, mask, resets or batch_size=",
                fix="loop(steps=10, batch_size=4)",
            )
        )

    def _others(self) -> Any:
        yield self.lengths, 0
        yield self.mask, 0 if self.batch_first else 1
        yield self.resets, 0 if self.batch_first else 1
        if isinstance(self.state, dict):
            yield from ((value, 0) for value in self.state.values())
        pairs = zip(self.arguments.constants, self.arguments.constant_batched, strict=True)
        yield from ((constant, 0) for constant, batched in pairs if batched)


def _check_agrees(name: str, given: Any, axis: str, of_xs: Any, fix: str) -> None:
    """InputError where a size that is given as an argument is not that of the sequences."""
    if given is not None and given != of_xs:
        problem = f"`{name}=` differs from the sequences' {axis}."
        raise InputError(message(problem, expected=f"{axis}={of_xs}", found=f"{name}={given}", fix=fix))
