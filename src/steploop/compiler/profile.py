"""What the pieces of a call take: the call itself, run a few times with a clock in what runs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .execute import Executable
from .plan import ONCE, Plan, Profile, piece_names
from .program import Result

_LEAST, _MOST = 3, 30  # runs
_SECONDS = 0.5  # after which no further run is begun


class Clock:
    """Seconds per part of a partition, added up over the spans of a run."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[Any, float] = {}

    def time(self, part: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        begin = self.now()
        try:
            return function(*arguments)
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + self.now() - begin

    def now(self) -> float:
        """Seconds, when the device has done all that it was asked for."""
        module: Any = getattr(torch, self.device.type, None)
        if self.device.type != "cpu" and hasattr(module, "synchronize"):
            module.synchronize()
        return time.perf_counter()


def timed(plan: Plan, executables: Sequence[Executable], tensors: list[Tensor], run: Callable[[], Result]) -> None:
    """Fills in the profiles of a plan. executables: forward, and backward where there is one.

    tensors: what the call reads; those that require a gradient get one.
    """
    wanted = [t for t in tensors if t.requires_grad] if len(executables) > 1 else []
    device = next((t.device for t in tensors), torch.device("cpu"))
    names = [{None: ONCE, **piece_names(e.partition)} for e in executables]
    _pass(executables, wanted, run, device)  # a first call makes what later ones have
    runs: list[list[tuple[float, dict[str, float]]]] = []
    end = time.perf_counter() + _SECONDS
    while len(runs) < _LEAST or (time.perf_counter() < end and len(runs) < _MOST):
        found = _pass(executables, wanted, run, device)
        runs.append([(s, {n[p]: t for p, t in parts.items()}) for (s, parts), n in zip(found, names)])
    for one, passes in zip(cast("list[Plan]", [plan, plan.backward]), zip(*runs)):
        # One run as a whole, so that its parts add up.
        seconds, pieces = sorted(passes, key=lambda found: found[0])[len(passes) // 2]
        one.profile = Profile(len(runs), seconds, _without_nothing(one, pieces))


def _without_nothing(plan: Plan, pieces: dict[str, float]) -> dict[str, float]:
    """Without the time of a piece that holds no call."""
    return pieces if any(op.piece == ONCE for op in plan.before) else {p: s for p, s in pieces.items() if p != ONCE}


def _pass(
    executables: Sequence[Executable], wanted: list[Tensor], run: Callable[[], Result], device: torch.device
) -> list[tuple[float, dict[Any, float]]]:
    """(seconds, seconds of each part) of one forward pass, and of the backward pass after it."""
    clocks = [Clock(device) for _ in executables]
    for executable, clock in zip(executables, clocks):
        executable.clock = clock
    try:
        with torch.enable_grad():  # as plans are made; without anything that requires one, no gradient is prepared
            begin = clocks[0].now()
            result = run()
            seconds = [clocks[0].now() - begin]
            results = [r for r in (*result.outputs, *result.states) if r.requires_grad]
            if wanted and results:
                ones = [torch.ones_like(r) for r in results]
                begin = clocks[0].now()
                torch.autograd.grad(results, wanted, ones, allow_unused=True)
                seconds.append(clocks[0].now() - begin)
    finally:
        for executable in executables:
            executable.clock = None
    return list(zip(seconds, (clock.seconds for clock in clocks)))
