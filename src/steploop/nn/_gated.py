"""What RNNCell, LSTMCell and GRUCell share: torch.nn's parameter names, shapes and initial values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..step import Step


class GatedCell(Step):
    """The parameters of a torch.nn cell; subclasses add the states and the step.

    weight_ih: (gates * hidden_size, input_size).  weight_hh: (gates * hidden_size, proj_size or hidden_size).
    bias_ih, bias_hh: (gates * hidden_size,), None without bias.  With proj_size: weight_hr (proj_size,
    hidden_size).
    All start uniform in +-1/sqrt(hidden_size), drawn in torch.nn's order: the same seed gives the same cell.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None

    def __init__(
        self,
        gates: int,
        input_size: int,
        hidden_size: int,
        bias: bool,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(type(self).__name__, input_size, hidden_size, proj_size)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        shapes = {
            "weight_ih": (gates * hidden_size, input_size),
            "weight_hh": (gates * hidden_size, proj_size or hidden_size),
            "bias_ih": (gates * hidden_size,) if bias else None,
            "bias_hh": (gates * hidden_size,) if bias else None,
        }
        if proj_size:
            shapes["weight_hr"] = (proj_size, hidden_size)
        for name, shape in shapes.items():
            value = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew: uniform in +-1/sqrt(hidden_size), as torch.nn does."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        if not self.bias:
            text += f", bias={self.bias}"
        return text


def check_sizes(who: str, input_size: int, hidden_size: int, proj_size: int = 0) -> None:
    """The checks of torch.nn's constructors, with its exception types."""
    for name, size in {"input_size": input_size, "hidden_size": hidden_size}.items():
        if not isinstance(size, int):
            raise TypeError(f"{who}: {name} must be an int, got {type(size).__name__}")
        if size <= 0:
            raise ValueError(f"{who}: {name} must be greater than zero, got {size}")
    if not 0 <= proj_size < hidden_size:
        raise ValueError(f"{who}: proj_size must be in [0, hidden_size={hidden_size}), got {proj_size}; 0 means none")
