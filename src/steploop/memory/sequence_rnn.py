"""SequenceRNN: a whole recurrent sequence over an inner axis, at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InputError, StepError, describe, message
from ..loop import Loop
from ..step import Step
from .base import Memory, one_of

OUTPUTS = ("all", "last")


class SequenceRNN(Memory):
    """At every step a cell runs over x's own inner axis, from fresh states. RETURNN's RecLayer over a window.

    The steps do not depend on each other, so it has no States: for a whole sequence, T and B become one
    batch of T * B inner sequences, run by one loop.

    cell:    a Step; or a whole-sequence layer, batch first, like sl.nn.Bidirectional(..., batch_first=True).
    reverse: run the inner axis from its end.  output: "all" inner steps, or the "last" one in running order.

    rnn(x, inner_lengths=None, **constants): x (B, S, ...) with the inner axis behind the batch,
    inner_lengths (B,) integers, per step, so that they may differ between steps -> (B, S, ...), zeros beyond
    inner_lengths; or (B, ...) for the last (zeros where inner_lengths is 0).  constants: the cell's.

    Raises StepError for a cell that is no module, InputError for an unknown output or an x without inner
    axis.
    """

    def __init__(self, cell: nn.Module, reverse: bool = False, output: str = "all") -> None:
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise StepError(
                message("SequenceRNN wraps a Step.", expected="SequenceRNN(cell)", found=describe(cell))
            )
        self.loop = Loop(cell, batch_first=True, reverse=reverse) if isinstance(cell, Step) else cell
        self.reverse = bool(reverse)
        self.output = one_of("SequenceRNN", "output", output, OUTPUTS)

    def check(self, x: Tensor, inner_lengths: Tensor | None = None, **constants: Any) -> None:
        if not isinstance(x, Tensor) or x.dim() < 2:
            raise InputError(
                message(
                    "SequenceRNN: x has no inner axis to run over.",
                    expected="(B, S, ...) in a step, (T, B, S, ...) for a whole sequence",
                    found=describe(x),
                )
            )

    def step(self, x: Tensor, inner_lengths: Tensor | None = None, **constants: Any) -> Any:
        self.check(x, inner_lengths)
        if inner_lengths is not None:
            constants = {**constants, "lengths": inner_lengths}
        y, _ = self.loop(x, **constants)
        if self.output == "all":
            return y
        return pytree.tree_map_only(Tensor, lambda o: self._last(o, inner_lengths), y)

    def _last(self, y: Tensor, lengths: Tensor | None) -> Tensor:
        if self.reverse:
            return y[:, 0]
        if lengths is None:
            return y[:, -1]
        index = (lengths - 1).clamp(min=0).to(torch.int64)
        index = index.reshape(-1, *[1] * (y.dim() - 1)).expand(-1, 1, *y.shape[2:])
        return y.gather(1, index).squeeze(1)

    def sequence(self, xs, constants, state, reset_to, lengths, resets) -> tuple[Any, dict[str, Tensor]]:
        steps, batch = xs[0].shape[:2]
        valid = None
        if lengths is not None:
            valid = (torch.arange(steps, device=lengths.device)[:, None] < lengths).flatten()
            keep = valid.nonzero()[:, 0]
        flat = [None if x is None else x.flatten(0, 1) for x in xs]
        if valid is not None:
            flat = [None if x is None else x.index_select(0, keep) for x in flat]
        row = torch.arange(batch, device=xs[0].device).repeat(steps)
        row = row if valid is None else row.index_select(0, keep)
        fixed = {name: _of_rows(value, row, batch) for name, value in constants.items()}
        y = self.step(*flat, **fixed)

        def back(o: Tensor) -> Tensor:
            if valid is not None:
                o = o.new_zeros((steps * batch, *o.shape[1:])).index_copy(0, keep, o)
            return o.unflatten(0, (steps, batch))

        return pytree.tree_map_only(Tensor, back, y), {}

    def extra_repr(self) -> str:
        return f"reverse={self.reverse}, output={self.output!r}"


def _of_rows(value: Any, row: Tensor, batch: int) -> Any:
    """A constant (B, ...) for rows that are steps and rows at once."""
    has_rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
    return value.index_select(0, row) if has_rows else value
