"""A network of spiking neurons that learns in which order two inputs fire.

    python examples/spiking.py

Leaky integrate-and-fire neurons that are reset by subtraction; the gradient of a spike is that of an arctangent
(Fang et al. 2021, arXiv:2007.05785). The hidden layer hears its own spikes of the step before.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steploop as sl


class Spike(torch.autograd.Function):
    """1 where x > 0; backwards 1 / (1 + (pi x)^2)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / (1 + (math.pi * x) ** 2)


class Leaky(sl.Step):
    """current (B, units) -> spikes (B, units)."""

    def __init__(self, units: int, decay: float = 0.9, threshold: float = 1.0) -> None:
        super().__init__()
        self.decay, self.threshold = decay, threshold
        self.potential = sl.State(units)

    def step(self, current: Tensor) -> Tensor:
        potential = self.decay * self.potential.prev + current
        spikes = Spike.apply(potential - self.threshold)
        self.potential.next = potential - spikes.detach() * self.threshold
        return spikes


class Net(sl.Step):
    """x (B, 2) -> the potential of each class (B, 2)."""

    def __init__(self, units: int = 24) -> None:
        super().__init__()
        self.into, self.back, self.out = nn.Linear(2, units), nn.Linear(units, units), nn.Linear(units, 2)
        self.neurons, self.fired, self.readout = Leaky(units), sl.State(units), sl.State(2)
        nn.init.uniform_(self.into.weight, 0.0, 2.0)

    def step(self, x: Tensor) -> Tensor:
        self.fired.next = self.neurons(self.into(x) + self.back(self.fired.prev))
        self.readout.next = 0.95 * self.readout.prev + self.out(self.fired.next)
        return self.readout.next


def batch(rows: int, steps: int = 20) -> tuple[Tensor, Tensor]:
    """Input spikes (steps, rows, 2), and the class (rows,): which input fires first."""
    first = torch.randint(2, (rows,))
    early, late = torch.randint(0, steps // 2, (rows,)), torch.randint(steps // 2, steps - 2, (rows,))
    xs, every = torch.zeros(steps, rows, 2), torch.arange(rows)
    for t in range(2):  # each fires twice
        xs[early + t, every, first] = 1.0
        xs[late + t, every, 1 - first] = 1.0
    return xs, first


def train(updates: int, rows: int = 32) -> tuple[list[float], float]:
    """The losses, and the share of right answers on new data."""
    net = Net()
    loop, optimizer, losses = sl.Loop(net), torch.optim.Adam(net.parameters(), 0.01), []
    for _ in range(updates):
        xs, label = batch(rows)
        loss = F.cross_entropy(loop(xs)[0][-1], label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        xs, label = batch(200)
        return losses, (loop(xs)[0][-1].argmax(-1) == label).float().mean().item()


def example() -> tuple[sl.Step, Tensor]:
    """What `steploop explain` runs: the step and its inputs."""
    return Net(), batch(32)[0]


if __name__ == "__main__":
    torch.manual_seed(0)
    losses, right = train(100)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, right answers {right:.0%}")
