"""Peers of the streaming case: one step of an LSTM at a time, the state carried, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import steploop as sl

from .data import Workload, make_data
from .models import make_model
from .peers import PEERS, Blank, Runner, Steploop


def make_runner(name: str, work: Workload, calls: int) -> Runner:
    """A Runner that does `calls` steps, from zero states, and gives the last output."""
    if name not in STREAMS and not isinstance(PEERS.get(name), Steploop):
        raise Blank("has no streaming case here")
    make = STREAMS.get(name) or (lambda work, x: _steploop(work, x, PEERS[name].backend))
    xs = make_data(Workload("lstm", min(calls, 64), work.B, work.I, work.H)).x
    start = make(work, xs)

    def run() -> Any:
        with torch.no_grad():
            step, y = start(), None
            for index in range(calls):
                y = step(index % len(xs))
            return y

    return Runner(run, lambda y: {"y": np.asarray(y)}, calls=calls)


def _steploop(work: Workload, x: np.ndarray, backend: str) -> Callable[[], Callable[[int], Any]]:
    loop, xs = sl.Loop(make_model(work), backend=backend), list(torch.from_numpy(x))

    def start() -> Callable[[int], Any]:
        stream = loop.stream(work.B)

        return lambda index: stream(xs[index])

    return start


def _torch_cell(work: Workload, x: np.ndarray) -> Callable[[], Callable[[int], Any]]:
    cell, xs = nn.LSTMCell(work.I, work.H), list(torch.from_numpy(x))
    cell.load_state_dict(make_model(work).state_dict())

    def start() -> Callable[[int], Any]:
        state = (torch.zeros(work.B, work.H), torch.zeros(work.B, work.H))

        def step(index: int) -> Any:
            nonlocal state
            state = cell(xs[index], state)
            return state[0]

        return step

    return start


def _jax(work: Workload, x: np.ndarray) -> Callable[[], Callable[[int], Any]]:
    PEERS["jax"].check_installed()
    import jax

    from . import jax_models

    p = {k: jax.numpy.asarray(v.numpy()) for k, v in make_model(work).state_dict().items()}
    xs = [jax.numpy.asarray(row) for row in x]
    function = jax.jit(lambda p, x, s: jax_models.lstm(p, jax_models.lstm_project(p, x), s))

    def start() -> Callable[[int], Any]:
        state = (jax.numpy.zeros((work.B, work.H)), jax.numpy.zeros((work.B, work.H)))

        def step(index: int) -> Any:
            nonlocal state
            state, y = function(p, xs[index], state)
            return jax.block_until_ready(y)

        return step

    return start


STREAMS: dict[str, Callable[[Workload, np.ndarray], Any]] = {"torch.nn": _torch_cell, "jax": _jax}
