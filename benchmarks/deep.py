"""Models of several recurrent layers, as a user stacks them: what their first call costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import steploop as sl

from .data import Data, Workload
from .peers import Runner, tensors_of, torch_runner


class BothWays(nn.Module):
    """Three bidirectional layer-norm LSTMs, one upon the other."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        half = hidden_size // 2
        sizes = (input_size, 2 * half, 2 * half)
        self.layers = nn.ModuleList(
            sl.nn.Bidirectional(sl.nn.LayerNormLSTMCell(n, half), sl.nn.LayerNormLSTMCell(n, half)) for n in sizes
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        states = None
        for layer in self.layers:
            x, states = layer(x)
        return x, states


def _four_layers(input_size: int, hidden_size: int) -> nn.Module:
    sizes = (input_size, hidden_size, hidden_size, hidden_size)
    return sl.Loop(sl.nn.Stack(*(sl.nn.LayerNormLSTMCell(n, hidden_size) for n in sizes)))


def _eight_layers(input_size: int, hidden_size: int) -> nn.Module:
    return sl.nn.GRU(input_size, hidden_size, num_layers=8)


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "4 layer-norm LSTMs": _four_layers, "3 bidirectional layer-norm LSTMs": BothWays, "8 GRUs": _eight_layers,
}  # fmt: skip


def make_runner(work: Workload, data: Data, mode: str) -> Runner:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = MODELS[work.kind](work.I, work.H)
    tensors = tensors_of(data)
    return torch_runner(lambda: model(tensors["x"])[0], dict(model.named_parameters()), tensors, mode)
