"""Long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000), as torch.nn has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..state import State
from ._gated import GatedCell


def lstm_step(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM step: x (B, I), h (B, P or H), c (B, H) -> the new h and c.

    i, f, g, o = split(W_ih x + b_ih + W_hh h + b_hh);  c' = sigmoid(f) c + sigmoid(i) tanh(g);
    h' = sigmoid(o) tanh(c'), and W_hr h' where there is a projection (Sak et al. 2014).
    """
    i, f, g, o = (F.linear(x, weight_ih, bias_ih) + F.linear(h, weight_hh, bias_hh)).chunk(4, dim=-1)
    c_new = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h_new = torch.sigmoid(o) * torch.tanh(c_new)
    if weight_hr is not None:
        h_new = F.linear(h_new, weight_hr)
    # Under autocast the products are half precision; the states keep their own dtype.
    return h_new.to(h.dtype), c_new.to(c.dtype)


class LSTMCell(GatedCell):
    """An LSTM cell with torch.nn.LSTMCell's formula and parameter names.

    i, f, g, o = split(W_ih x + b_ih + W_hh h + b_hh);  c' = sigmoid(f) c + sigmoid(i) tanh(g);
    h' = sigmoid(o) tanh(c'), and h' = W_hr (sigmoid(o) tanh(c')) with proj_size > 0 (Sak et al. 2014, the
    formula of torch.nn.LSTM; torch.nn.LSTMCell has no projection).

    One step takes x (B, input_size) and returns h.  States: `h` (B, proj_size or hidden_size) and
    `c` (B, hidden_size), zeros at first.  A torch.nn.LSTMCell's state_dict loads, and the other way round.
    Raises ValueError for a size out of range, TypeError for one that is no int.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(4, input_size, hidden_size, bias, proj_size, device=device, dtype=dtype)
        self.proj_size = proj_size
        self.h = State(proj_size or hidden_size)
        self.c = State(hidden_size)
        if not proj_size:
            self.weight_hr = None

    def step(self, x: Tensor) -> Tensor:
        h, c = lstm_step(
            x,
            self.h.prev,
            self.c.prev,
            self.weight_ih,
            self.weight_hh,
            self.bias_ih,
            self.bias_hh,
            self.weight_hr,
        )
        self.h.next = h
        self.c.next = c
        return h

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return f"{text}, proj_size={self.proj_size}" if self.proj_size else text
