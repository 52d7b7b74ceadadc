"""The simple recurrent network (Elman 1990), with torch.nn.RNNCell's formula and parameter names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..state import State
from ._gated import GatedCell

NONLINEARITIES = {"tanh": torch.tanh, "relu": torch.relu}


def rnn_step(
    x: Tensor,
    h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Tensor:
    """h' = f(W_ih x + b_ih + W_hh h + b_hh).  x (B, I), h (B, H) -> (B, H)."""
    preactivation = F.linear(x, weight_ih, bias_ih) + F.linear(h, weight_hh, bias_hh)
    # Under autocast the products are half precision; the state keeps its own dtype.
    return NONLINEARITIES[nonlinearity](preactivation).to(h.dtype)


class RNNCell(GatedCell):
    """A simple recurrent cell: `h' = tanh(W_ih x + b_ih + W_hh h + b_hh)` (Elman 1990; torch.nn.RNNCell).

    One step takes x (B, input_size) and returns h (B, hidden_size).  State: `h` (B, hidden_size), zeros at
    first.
    nonlinearity: "tanh" or "relu".  A torch.nn.RNNCell's state_dict loads, and the other way round.
    Raises ValueError for an unknown nonlinearity or a size below 1, TypeError for a size that is no int.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(1, input_size, hidden_size, bias, device=device, dtype=dtype)
        if nonlinearity not in NONLINEARITIES:
            raise ValueError(f'RNNCell: nonlinearity must be "tanh" or "relu", got {nonlinearity!r}')
        self.nonlinearity = nonlinearity
        self.h = State(hidden_size)

    def step(self, x: Tensor) -> Tensor:
        h = rnn_step(x, self.h.prev, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self.nonlinearity)
        self.h.next = h
        return h

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.nonlinearity == "tanh" else f"{text}, nonlinearity={self.nonlinearity}"
