"""A Kalman filter as a step: it tracks a moving point, and learns how noisy the world is by maximum likelihood.

    python examples/kalman.py

The state is position and velocity, with a covariance (2, 2). Some measurements are missing. Time goes on without them,
so they are an input of the step: `mask=` would take the whole step out, prediction included.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import steploop as sl


class Kalman(sl.Step):
    """z (B,), seen (B,) bool -> (position (B,), its variance (B,), log-likelihood of z (B,), 0 where it was not seen).

    x' = A x + noise of covariance q G, z = x[0] + noise of variance r (Kalman 1960), A a step of constant velocity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_q, self.log_r = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))
        self.register_buffer("A", torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
        self.register_buffer("G", torch.tensor([[0.25, 0.5], [0.5, 1.0]]))
        self.mean, self.covariance = sl.State(2), sl.State(2, 2, init=10.0 * torch.eye(2))

    def step(self, z: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = self.mean.prev @ self.A.t()
        covariance = self.A @ self.covariance.prev @ self.A.t() + self.log_q.exp() * self.G
        expected = covariance[:, 0, 0] + self.log_r.exp()  # the variance of the measurement
        surprise = torch.where(seen, z - mean[:, 0], 0.0)
        gain = torch.where(seen[:, None], covariance[:, :, 0] / expected[:, None], 0.0)
        mean = mean + gain * surprise[:, None]
        covariance = covariance - gain[:, :, None] * covariance[:, None, 0, :]
        self.mean.next, self.covariance.next = mean, covariance
        likelihood = -0.5 * (surprise**2 / expected + expected.log() + math.log(2 * math.pi))
        return mean[:, 0], covariance[:, 0, 0], torch.where(seen, likelihood, 0.0)


def world(steps: int, rows: int, q: float, r: float) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, measurements, and which were seen: (steps, rows) each; one in five is missing."""
    push = q**0.5 * torch.randn(steps, rows)
    velocity = push.cumsum(0)
    position = (velocity - push / 2).cumsum(0)
    measured = position + r**0.5 * torch.randn(steps, rows)
    return position, measured, torch.rand(steps, rows) > 0.2


def train(updates: int, q: float = 0.05, r: float = 2.0, steps: int = 60, rows: int = 24) -> tuple[Kalman, list[float]]:
    """The filter, and the negative log-likelihood per measurement at each update."""
    step = Kalman()
    loop, optimizer, losses = sl.Loop(step), torch.optim.Adam(step.parameters(), 0.1), []
    _, measured, seen = world(steps, rows, q, r)
    for _ in range(updates):
        (_, _, likelihood), _ = loop(measured, seen)
        loss = -likelihood.sum() / seen.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return step, losses


def example() -> tuple[sl.Step, tuple[Tensor, Tensor]]:
    """What `steploop explain` runs: the step and its inputs."""
    _, measured, seen = world(60, 24, 0.05, 2.0)
    return Kalman(), (measured, seen)


if __name__ == "__main__":
    torch.manual_seed(0)
    step, losses = train(80)
    print(f"negative log-likelihood {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"q {step.log_q.exp():.3f} (the world's: 0.05), r {step.log_r.exp():.2f} (the world's: 2.00)")
    position, measured, seen = world(60, 24, 0.05, 2.0)
    with torch.no_grad():
        (found, variance, _), _ = sl.Loop(step)(measured, seen)
    print(f"error of a measurement {(measured - position)[seen].std():.2f}")
    print(f"error of the filter {(found - position).std():.2f}, and it says {variance[20:].mean().sqrt():.2f}")
