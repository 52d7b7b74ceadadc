"""The passes in order, and the one analysis that they share: where the batch axis of every value is.

A pass edits a step graph in place. The analysis is run when somebody asks for it, and kept until the graph changes.
After every pass the graph can be printed (`stages`) and checked (`ir.check`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..forget import forget_shapes
from ..ir.graph import Analysis, StepGraph
from ..stages import stage
from .attention import expose_attention
from .draws import hoist_draws, hoist_masks
from .gradients import expose_fixed_statistics, free_of_buffers, split_backward_calls
from .identities import free_constants, remove_duplicates, remove_identities
from .products import distribute, expose_products, gather_sums, narrow_products, split_products
from .repeats import repeat_late
from .rows import annotate


@dataclass(frozen=True)
class Pass:
    """One change of a step graph.

    run(step), or run(step, nodes that are in a loop) for a pass that frees work from loops: whether it changed anything
        (None: it may have). Where it changed nothing the analysis still holds; otherwise it is forgotten.
    """

    run: Callable[..., bool | None]

    @property
    def name(self) -> str:
        return self.run.__name__

    def __call__(self, step: StepGraph, *in_loop: set[fx.Node]) -> None:
        if self.run(step, *in_loop) is not False:
            step.edited()
        stage(self.name, step)


# What makes the graph plain, once it is captured.
SIMPLIFY = tuple(
    map(
        Pass,
        (
            remove_identities, free_constants, remove_duplicates, expose_products, expose_fixed_statistics,
            free_of_buffers, split_backward_calls, remove_identities, remove_duplicates,
        ),
    )
)  # fmt: skip

# What frees work from loops, or gives it forms that a native loop can take, once it is known what loops.
HOIST = tuple(
    map(
        Pass,
        (
            expose_attention, repeat_late, hoist_masks, hoist_draws, split_products, narrow_products, distribute,
            gather_sums,
        ),
    )
)  # fmt: skip


def simplify(step: StepGraph) -> None:
    for one_pass in SIMPLIFY:
        one_pass(step)
    forget_shapes()


def hoist(step: StepGraph, loops: Callable[[], set[fx.Node]]) -> None:
    """loops: gives the nodes that are in a loop, for the graph as it is then."""
    for one_pass in HOIST:
        one_pass(step, loops())
    forget_shapes()


def find_mixing(step: StepGraph, per_step: Sequence[fx.Node] = ()) -> dict[fx.Node, str]:
    """Writes `rows` and `varies` on every node, unless they are there; gives the nodes that mix rows, with the reason.

    per_step: nodes of which the value of every step is wanted, not only a sum over the steps.
    """
    wanted = tuple(per_step)
    if step.known is None or step.known.per_step != wanted:
        step.known = Analysis(wanted, annotate(step, wanted))
    return dict(step.known.mixing)


def mixing_reasons(step: StepGraph) -> dict[fx.Node, str]:
    """The same for a step whose outputs and states are wanted; results without a batch axis mix rows as well."""
    results = [*step.outputs, *step.nexts]
    found = find_mixing(step, results)
    if step.batch is not None:
        for node in results:
            if node.meta["rows"] is None and node.meta["varies"] and node.op == "call_function":
                source: Any = node.args[0] if node.target is operator.getitem else node
                found.setdefault(source, "is a result without a batch axis")
    return found
