"""From a LoopProgram (ATen calls on batches) to the loop language (one row).

Rows are independent, so the row's program is the graph with the batch size set to 1. Every ATen operation is one row of
a table (`lowering.py`, filled by the files ops_*.py): a function of (lowering, node) that gives an expression, or
several. Operations without a row are lowered by torch's own decomposition.
"""

from __future__ import annotations

import torch
from torch import fx

from ...compiler.ir.graph import LoopProgram, line_of
from . import (  # noqa: F401  (fill the table)
    ops_index,
    ops_largest,
    ops_linalg,
    ops_pointwise,
    ops_products,
    ops_reduce,
    ops_views,
)
from .decompose import decomposed
from .halves import has_halves, in_single, reasons_against
from .language import RowProgram
from .lowering import Lowering


def lower(
    loop: LoopProgram, device: str = "cpu", halves: bool = False
) -> tuple[RowProgram | None, list[tuple[str, str]]]:
    """The row program of a loop whose tensors are on such a device, or the reasons why there is none.

    halves: whether the backend's kernels read and write half precision (`halves.py`).
    """
    rounded: dict[fx.Node, torch.dtype] = {}
    if halves and has_halves(loop):
        against = reasons_against(loop)
        if against:
            return None, against
        loop, rounded = in_single(loop)
    lowering = Lowering(loop, decomposed, device, rounded)
    if loop.mixes_rows:
        return None, [("the step mixes rows of the batch", "")]
    for node in (*(i.node for i in loop.inputs), *loop.kept):
        rows = node.meta["rows"]
        # (in front, the numbers of a row stand together, and how many they are its shape says)
        if rows is not None and not isinstance(rows.inner, int) and (rows.dim, rows.outer) != (0, 1):
            return None, [("the batch is one axis with another whose size only a call knows", line_of(node))]
    program = lowering.run()
    return (None, lowering.reasons) if lowering.reasons else (program, [])


__all__ = ["lower"]
