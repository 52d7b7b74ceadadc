"""Paired rounds: every way runs once a round, so that what else the machine does meets all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

LEAST, MOST = 3, 15


@dataclass
class Times:
    """seconds: of each way, round by round.  blank: why a way has no number."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    blank: dict[str, str] = field(default_factory=dict)

    def median(self, way: str) -> float:
        return statistics.median(self.seconds[way])

    def ratio(self, way: str, to: str) -> float | None:
        """The median over rounds of `way` / `to`; None where one has no number."""
        if way not in self.seconds or to not in self.seconds:
            return None
        return statistics.median(a / b for a, b in zip(self.seconds[way], self.seconds[to], strict=True))


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds until all that `run` started is done."""
    wait(device)
    begin = time.perf_counter()
    result = run()
    wait(device)
    taken = time.perf_counter() - begin
    del result
    return taken


def rounds(runs: dict[str, Callable[[], Any]], budget: float, device: str) -> dict[str, list[float]]:
    """As many rounds as fit into `budget` seconds, `LEAST` .. `MOST`; every other one backwards."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for index in range(MOST):
        for name in list(runs) if index % 2 == 0 else list(reversed(runs)):
            found[name].append(timed(runs[name], device))
        if index + 1 >= LEAST and time.perf_counter() - begin > budget:
            break
    return found
