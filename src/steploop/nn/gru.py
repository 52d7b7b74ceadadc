"""The gated recurrent unit (Cho et al. 2014) in torch.nn's form: the reset gate acts after the product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..state import State
from ._gated import GatedCell


def gru_step(
    x: Tensor,
    h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Tensor:
    """One GRU step: x (B, I), h (B, H) -> the new h (B, H).

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr);  z = sigmoid(W_iz x + b_iz + W_hz h + b_hz);
    n = tanh(W_in x + b_in + r (W_hn h + b_hn));  h' = (1 - z) n + z h.
    """
    x_r, x_z, x_n = F.linear(x, weight_ih, bias_ih).chunk(3, dim=-1)
    h_r, h_z, h_n = F.linear(h, weight_hh, bias_hh).chunk(3, dim=-1)
    r = torch.sigmoid(x_r + h_r)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    # Under autocast the products are half precision; the state keeps its own dtype.
    return (n + z * (h - n)).to(h.dtype)


class GRUCell(GatedCell):
    """A GRU cell with torch.nn.GRUCell's formula and parameter names.

    r, z = sigmoid of the first two thirds of W_ih x + b_ih + W_hh h + b_hh;
    n = tanh(W_in x + b_in + r (W_hn h + b_hn));  h' = (1 - z) n + z h.
    This differs from Cho et al. (2014), where r multiplies h before the product, and where z and 1 - z are
    swapped.

    One step takes x (B, input_size) and returns h (B, hidden_size).  State: `h` (B, hidden_size), zeros at
    first.
    A torch.nn.GRUCell's state_dict loads, and the other way round.
    Raises ValueError for a size below 1, TypeError for one that is no int.
    """

    def __init__(self, input_size, hidden_size, bias=True, device=None, dtype=None):
        super().__init__(3, input_size, hidden_size, bias, device=device, dtype=dtype)
        self.h = State(hidden_size)

    def step(self, x: Tensor) -> Tensor:
        h = gru_step(x, self.h.prev, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        self.h.next = h
        return h
