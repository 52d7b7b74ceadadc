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

    cell:    a Step; or a whole-sequence layer, batch first: sl.nn.Bidirectional(..., batch_first=True), sl.Loop,
        sl.nn.LSTM, torch.nn.LSTM and the like, or any module that is called as layer(x, lengths=..., **constants)
        and returns (outputs (B, S, ...), anything).
    reverse: run the inner axis from its end (a Step; a layer has its own direction).
    output:  "all" inner steps; or the "last" one in running order: that of a reversed cell is at the first inner
        position. Of two directions each gives its own last: the forward half stands at the last valid position,
        the backward half at the first, as in Keras's Bidirectional (return_sequences=False). A module of your own
        says what is last by a method last_output(x, lengths=..., **constants) -> (outputs (B, ...), anything).

    rnn(x, inner_lengths=None, **constants): x (B, S, ...) with the inner axis behind the batch,
    inner_lengths (B,) integers, per step, so that they may differ between steps -> (B, S, ...), zeros beyond
    inner_lengths; or (B, ...) for the last (zeros where inner_lengths is 0).  constants: the cell's.

    Raises StepError for a cell that is no module, has the time axis first, or does not say what is last;
    InputError for an unknown output or an x without inner axis.
    """

    def __init__(self, cell: nn.Module, reverse: bool = False, output: str = "all") -> None:
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise StepError(
                message("SequenceRNN wraps a Step.", expected="SequenceRNN(cell)", found=describe(cell))
            )
        self.output = one_of("SequenceRNN", "output", output, OUTPUTS)
        self.reverse = bool(reverse)
        if isinstance(cell, Step):
            cell = Loop(cell, batch_first=True, reverse=reverse)
        else:
            _check_layer(cell, self.reverse, self.output)
        self.loop: Any = cell

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
        if self.output == "all":
            return self.loop(x, **constants)[0]
        if not isinstance(self.loop, nn.RNNBase):
            return self.loop.last_output(x, **constants)[0]
        y = _last_of_torch_layer(self.loop, x, constants)
        return y if inner_lengths is None else torch.where(inner_lengths[:, None] > 0, y, torch.zeros_like(y))

    def sequence(
        self, xs: tuple[Any, ...], constants: dict[str, Any], state: dict[str, Tensor], reset_to: dict[str, Tensor],
        lengths: Tensor | None, resets: Tensor | None,
    ) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
        steps, batch = xs[0].shape[:2]
        valid = None
        if lengths is not None:
            valid = (torch.arange(steps, device=lengths.device)[:, None] < lengths).flatten()
            keep = valid.nonzero()[:, 0]
        flat: list[Any] = [None if x is None else x.flatten(0, 1) for x in xs]
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


def _check_layer(layer: nn.Module, reverse: bool, output: str) -> None:
    """StepError unless a whole-sequence layer can stand in a step and says what SequenceRNN is to give."""
    name = type(layer).__name__
    if reverse:
        raise StepError(
            message(
                f"SequenceRNN: reverse=True with {name}, a layer that has a direction of its own.",
                expected="reverse=True with a Step, or a layer that runs in reverse",
                fix="SequenceRNN(sl.Loop(cell, batch_first=True, reverse=True))",
            )
        )
    if not getattr(layer, "batch_first", True):
        raise StepError(
            message(
                f"SequenceRNN: {name} takes the time axis first; in a step the batch is.",
                expected="a layer with batch_first=True",
                fix=f"{name}(..., batch_first=True)",
            )
        )
    if output == "last" and not isinstance(layer, nn.RNNBase) and not hasattr(layer, "last_output"):
        raise StepError(
            message(
                f'SequenceRNN: output="last" of {name}, which does not say which way it runs.',
                expected="a Step, sl.Loop, sl.nn.Bidirectional, a layer of sl.nn or torch.nn, or a module with a "
                "method last_output",
                fix="def last_output(self, x, lengths=None): ...  returns (outputs (B, ...), anything)",
            )
        )


def _last_of_torch_layer(layer: nn.RNNBase, x: Tensor, constants: dict[str, Any]) -> Tensor:
    """(B, features): what the last layer of torch.nn's RNN, GRU or LSTM ended with, in both directions."""
    _, state = layer(x, **constants)
    h = state[0] if isinstance(state, tuple) else state
    return torch.cat([h[-2], h[-1]], -1) if layer.bidirectional else h[-1]
