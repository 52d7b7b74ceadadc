"""RNN, LSTM and GRU: torch.nn's layers, run by steploop.

Each class is a subclass of torch.nn's: constructor, parameters, initial values, state_dict, attributes and
repr are torch's own, and `isinstance(layer, torch.nn.LSTM)` holds. Only `forward` is replaced. It reads the
weights once per call, as torch does, and hands them to a loop as constants: the loop's step owns no
parameters, so that replaced weights, parametrizations, functional_call, copies and pickles need no care here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import nn as torch_nn

from ..state import State
from ..step import Step
from .gru import gru_step
from .lstm import lstm_step
from .rnn import rnn_step
from .torch_layer import TorchLayer


class _RNNLayer(Step):
    def __init__(self, layer: RNN):
        super().__init__()
        self.nonlinearity = layer.nonlinearity
        self.h = State(layer.hidden_size)

    def step(self, x: Tensor, **weights: Tensor) -> Tensor:
        self.h.next = h = rnn_step(x, self.h.prev, nonlinearity=self.nonlinearity, **weights)
        return h


class _GRULayer(Step):
    def __init__(self, layer: GRU):
        super().__init__()
        self.h = State(layer.hidden_size)

    def step(self, x: Tensor, **weights: Any) -> Tensor:
        self.h.next = h = gru_step(x, self.h.prev, **weights)
        return h


class _LSTMLayer(Step):
    def __init__(self, layer: LSTM):
        super().__init__()
        self.h = State(layer.proj_size or layer.hidden_size)
        self.c = State(layer.hidden_size)

    def step(self, x: Tensor, **weights: Tensor) -> Tensor:
        h, c = lstm_step(x, self.h.prev, self.c.prev, **weights)
        self.h.next = h
        self.c.next = c
        return h


class RNN(TorchLayer, torch_nn.RNN):  # type: ignore[misc]  # `forward` takes and gives more
    """torch.nn.RNN, run by sl.Loop: same arguments, parameters, inputs and outputs; see `forward` for what is
    added.

    backend, save: as for sl.Loop.  Deviations from torch: T and lengths may be 0; errors are InputError and
    StateError (both ValueError); dropout draws other random numbers; under autocast outputs and states have
    the weights' dtype.
    """

    _make_step = _RNNLayer

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        save: str = "auto",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            nonlinearity,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            backend=backend,
            save=save,
        )


class LSTM(TorchLayer, torch_nn.LSTM):  # type: ignore[misc]  # `forward` takes and gives more
    """torch.nn.LSTM, run by sl.Loop: same arguments, parameters, inputs and outputs; see `forward` for what
    is added.

    backend, save: as for sl.Loop.  Deviations from torch: T and lengths may be 0; errors are InputError and
    StateError (both ValueError); dropout draws other random numbers; under autocast outputs and states have
    the weights' dtype.
    """

    _make_step = _LSTMLayer
    _states = ("h", "c")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        save: str = "auto",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
            backend=backend,
            save=save,
        )


class GRU(TorchLayer, torch_nn.GRU):  # type: ignore[misc]  # `forward` takes and gives more
    """torch.nn.GRU, run by sl.Loop: same arguments, parameters, inputs and outputs; see `forward` for what is
    added.

    backend, save: as for sl.Loop.  Deviations from torch: T and lengths may be 0; errors are InputError and
    StateError (both ValueError); dropout draws other random numbers; under autocast outputs and states have
    the weights' dtype.
    """

    _make_step = _GRULayer

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        save: str = "auto",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            backend=backend,
            save=save,
        )
