"""Sizes, inputs and weights: NumPy arrays that every peer gets alike."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

GATES = {"lstm": 4, "stranger": 4, "lnlstm": 4, "decoder": 4, "gru": 3}
HEADS = 4
MATRIX = {"linear attention": ("S",), "delta rule": ("S",), "mLSTM": ("S", "n", "m"), "fast weights": ("S", "n")}
STATES = {"lstm": 2, "gru": 1, "stranger": 3, "lnlstm": 2, "decoder": 3}
# Searches of a decoder as a process's only work: how, and hypotheses of a row. Of the first two, first calls are timed.
SEARCHES = {"greedy search": ("greedy", 1), "beam search": ("beam", 8), "beam search of 1": ("beam", 1)}
FIRST_SEARCHES = ("greedy search", "beam search")
DEEP = ("4 layer-norm LSTMs", "3 bidirectional layer-norm LSTMs", "8 GRUs")  # see deep.py


@dataclass(frozen=True)
class Workload:
    """One problem: which step, and its sizes (T time, B batch, I input, H hidden, S memory, V vocabulary)."""

    kind: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    S: int = 0
    resets: bool = False
    ragged: bool = False
    V: int = 0

    def __str__(self) -> str:
        sizes = [f"B={self.B}", f"T={self.T}", f"I={self.I}", f"H={self.H}"]
        sizes += [f"S={self.S}"] if self.S else []
        sizes += [f"V={self.V}"] if self.V else []
        return " ".join(sizes)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def flops(self, mode: str) -> float:
        """Floating point operations of the matrix products with weights (2 per multiply-add)."""
        gates = GATES[self.kind] * self.H
        inputs, hidden = 2.0 * self.T * self.B * self.I * gates, 2.0 * self.T * self.B * self.H * gates
        inputs_times = {"forward": 1, "training": 2, "training_x": 3}[mode]
        return inputs_times * inputs + (1 if mode == "forward" else 3) * hidden


def state_shapes(kind: str, hidden: int) -> list[tuple[int, ...]]:
    """The states of a step, without the batch axis."""
    size = hidden // HEADS
    shapes = {"S": (HEADS, size, size), "n": (HEADS, size), "m": (HEADS,)}
    return [shapes[s] for s in MATRIX[kind]] if kind in MATRIX else [(hidden,)] * STATES[kind]


@dataclass
class Data:
    """A workload's arrays: x (T, B, I), the outputs' cotangent (T, B, H), and what else its step takes.

    Of a sequence-to-sequence model x is labels (T, B), source labels (S, B), and the cotangent one of losses (T, B).
    """

    x: np.ndarray
    cotangent: np.ndarray
    resets: np.ndarray | None = None
    lengths: np.ndarray | None = None
    memory: np.ndarray | None = None
    memory_mask: np.ndarray | None = None
    source: np.ndarray | None = None


def make_data(work: Workload, seed: int = 0) -> Data:
    """Random inputs. Resets: one step in 100. Lengths: uniform in 1..T, memory lengths in S/2..S."""
    random = np.random.default_rng(seed)
    normal = lambda *shape: random.standard_normal(shape, dtype=np.float32)
    if work.V:
        labels, source = (random.integers(work.V, size=(steps, work.B)) for steps in (work.T, work.S))
        return Data(labels, np.full((work.T, work.B), 1 / work.B, np.float32), source=source)
    data = Data(normal(work.T, work.B, work.I), normal(work.T, work.B, work.H))
    if work.resets:
        data.resets = random.random((work.T, work.B)) < 0.01
    if work.ragged:
        data.lengths = random.integers(1, work.T + 1, work.B)
    if work.S:
        data.memory = normal(work.B, work.S, work.H)
        words = random.integers((work.S + 1) // 2, work.S + 1, work.B)
        data.memory_mask = np.arange(work.S) < words[:, None]
    return data
