"""A user's own file, as mypy --strict and pyright see it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import steploop as sl


class Cell(sl.Step):
    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.gates = nn.Linear(inputs + units, units)
        self.h = sl.State(units)

    def step(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.gates(torch.cat([x, self.h.prev], -1)))
        self.h.next = h
        return h


class Output(NamedTuple):
    y: Tensor
    weights: Tensor


class Decoder(sl.Step):
    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell(4, 8)
        self.again = sl.share(self.cell)
        self.context = sl.State(8, init=None)
        self.norm = sl.nn.Stack(sl.nn.GRUCell(8, 8), sl.nn.Dropout(0.1))

    def begin(self, memory: Tensor) -> None:
        self.context.prev = memory.mean(1)

    def step(self, x: Tensor, *, memory: Tensor) -> Output:
        h: Tensor = self.cell(x) + self.context.prev
        weights = torch.softmax(torch.einsum("bh,bsh->bs", h, memory), -1)
        self.context.next = torch.einsum("bs,bsh->bh", weights, memory)
        return Output(self.norm(h), weights)


xs, memory = torch.randn(5, 2, 4), torch.randn(2, 3, 8)
loop = sl.Loop(Cell(4, 8), batch_first=False)
outputs, state = loop(xs, lengths=torch.tensor([5, 3]))
size: int = outputs.shape[0]
last: Tensor = state["h"]
steps: Tensor | None = state.steps
more, state = loop(xs, state=state.detach())

decoder: sl.Loop[Output] = sl.Loop(Decoder())
found, _ = decoder(xs, memory=memory)
y: Tensor = found.y

stream = loop.stream(2)
one: Tensor = stream(xs[0])
stream.state = stream.state.detach()

plan = loop.plan(xs)
text: str = str(plan)
report: sl.Report = sl.verify(loop, xs)


def add(carry: tuple[Tensor, int], x: Tensor) -> tuple[tuple[Tensor, int], Tensor]:
    total, count = carry
    return (total + x, count + 1), total


carry, sums = sl.scan(add, (torch.zeros(2, 4), 0), xs)
total: Tensor = carry[0]
shape = sums.shape

both = sl.nn.Bidirectional(Cell(4, 8), Cell(4, 8))
left, _ = both(xs)
layers = sl.nn.Layers(both, nn.Linear(16, 3))
scores, states = layers(xs)
lstm = sl.nn.LSTM(4, 8)
h, (h_n, c_n) = lstm(xs)
