"""The lowering of `largest_places`: a call of kernels/largest.h for every row of numbers."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from . import geometry
from .language import Expr, Load, Routine, whole
from .lowering import Lowering, Unsupported, lowers

MOST = 64  # places: the routine keeps them in order, and moves all that a new one comes before


@lowers("largest_places")
def _largest_places(low: Lowering, node: fx.Node) -> Expr:
    values, count = low.args(node)[:2]
    source = node.args[0]
    assert isinstance(source, fx.Node)
    low.inner(source, len(values.shape) - 1)
    if not 0 < count <= MOST:
        raise Unsupported(f"{count} places of largest numbers: native loops have 1 to {MOST}")
    if not isinstance(values, Load) or values.at:
        values = low.copy(values)
    *lead, _ = values.shape
    rows = low.view(values, geometry.unsqueeze(len(lead)))
    assert isinstance(rows, Load)
    target = whole(low.temp((*lead, count), torch.int64, "places"))
    low.emit(Routine(target, "largest_places", (rows,), (count,)))
    return low.make.load(target)


def meaning(values: Tensor, count: int) -> Tensor:
    """What the routine gives for values (.., 1, N)."""
    return torch.ops.steploop.largest_places(values.squeeze(-2), count)
