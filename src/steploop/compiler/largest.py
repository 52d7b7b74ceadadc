"""Where the largest numbers of a row are, of equal ones the first: one operator.

torch.topk leaves open which of equal numbers come. A stable sort does not, and sorts all of them to give a few.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops.rules import first_axis
from .ops.table import add


def largest_places(values: Tensor, count: int) -> Tensor:
    """(.., count) int64, where the largest of (.., N) are, in falling order. count <= N; NaN is the largest."""
    return torch.ops.steploop.largest_places(values.detach(), count)


def _places(values: Tensor, count: int) -> Tensor:
    if values.is_cpu and 0 < count < values.shape[-1]:
        top = torch.topk(values, count)
        if not bool((values >= top.values[..., -1:]).sum(-1).gt(count).any()) and not bool(top.values.isnan().any()):
            places = top.indices.sort(-1).values
            return places.gather(-1, values.gather(-1, places).sort(dim=-1, descending=True, stable=True).indices)
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count].contiguous()


def _shape(values: Tensor, count: int) -> Tensor:
    return values.new_empty((*values.shape[:-1], count), dtype=torch.int64)


def _over_an_axis(_: Any, in_dims: tuple[Any, ...], values: Tensor, count: int) -> tuple[Tensor, Any]:
    return torch.ops.steploop.largest_places(values.movedim(in_dims[0], 0), count), 0


_library = torch.library.Library("steploop", "FRAGMENT")
_library.define("largest_places(Tensor values, int count) -> Tensor")
_library.impl("largest_places", _places, "CompositeExplicitAutograd")
torch.library.register_fake("steploop::largest_places", _shape, lib=_library)
torch.library.register_vmap("steploop::largest_places", _over_an_axis, lib=_library)
add("largest_places", rows=first_axis())
