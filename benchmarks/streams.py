"""Peers of the streaming cases: one step at a time, the state carried, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import steploop as sl

from .data import Data, Workload, make_data
from .models import make_model
from .peers import PEERS, Blank, Runner, Steploop


def make_runner(name: str, work: Workload, calls: int) -> Runner:
    """A Runner that does `calls` steps, from zero states, and gives the last output."""
    peers = ACTORS if work.kind == "actor" else STREAMS
    if name not in peers and not isinstance(PEERS.get(name), Steploop):
        raise Blank("has no streaming case here")
    data = make_data(Workload("lstm", min(calls, 64), work.B, work.I, work.H, resets=work.resets))
    if work.kind == "actor":
        start = ACTORS[name](work, data) if name in peers else _actor_stream(work, data, PEERS[name].backend)
    else:
        start = STREAMS[name](work, data.x) if name in peers else _steploop(work, data.x, PEERS[name].backend)

    def run() -> Any:
        with torch.no_grad():
            step, y = start(), None
            for index in range(calls):
                y = step(index % len(data.x))
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


class ActorCritic(sl.Step):
    """What a recurrent agent runs: a GRU with layer norm on both of its products, a policy's logits and a value."""

    def __init__(self, input_size: int, hidden_size: int, actions: int = 6):
        super().__init__()
        self.input_gates = nn.Linear(input_size, 3 * hidden_size)
        self.hidden_gates = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.input_norm, self.hidden_norm = nn.LayerNorm(3 * hidden_size), nn.LayerNorm(3 * hidden_size)
        self.policy, self.value = nn.Linear(hidden_size, actions), nn.Linear(hidden_size, 1)
        self.h = sl.State(hidden_size)

    def advance(self, x: Tensor, h: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(the next h, (logits, value))."""
        x_r, x_z, x_n = self.input_norm(self.input_gates(x)).chunk(3, -1)
        h_r, h_z, h_n = self.hidden_norm(self.hidden_gates(h)).chunk(3, -1)
        z = torch.sigmoid(x_z + h_z)
        h = (1 - z) * torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n) + z * h
        return h, (self.policy(h), self.value(h))

    def step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.h.next, heads = self.advance(x, self.h.prev)
        return heads


def _actor(work: Workload, data: Data) -> tuple[ActorCritic, list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    made = ActorCritic(work.I, work.H)
    return made, list(torch.from_numpy(data.x)), list(torch.from_numpy(data.resets))


def _actor_stream(work: Workload, data: Data, backend: str) -> Callable[[], Callable[[int], Any]]:
    actor, xs, resets = _actor(work, data)
    loop = sl.Loop(actor, backend=backend)

    def start() -> Callable[[int], Any]:
        stream = loop.stream(work.B)
        return lambda index: stream(xs[index], resets=resets[index])[0]

    return start


def _actor_by_hand(work: Workload, data: Data) -> Callable[[], Callable[[int], Any]]:
    actor, xs, resets = _actor(work, data)

    def start() -> Callable[[int], Any]:
        h = torch.zeros(work.B, work.H)

        def step(index: int) -> Any:
            nonlocal h
            h, heads = actor.advance(xs[index], torch.where(resets[index][:, None], 0.0, h))
            return heads[0]

        return step

    return start


ACTORS: dict[str, Callable[[Workload, Data], Any]] = {"eager": _actor_by_hand}
STREAMS: dict[str, Callable[[Workload, np.ndarray], Any]] = {"torch.nn": _torch_cell, "jax": _jax}
