"""The gated recurrent unit (Cho et al. 2014) in torch.nn's form: the reset gate acts after the product."""

from __future__ import annotations

from typing import Any

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
    reset_after: bool = True,
) -> Tensor:
    """One GRU step: x (B, I), h (B, H) -> the new h (B, H).

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr);  z = sigmoid(W_iz x + b_iz + W_hz h + b_hz);
    n = tanh(W_in x + b_in + r (W_hn h + b_hn));  h' = (1 - z) n + z h.
    reset_after=False:  n = tanh(W_in x + b_in + W_hn (r h) + b_hn).
    """
    if not reset_after:
        return _reset_before(x, h, weight_ih, weight_hh, bias_ih, bias_hh)
    x_r, x_z, x_n = F.linear(x, weight_ih, bias_ih).chunk(3, dim=-1)
    h_r, h_z, h_n = F.linear(h, weight_hh, bias_hh).chunk(3, dim=-1)
    r = torch.sigmoid(x_r + h_r)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    # Under autocast the products are half precision; the state keeps its own dtype.
    return (n + z * (h - n)).to(h.dtype)


def _reset_before(
    x: Tensor,
    h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
) -> Tensor:
    size = 2 * h.shape[-1]
    x_rz, x_n = F.linear(x, weight_ih, bias_ih).split([size, h.shape[-1]], dim=-1)
    bias_rz, bias_n = (None, None) if bias_hh is None else (bias_hh[:size], bias_hh[size:])
    r, z = torch.sigmoid(x_rz + F.linear(h, weight_hh[:size], bias_rz)).chunk(2, dim=-1)
    n = torch.tanh(x_n + F.linear(r * h, weight_hh[size:], bias_n))
    return (n + z * (h - n)).to(h.dtype)


class GRUCell(GatedCell):
    """A GRU cell with torch.nn.GRUCell's formula and parameter names.

    r, z = sigmoid of the first two thirds of W_ih x + b_ih + W_hh h + b_hh;
    n = tanh(W_in x + b_in + r (W_hn h + b_hn));  h' = (1 - z) n + z h.
    This differs from Cho et al. (2014), where r multiplies h before the product, and where z and 1 - z are
    swapped.  reset_after=False: r multiplies h before the product, n = tanh(W_in x + b_in + W_hn (r h) + b_hn),
    as in TF1, in Keras with reset_after=False and in ONNX with linear_before_reset=0; the parameters are the
    same.

    One step takes x (B, input_size) and returns h (B, hidden_size).  State: `h` (B, hidden_size), zeros at
    first.
    A torch.nn.GRUCell's state_dict loads, and the other way round.
    Raises ValueError for a size below 1, TypeError for one that is no int.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
    ) -> None:
        super().__init__(3, input_size, hidden_size, bias, device=device, dtype=dtype)
        self.reset_after = reset_after
        self.h = State(hidden_size)

    def step(self, x: Tensor) -> Tensor:
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        h = gru_step(x, self.h.prev, *weights, self.reset_after)
        self.h.next = h
        return h

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.reset_after else f"{text}, reset_after=False"
