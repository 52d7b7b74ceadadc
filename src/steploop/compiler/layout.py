"""The flat list of tensors that an operator call takes, and what each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .lower import Needs


@dataclass(frozen=True)
class Layout:
    """How many tensors of each kind stand in the flat list of an operator call, in this order."""

    xs: int
    constants: int
    initial: int
    reset_to: int
    captured: int
    lengths: bool
    mask: bool
    resets: bool

    def split(self, tensors: Sequence[Any]) -> dict[str, Any]:
        """The tensors, or what stands for each, by their kinds."""
        found: dict[str, Any] = {}
        at = 0
        for name in ("xs", "constants", "initial", "reset_to", "captured"):
            size = getattr(self, name)
            found[name] = list(tensors[at : at + size])
            at += size
        for name in ("lengths", "mask", "resets"):
            found[name] = tensors[at] if getattr(self, name) else None
            at += getattr(self, name)
        return found


def split_needs(layout: Layout, needs: Sequence[bool]) -> Needs:
    parts = layout.split([*needs, False, False, False])
    parts["reset_to"] = parts["reset_to"] or [False] * layout.initial
    return Needs(*(tuple(parts[name]) for name in ("xs", "constants", "initial", "reset_to", "captured")))
