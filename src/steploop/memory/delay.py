"""Delay: what came in n steps ago."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..state import State
from .base import Frames, Memory, check_step_input, cleaned, whole_number


class Delay(Memory):
    """y_t = x_{t-n}; before that `init`. RETURNN's `prev:`, for any n >= 1.

    n: how many valid steps back.  init: a number, or a tensor that broadcasts to one row's x (a Parameter
    gets gradients): what stands before the first step, and after a reset.

    delay(x): x (B, ...) of any dtype -> (B, ...).  Whole sequence: concat(init n times, x[:-n]).
    Raises InputError for an n that is not a whole number >= 1.
    """

    def __init__(self, n: int = 1, init: float | Tensor = 0) -> None:
        super().__init__()
        self.n = whole_number("Delay", "n", n, 1)
        self.inlined = self.n == 1  # which the compiler makes a shift
        self.past = State(..., init=init)

    def check(self, x: Tensor) -> None:
        check_step_input("Delay", "x", x)

    def step(self, x: Tensor) -> Tensor:
        self.check(x)
        past = self.past.sized(self.n, *x.shape[1:], like=x)
        self.past.next = torch.cat([past[:, 1:], x.unsqueeze(1)], 1) if self.n > 1 else x.unsqueeze(1)
        return past[:, 0]

    def sequence(
        self, xs: tuple[Any, ...], constants: dict[str, Any], state: dict[str, Tensor], reset_to: dict[str, Tensor],
        lengths: Tensor | None, resets: Tensor | None,
    ) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
        frames = Frames(cleaned(xs[0], lengths), state["past"], reset_to["past"], lengths, resets)
        return frames.back(self.n), {"past": frames.last()}

    def extra_repr(self) -> str:
        return f"n={self.n}"
