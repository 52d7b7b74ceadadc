"""Peers of the case `kalman`: the log-likelihood of a Kalman filter in float64, and its gradients.

H is the state's numbers, I the measurement's. The loop by hand is the same step function, called in a Python loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import steploop as sl

from .data import Workload
from .peers import PEERS, Blank, Runner, Steploop

Carry = tuple[Tensor, Tensor]


class Filter(nn.Module):
    """x' = A x + noise of covariance Q, z = C x + noise of covariance R (Kalman 1960)."""

    def __init__(self, size: int, measured: int) -> None:
        super().__init__()
        self.A = nn.Parameter(0.9 * torch.eye(size) + 0.05 * torch.randn(size, size))
        self.C = nn.Parameter(torch.randn(measured, size))
        self.log_q, self.log_r = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(measured))

    def forward(self, carry: Carry, z: Tensor) -> tuple[Carry, Tensor]:
        """carry: mean (.., n), covariance (.., n, n); z (.., m) -> log-likelihood of z (..)."""
        mean = carry[0] @ self.A.T
        covariance = self.A @ carry[1] @ self.A.T + torch.diag(self.log_q.exp())
        surprise = z - mean @ self.C.T
        S = self.C @ covariance @ self.C.T + torch.diag(self.log_r.exp())
        gain = torch.linalg.solve(S, self.C @ covariance).transpose(-1, -2)
        explained = torch.linalg.solve(S, surprise.unsqueeze(-1)).squeeze(-1)
        likelihood = -0.5 * ((surprise * explained).sum(-1) + torch.logdet(S) + z.shape[-1] * math.log(2 * math.pi))
        mean = mean + (gain @ surprise.unsqueeze(-1)).squeeze(-1)
        return (mean, covariance - gain @ self.C @ covariance), likelihood


def make_runner(name: str, work: Workload, mode: str) -> Runner:
    """One row has no batch axis: a person who has one signal writes it so."""
    ours = isinstance(PEERS.get(name), Steploop)
    if not ours and name != "eager":
        raise Blank("not written for this model")
    torch.manual_seed(0)
    step = Filter(work.H, work.I).double()
    rows = (work.B,) if work.B > 1 else ()
    z = torch.randn(work.T, *rows, work.I, dtype=torch.float64)
    start = torch.zeros(*rows, work.H).double(), torch.eye(work.H).double().expand(*rows, work.H, work.H)

    def likelihoods() -> Tensor:
        if ours:
            return sl.scan(step, start, z, backend=PEERS[name].backend)[1]
        carry, found = start, []
        for value in z:
            carry, likelihood = step(carry, value)
            found.append(likelihood)
        return torch.stack(found)

    return _runner(likelihoods, dict(step.named_parameters()), mode)


def _runner(likelihoods: Callable[[], Tensor], parameters: dict[str, Tensor], mode: str) -> Runner:
    def run() -> Any:
        if mode == "forward":
            with torch.no_grad():
                return likelihoods(), ()
        found = likelihoods()
        return found.detach(), torch.autograd.grad(found.sum(), list(parameters.values()))

    def arrays(result: Any) -> Any:
        found, gradients = result
        return {"y": found.numpy(), **{f"grad {n}": g.numpy() for n, g in zip(parameters, gradients, strict=False)}}

    return Runner(run, arrays)
