"""A diagonal state-space layer (Gu et al. 2022, arXiv:2206.11893; Orvieto et al. 2023, arXiv:2303.06349) as a step.

    python examples/state_space.py

h' = a h + B x with complex a inside the unit circle, y = Re(C h') + D x. All that must loop is one product and one sum
of each state with itself; both matrices leave the loop. Here two layers learn to say what they heard 10 steps ago.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steploop as sl


class StateSpace(sl.Step):
    """x (B, features) -> (B, features). `units` complex states, held as real and imaginary parts."""

    def __init__(self, features: int, units: int) -> None:
        super().__init__()
        radius, angle = torch.rand(units) * 0.1 + 0.9, torch.rand(units) * math.pi
        self.log_decay, self.angle = nn.Parameter(torch.log(-torch.log(radius))), nn.Parameter(angle)
        self.into = nn.Linear(features, 2 * units, bias=False)
        self.out, self.skip = nn.Linear(2 * units, features, bias=False), nn.Parameter(torch.ones(features))
        self.re, self.im = sl.State(units), sl.State(units)

    def step(self, x: Tensor) -> Tensor:
        radius = torch.exp(-self.log_decay.exp())  # always below 1
        cos, sin = radius * self.angle.cos(), radius * self.angle.sin()
        scale = torch.sqrt(1 - radius**2)  # so that states are as large as inputs
        into_re, into_im = self.into(x).chunk(2, -1)
        self.re.next = cos * self.re.prev - sin * self.im.prev + scale * into_re
        self.im.next = sin * self.re.prev + cos * self.im.prev + scale * into_im
        return self.out(torch.cat([self.re.next, self.im.next], -1)) + self.skip * x


class Model(sl.Step):
    """x (B, 1) -> (B, 1): two state-space layers, each with a gated unit after it."""

    def __init__(self, features: int = 16, units: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, features), nn.Linear(features, 1)
        self.layers = nn.ModuleList(StateSpace(features, units) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(features, 2 * features) for _ in range(2))

    def step(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer, gate in zip(self.layers, self.gates, strict=True):
            x = x + F.glu(gate(layer(x)), -1)
        return self.head(x)


def train(updates: int, steps: int = 80, rows: int = 16, delay: int = 10) -> list[float]:
    """The mean squared errors; 1 is what guessing gives."""
    model = Model()
    loop, optimizer, losses = sl.Loop(model), torch.optim.Adam(model.parameters(), 0.01), []
    for _ in range(updates):
        xs = torch.randn(steps, rows, 1)
        loss = F.mse_loss(loop(xs)[0][delay:], xs[:-delay])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def example() -> tuple[sl.Step, Tensor]:
    """What `steploop explain` runs: the step and its inputs."""
    return Model(), torch.randn(80, 16, 1)


if __name__ == "__main__":
    torch.manual_seed(0)
    losses = train(150)
    print(f"error {losses[0]:.3f} -> {losses[-1]:.5f}")
