"""Has anything changed that a step read? The quick answer, for single steps that take some microseconds themselves.

torch counts the changes of every dictionary and compares the metadata of many tensors in one call (for its own
guards). Where it does, an unchanged count stands for the comparison of all entries; a changed one leads to it.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

try:
    from torch._C._dynamo.guards import TensorGuards, dict_version
except ImportError:  # not a public interface: without it, every entry is compared
    dict_version = None

_contents = attrgetter("cell_contents")
_MISSING = object()


class Watched:
    """A dictionary: the entries that must stay, the ids of all keys and values, its length (None: any)."""

    def __init__(self, where: dict):
        self.where = where
        self.entries: list[tuple[Any, Any]] = []
        self.ids: list[int] | None = None
        self.length: int | None = None

    def unchanged(self) -> bool:
        where = self.where
        if self.ids is not None and [*map(id, where), *map(id, where.values())] != self.ids:
            return False
        if self.length is not None and len(where) != self.length:
            return False
        return all(where.get(key, _MISSING) is value for key, value in self.entries)


class Watch:
    """same(): no watched dictionary, class, cell or tensor's metadata differs from when this was made."""

    def __init__(self, watched: Sequence[Watched], cells: Sequence[Any], tensors: Sequence[Tensor]):
        self.watched = list(watched)
        self._dicts = [w.where for w in watched]
        self._versions = [*map(dict_version, self._dicts)]
        self._cells = list(cells)
        self._contents = [*map(id, map(_contents, cells))]
        self._tensors = list(tensors)
        guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None) if tensors else None
        self._check = guards.check if guards is not None else None

    def same(self) -> bool:
        versions = [*map(dict_version, self._dicts)]
        if versions != self._versions:
            for watched, now, before in zip(self.watched, versions, self._versions):
                if now != before and not watched.unchanged():
                    return False
            self._versions = versions
        if self._cells:
            try:
                if [*map(id, map(_contents, self._cells))] != self._contents:
                    return False
            except ValueError:  # a variable was deleted
                return False
        return self._check is None or self._check(*self._tensors)


def class_dictionary(cls: type) -> dict | None:
    """The dictionary behind vars(cls), which counts its changes."""
    found = [d for d in gc.get_referents(vars(cls)) if type(d) is dict]
    return found[0] if len(found) == 1 else None


def make_watch(
    watched: Sequence[Watched], classes: Sequence[tuple[type, str, Any]], cells: Sequence[tuple[Any, Any]],
    tensors: Sequence[Tensor],
) -> Watch | None:
    """A Watch over all this, which must be unchanged now; None where torch offers no counts, or for odd objects."""
    if dict_version is None or any(type(t) not in (Tensor, nn.Parameter) for t in tensors):
        return None
    by_id = {id(w.where): w for w in watched}
    for cls, name, value in classes:
        where = class_dictionary(cls)
        if where is None:
            return None
        by_id.setdefault(id(where), Watched(where)).entries.append((name, value))
    try:
        return Watch(list(by_id.values()), [cell for cell, _ in cells], tensors)
    except (TypeError, ValueError, RuntimeError):
        return None
