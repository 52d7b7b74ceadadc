"""What it costs to see that a kept capture still holds: of a call, and of a streamed step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch

import steploop as sl
from steploop.compiler import capture_store

from .data import Workload
from .measure import timed
from .models import make_model

ROUNDS = 15


def costs(work: Workload, calls: int) -> Iterator[tuple[str, list[float]]]:
    """("call" or "streamed step", seconds in each round)."""
    torch.manual_seed(0)
    loop = sl.Loop(make_model(work))
    yield "call", _of_a_call(loop, work, calls)
    with torch.no_grad():
        yield "streamed step", _of_a_streamed_step(loop, work, calls)


def _of_a_call(loop: sl.Loop, work: Workload, calls: int) -> list[float]:
    xs = torch.randn(2, work.B, work.I)
    loop(xs)
    prepared = loop.prepare(xs)
    return _rounds(lambda: capture_store.find(prepared.program, prepared.call), calls)


def _of_a_streamed_step(loop: sl.Loop, work: Workload, calls: int) -> list[float]:
    """A step by the short way, with nothing in the place of its kernel."""
    stream, x = loop.stream(work.B), torch.randn(work.B, work.I)
    for _ in range(3):
        stream(x)
    short, states = stream._fast, stream._values
    short._run.run = lambda *_: None
    return _rounds(lambda: short.take([x], states), calls)


def _rounds(run: Callable[[], object], calls: int, rounds: int = ROUNDS) -> list[float]:
    def several() -> None:
        for _ in range(calls):
            run()

    return [timed(several)[0] / calls for _ in range(rounds)]


def rows(work: Workload, calls: int) -> Iterator[dict[str, object]]:
    """Results as the report takes them."""
    common = {"action": "guards", "work": work.as_dict(), "mode": "forward"}
    for what, seconds in costs(work, calls):
        yield {**common, "peer": what, "times": seconds, "median": statistics.median(seconds)}
