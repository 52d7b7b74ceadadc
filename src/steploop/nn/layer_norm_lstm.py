"""The LSTM with layer normalisation (Ba, Kiros & Hinton 2016, arXiv:1607.06450)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..state import State
from ..step import Step
from ._gated import check_sizes

LAYER_NORMS = ("gates", "all")


class LayerNormLSTMCell(Step):
    """An LSTM cell whose sums are normalised over the features of each row (Ba et al. 2016).

    LN(a) = (a - mean(a)) / sqrt(var(a) + eps) * weight + bias, over the last axis, with the biased variance.

    layer_norm="all", equations 20-22 of the paper:
        i, f, g, o = split(LN_ih(W_ih x) + LN_hh(W_hh h) + b)      each LN over all 4 * hidden_size sums
        c' = sigmoid(f) c + sigmoid(i) tanh(g)
        h' = sigmoid(o) tanh(LN_c(c'))                            the state is c', not LN_c(c')
      Parameters: norm_ih, norm_hh (4 * hidden_size), norm_c (hidden_size), `bias` b (4 * hidden_size,).
    layer_norm="gates", the form of TensorFlow's LayerNormBasicLSTMCell, without its norm on c:
        a_i, a_f, a_g, a_o = split(W_ih x + W_hh h)
        i, f, g, o = LN_i(a_i), LN_f(a_f), LN_g(a_g), LN_o(a_o)   one LN for each gate's hidden_size sums
        c' = sigmoid(f) c + sigmoid(i) tanh(g);   h' = sigmoid(o) tanh(c')
      Parameters: norm_i, norm_f, norm_g, norm_o (hidden_size each), whose biases are the gates' biases.

    Deviations from the paper: the gates stand in torch.nn.LSTMCell's order i, f, g, o (paper: f, i, o, g);
    `weight_ih` and `weight_hh` have its names, shapes and initial values.  Gains start at 1, biases at 0.

    One step takes x (B, input_size) and returns h.  States: `h` and `c`, (B, hidden_size), zeros at first.
    eps: added to the variance.  Raises ValueError for an unknown layer_norm or a size below 1.
    """

    norm_i: nn.Module
    norm_f: nn.Module
    norm_g: nn.Module
    norm_o: nn.Module
    norm_ih: nn.Module
    norm_hh: nn.Module
    norm_c: nn.Module

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        layer_norm: str = "gates",
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("LayerNormLSTMCell", input_size, hidden_size)
        if layer_norm not in LAYER_NORMS:
            raise ValueError(f'LayerNormLSTMCell: layer_norm must be "gates" or "all", got {layer_norm!r}')
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.layer_norm = layer_norm
        self.eps = eps
        factory = {"device": device, "dtype": dtype}
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size, **factory))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size, **factory))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size, **factory)) if layer_norm == "all" else None
        for name, size in self._norm_sizes().items():
            self.add_module(name, nn.LayerNorm(size, eps=eps, **factory))
        self.h = State(hidden_size)
        self.c = State(hidden_size)
        self.reset_parameters()

    def _norm_sizes(self) -> dict[str, int]:
        hidden = self.hidden_size
        if self.layer_norm == "all":
            return {"norm_ih": 4 * hidden, "norm_hh": 4 * hidden, "norm_c": hidden}
        return {"norm_i": hidden, "norm_f": hidden, "norm_g": hidden, "norm_o": hidden}

    def reset_parameters(self) -> None:
        """Weights uniform in +-1/sqrt(hidden_size), gains 1, biases 0."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        nn.init.uniform_(self.weight_ih, -bound, bound)
        nn.init.uniform_(self.weight_hh, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        for name in self._norm_sizes():
            getattr(self, name).reset_parameters()

    def step(self, x: Tensor) -> Tensor:
        h, c = self.h.prev, self.c.prev
        i, f, g, o = self._gates(F.linear(x, self.weight_ih), F.linear(h, self.weight_hh))
        c_new = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        seen = self.norm_c(c_new) if self.layer_norm == "all" else c_new
        h_new = torch.sigmoid(o) * torch.tanh(seen)
        # Under autocast the products are half precision; the states keep their own dtype.
        h_new, c_new = h_new.to(h.dtype), c_new.to(c.dtype)
        self.h.next = h_new
        self.c.next = c_new
        return h_new

    def _gates(self, from_x: Tensor, from_h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.layer_norm == "all":
            return (self.norm_ih(from_x) + self.norm_hh(from_h) + self.bias).chunk(4, dim=-1)
        i, f, g, o = (from_x + from_h).chunk(4, dim=-1)
        return self.norm_i(i), self.norm_f(f), self.norm_g(g), self.norm_o(o)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, layer_norm={self.layer_norm!r}, eps={self.eps}"
