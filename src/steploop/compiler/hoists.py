"""What is done to a step graph once its loops are known, in order: each frees work from them, or gives them forms
that a native loop can take. Every entry takes the graph and the nodes that are in a loop, and says whether it
changed anything."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from .attention import expose_attention
from .draws import hoist_draws, hoist_masks
from .graph import StepGraph
from .repeats import repeat_late
from .simplify import distribute, gather_sums, split_products

HOISTS: list[Callable[[StepGraph, set[fx.Node]], bool]] = [
    expose_attention,
    repeat_late,
    hoist_masks,
    hoist_draws,
    split_products,
    distribute,
    gather_sums,
]
