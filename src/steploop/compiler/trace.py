"""What a trace is given, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor

from .free_numbers import FreeNumber
from .ir.graph import StepGraph
from .recorder import Recorder
from .walk import Number

BATCH_HINT = 1031  # a prime that no feature size is likely to have


@dataclass(frozen=True)
class Leaf:
    """What is known of an input before it is captured. shape: of one step, the batch included."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    batched: bool

    @staticmethod
    def of(tensor: Tensor, batched: bool, per_step: bool = False) -> Leaf:
        shape = tuple(int(s) for s in (tensor.shape[1:] if per_step else tensor.shape))
        return Leaf(shape, tensor.dtype, tensor.device, batched)


@dataclass(eq=False)
class Signature:
    """The leaves that a capture is made for, and which of their axes besides the batch are symbols.

    dynamic: (kind, index, dim) of axes that were seen with several sizes; kind "x", "constant" or "state".
    batch: the B of the call, used where a symbolic batch is impossible; None: no batch axis is known.
    batch_hint: what a symbolic batch answers where it is compared with a number.
    """

    xs: list[Leaf]
    constants: list[Leaf]
    states: list[Leaf]
    batch: int | None
    dynamic: frozenset[tuple[str, int, int]] = frozenset()
    batch_hint: int = BATCH_HINT


@dataclass(eq=False)
class Trace:
    """A captured graph, the real tensors it met (in the order of `graph.captured`), and its conditions on sizes.

    tensors: the real tensors, then what the tensors of free Python floats are made of.
    holds_for: whether the conditions hold for sizes by the names of symbols, and for floats by their paths.
    numbers: the calls that were traced, each with the floats in it, before anything was simplified.
    batched: the graph in the form for all steps at once, once it was asked for.
    conditions: those of the conditions that are on sizes alone.
    fixes: whether a number that was made of the batch size is fixed in the graph.
    detached: see `RealTensors`.
    """

    graph: StepGraph
    tensors: list[Tensor | FreeNumber]
    holds_for: Callable[..., bool]
    out_spec: Any
    numbers: list[tuple[Any, list[float]]] = field(default_factory=list)
    keep_alive: list[Any] = field(default_factory=list)
    inlined: list[str] = field(default_factory=list)
    batched: StepGraph | None = None
    conditions: list[sympy.Expr] = field(default_factory=list)
    fixes: bool = False
    detached: tuple[str, ...] = ()

    @cached_property
    def symbols(self) -> list[tuple[str, str, int, int]]:
        """(name, kind of input, index, dim) of every symbol: printing a symbol takes its time."""
        return [(str(symbol), *place) for symbol, place in self.graph.symbols.items()]


@dataclass(frozen=True)
class Observed:
    """What a trace is to note beside the graph, and which Python floats are to be inputs of it."""

    recorder: Recorder = field(default_factory=Recorder)
    free: Sequence[Number] = ()


@dataclass(frozen=True)
class Wanted:
    """What a joint trace is to add to a forward one: gradients of these tensors, given cotangents like its results."""

    tensors: list[Tensor]
    forward: StepGraph
