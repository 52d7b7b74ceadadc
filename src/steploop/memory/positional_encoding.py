"""PositionalEncoding: sines and cosines of the number of the step."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from ..state import State
from .base import Memory, check_step_input, one_of, whole_number
from .step_index import counting

LAYOUTS = ("halves", "interleaved")


class PositionalEncoding(Memory):
    """pe_t = [sin(t w_0), sin(t w_1), ..., cos(t w_0), cos(t w_1), ...], or x_t + pe_t.

    w_i = base ** -(i / (D/2 - 1)) with the layout "halves" (tensor2tensor's and RETURNN's; a last zero where
    D is odd); w_i = base ** -(2i / D) with sines and cosines in turn with "interleaved" (Vaswani et al.
    2017). t counts the row's valid steps since the start or the latest reset.

    size: D.  encoding(): (B, D);  encoding(x): x (B, D) -> x + pe_t.  `at(positions)` gives pe at other positions.
    Raises InputError for a size that is no whole number >= 1, or an unknown layout.
    """

    takes_steps = True
    frequency: Tensor

    def __init__(self, size: int, layout: str = "halves", base: float = 10000.0) -> None:
        super().__init__()
        self.size = whole_number("PositionalEncoding", "size", size, 1)
        self.layout = one_of("PositionalEncoding", "layout", layout, LAYOUTS)
        half = size // 2 if layout == "halves" else (size + 1) // 2
        steps = torch.arange(half, dtype=torch.float64)
        exponent = steps / max(half - 1, 1) if layout == "halves" else 2 * steps / size
        frequency = torch.exp(-exponent * math.log(base)).to(torch.get_default_dtype())
        self.register_buffer("frequency", frequency, persistent=False)
        self.count = State(init=0, dtype=torch.int64)

    def check(self, x: Tensor | None = None) -> None:
        if x is not None:
            check_step_input("PositionalEncoding", "x", x, features=self.size)

    def step(self, x: Tensor | None = None) -> Tensor:
        self.check(x)
        count = self.count.prev
        self.count.next = count + 1
        return self._added(x, count)

    def sequence(
        self, xs: tuple[Any, ...], constants: dict[str, Any], state: dict[str, Tensor], reset_to: dict[str, Tensor],
        lengths: Tensor | None, resets: Tensor | None, steps: int | None = None,
    ) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
        x = xs[0] if xs else None
        steps = steps if x is None else len(x)
        index, after = counting(state["count"], reset_to["count"], cast(int, steps), lengths, resets)
        return self._added(x, index), {"count": after}

    def _added(self, x: Tensor | None, count: Tensor) -> Tensor:
        encoding = self.at(count)
        return encoding if x is None else x + encoding.to(x.dtype)

    def at(self, count: Tensor) -> Tensor:
        """pe at any positions (...), integers -> (..., D). It remembers nothing: for a constant position, or with
        an offset, `encoding.at(index() + offset)`, index a `StepIndex`. RETURNN's `constant` and `offset`."""
        angle = count.unsqueeze(-1).to(self.frequency.dtype) * self.frequency
        if self.layout == "interleaved":
            return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., : self.size]
        parts = [angle.sin(), angle.cos()]
        if self.size % 2:
            parts.append(torch.zeros_like(count, dtype=self.frequency.dtype).unsqueeze(-1))
        return torch.cat(parts, -1)

    def extra_repr(self) -> str:
        return f"{self.size}, layout={self.layout!r}"
