"""Has anything changed that a walk of `dependencies.py` met? The quick answer, asked at every call.

Every value is compared by identity: a number that was replaced by an equal one leads to a new walk, which finds the
same key. torch counts the changes of every dictionary and compares the metadata of many tensors in one call (for its
own guards). Where it does, an unchanged count stands for the comparison of all entries; a changed one leads to it.
With native code, these counts and most identities are words of memory that one function compares (`words.py`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from . import words
from .words import Table, address_of

if TYPE_CHECKING:
    from .patches import Patches

dict_version: Any
try:
    from torch._C._dynamo.guards import TensorGuards, dict_version
except ImportError:  # not a public interface: without it, every entry is compared
    dict_version = None

MISSING = object()
_contents = attrgetter("cell_contents")
_code, _defaults, _kwdefaults = map(attrgetter, ("__code__", "__defaults__", "__kwdefaults__"))


class Watched:
    """Entries of a dictionary that must stay: all, those of some names, or single ones."""

    __slots__ = ("where", "whole", "subset", "_ignored", "_found", "_entries")

    def __init__(self, where: dict[Any, Any]):
        self.where = where
        self.whole = False
        self.subset: Any = None  # the names, a frozenset
        self._ignored: frozenset[str] = frozenset()
        self._found: list[tuple[Any, Any]] | None = None
        self._entries: dict[Any, Any] = {}

    def add(self, names: frozenset[str] | None, ignored: frozenset[str]) -> None:
        """Watches the entries of these names (None: all), those that are not there yet included."""
        self._ignored = ignored
        if names is None:
            self.whole = True
        else:
            self.subset = names if self.subset is None else self.subset | names
        self._found = self._now()

    def add_entries(self, names: Iterable[Any]) -> None:
        for name in names:
            self._entries[name] = self.where.get(name, MISSING)

    def is_empty(self) -> bool:
        """Whether it is watched whole and holds nothing."""
        return self.whole and not self.where and not self._entries

    def _now(self) -> list[tuple[Any, Any]]:
        names, ignored = self.subset, self._ignored
        if self.whole:
            return [pair for pair in self.where.items() if pair[0] not in ignored]
        return [pair for pair in self.where.items() if pair[0] in names and pair[0] not in ignored]

    def unchanged(self) -> bool:
        where = self.where
        for name, value in self._entries.items():
            if where.get(name, MISSING) is not value:
                return False
        if self._found is None:
            return True
        now = self._now()
        return len(now) == len(self._found) and all(
            a is b and (m is n or (type(m) is type(n) is str and m == n)) for (m, a), (n, b) in zip(now, self._found)
        )


class Guards:
    """What a walk met, as it was then. `settle` ends the collecting; `unchanged` compares."""

    def __init__(self) -> None:
        self.objects: list[tuple[Any, type]] = []
        self.slots: list[tuple[Any, str, Any]] = []
        self.cells: list[tuple[Any, Any]] = []
        self.functions: list[Any] = []
        self.sequences: list[tuple[Any, tuple[Any, ...]]] = []
        self.buffers: list[tuple[Any, bytes]] = []
        self.references: list[tuple[Any, Any]] = []
        self.caches: list[tuple[Any, tuple[Any, ...]]] = []
        self.variables: list[tuple[Any, Any]] = []
        self.contents: list[tuple[Tensor, Tensor]] = []
        self.classes: dict[type, int] = {}  # of torch's and of Python's own, with their numbers in `Patches`
        self._watched: dict[int, Watched] = {}

    def _watch(self, where: Any) -> Watched:
        if not isinstance(where, dict):  # a read-only view of one
            where = next(d for d in gc.get_referents(where) if isinstance(d, dict))
        found = self._watched.get(id(where))
        if found is None:
            found = self._watched[id(where)] = Watched(where)
        return found

    def watch(self, where: dict[Any, Any], names: frozenset[str] | None, ignored: frozenset[str]) -> None:
        """The entries of a dictionary whose keys are among `names` (None: all), now and later."""
        self._watch(where).add(names, ignored)

    def watch_entries(self, where: dict[Any, Any], names: Sequence[Any]) -> None:
        """Single entries, there or not."""
        if names:
            self._watch(where).add_entries(names)

    def watch_class(self, cls: type, names: frozenset[str] | None, ignored: frozenset[str]) -> None:
        where = class_dictionary(cls)
        if where is not None:
            self.watch(where, names, ignored)

    def settle(self, tensors: Sequence[Tensor], patches: Patches) -> None:
        """Takes what was collected as the state to compare with."""
        self._patches, self._patched = patches, patches.number
        watched = list(self._watched.values())
        # Hooks are most of them, and empty most of the time: that they still are is asked of all at once.
        self._empty = [w.where for w in watched if w.is_empty()]
        self._empty += [value for value, copy in self.sequences if not copy]
        self._list = [w for w in watched if not w.is_empty()]
        self._dicts = [*(w.where for w in self._list), *patches.dicts, *patches.class_dicts(self.classes)]
        self._versions: Any = [*map(dict_version, self._dicts)] if dict_version is not None else None
        self._objects, self._types = [o for o, _ in self.objects], [t for _, t in self.objects]
        self._cells = [cell for cell, _ in self.cells]
        self._contents = [id(value) for _, value in self.cells]
        self._code = [*map(_code, self.functions)]
        defaults = [*map(_defaults, self.functions), *map(_kwdefaults, self.functions)]
        self._defaults = defaults  # keeps the ids taken
        self._default_ids = [*map(id, defaults)]
        self._sequences = [(value, [*map(id, copy)]) for value, copy in self.sequences if copy]
        self._kinds = Kinds(tensors)
        rare = (self.slots, self.buffers, self.references, self.caches, self.variables, self.contents)
        self._rare = any(rare)
        self._table: Any = self._as_words()  # a `Table`, or None
        others = self._empty if self._table is None else [v for v in self._empty if not isinstance(v, dict)]
        self._beside = bool(others or self._sequences or self._rare)
        self._other_empty = others
        self._differs: Callable[[], int] | None = None

    def _as_words(self) -> Table | None:
        """What stands in memory now; None where it is not known where it stands. Counts of dictionaries come first."""
        places = words.places(dict_version)
        if places is None:
            return None
        found = [(id(where) + places.version, count) for where, count in zip(self._dicts, self._versions)]
        found += [(id(where) + places.used, 0) for where in self._empty if isinstance(where, dict)]
        found += [(id(thing) + places.kind, id(kind)) for thing, kind in zip(self._objects, self._types)]
        count = len(self.functions)
        held = (self._code, self._defaults[:count], self._defaults[count:])
        for place, values in zip((places.code, places.defaults, places.kwdefaults), held):
            found += [(id(f) + place, address_of(value)) for f, value in zip(self.functions, values)]
        found += [(id(cell) + places.cell, 0 if value is MISSING else id(value)) for cell, value in self.cells]
        return Table((address, word, 0) for address, word in found)

    def unchanged(self) -> bool:
        """Whether everything is as it was."""
        if self._differs is not None:
            entry = self._differs()
            if entry >= 0 and not self._still_holds(entry):
                return False
        elif not self._same_objects():
            return False
        if self._beside and not self._beside_unchanged():
            return False
        kinds = self._kinds
        return kinds.check(*kinds.tensors) or kinds.unchanged()

    def _beside_unchanged(self) -> bool:
        """Whether what stands in no table is unchanged."""
        if any(self._other_empty):
            return False
        for value, ids in self._sequences:
            if [*map(id, value)] != ids:
                return False
        return not self._rare or self._rare_unchanged()

    def _still_holds(self, entry: int) -> bool:
        """Whether what has changed, at an entry of the table and after it, is nothing that was read."""
        while entry >= 0:
            if entry >= len(self._dicts):
                return False
            count = self._table.now(entry)
            if not (self._list[entry].unchanged() if entry < len(self._list) else not self._is_patched()):
                return False
            self._table.renew(entry, count)
            entry = self._table.differs(entry + 1)
        return True

    def _same_objects(self) -> bool:
        """Whether dictionaries, classes, functions and variables of closures are what they were, compared in Python."""
        if self._table is not None and words.compare is not None:
            self._differs = self._table.question()  # from the next time on
        if any(self._empty):
            return False
        versions = self._versions
        if versions is None:
            if self._is_patched() or not all(w.unchanged() for w in self._list):
                return False
        else:
            now = [*map(dict_version, self._dicts)]
            if now != versions:
                for watched, new, old in zip(self._list, now, versions):
                    if new != old and not watched.unchanged():
                        return False
                if self._is_patched():
                    return False
                self._versions = now
        if [*map(type, self._objects)] != self._types:
            return False
        functions = self.functions
        if [*map(_code, functions)] != self._code:
            return False
        if [*map(id, map(_defaults, functions)), *map(id, map(_kwdefaults, functions))] != self._default_ids:
            return False
        if self._cells:
            try:
                if [*map(id, map(_contents, self._cells))] != self._contents:
                    return False
            except ValueError:  # a variable was deleted, or is not there yet
                if not all(contents(cell) is value for cell, value in self.cells):
                    return False
        return True

    def _is_patched(self) -> bool:
        return self._patches.look() != self._patched or any(
            self._patches.class_number(cls) != number for cls, number in self.classes.items()
        )

    def _rare_unchanged(self) -> bool:
        return (
            all(getattr(o, slot, MISSING) is value for o, slot, value in self.slots)
            and all(bytes_of(b) == held for b, held in self.buffers)
            and all(reference() is target for reference, target in self.references)
            and all(_known(cache) == state for cache, state in self.caches)
            and all(variable.get(MISSING) is value for variable, value in self.variables)
            and all(same_content(t, copy) for t, copy in self.contents)
        )


class Kinds:
    """What some tensors are, besides their numbers."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = list(tensors)
        self._known = [metadata(t) for t in tensors]
        self.check = kinds_guard(self.tensors)

    def unchanged(self) -> bool:
        """torch's own comparison is quick, and tells of more: under inference mode it says no."""
        return self.check(*self.tensors) or all(metadata(t) == known for t, known in zip(self.tensors, self._known))


def metadata(tensor: Tensor) -> Any:
    """What a tensor is, besides its numbers."""
    kind = (type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, tensor.layout)
    return kind if tensor.layout is not torch.strided else (*kind, tensor.stride(), tensor.is_neg(), tensor.is_conj())


def same_content(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit: a NaN equals itself, and 0.0 is not -0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def bytes_of(value: Any) -> bytes:
    return value.tobytes() if isinstance(value, (np.ndarray, memoryview)) or hasattr(value, "tobytes") else bytes(value)


def _known(cache: Any) -> tuple[int, int]:
    known = cache.cache_info()
    return known.misses, known.currsize


def kinds_guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function of as many tensors: whether they are certainly of the kinds, shapes and strides of these."""
    if not tensors:
        return lambda: True
    if dict_version is not None and all(type(t) in (Tensor, nn.Parameter) for t in tensors):
        try:
            return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        except (TypeError, ValueError, RuntimeError):
            pass
    return lambda *_: False


def class_dictionary(cls: type) -> dict[Any, Any] | None:
    """The dictionary behind vars(cls), which counts its changes."""
    found = [d for d in gc.get_referents(vars(cls)) if type(d) is dict]
    return found[0] if len(found) == 1 else None
