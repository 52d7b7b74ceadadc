"""Python's things that can change, one class each: what it was, whether it still is so, and how it is put back."""

from __future__ import annotations

import array
import collections
import ctypes
import gc
import io
import types
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch

from .guards import MISSING, bytes_of, contents

WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
_RESIZED = (bytearray, array.array)  # memory that can grow
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, range, slice)
# Attributes that torch and Python themselves add to objects.
ADDED = frozenset(
    "_non_persistent_buffers_set _is_full_backward_hook _backward_pre_hooks _backward_hooks _state_dict_hooks "
    "_state_dict_pre_hooks _load_state_dict_pre_hooks _load_state_dict_post_hooks _forward_hooks_with_kwargs "
    "_forward_hooks_always_called _forward_pre_hooks_with_kwargs __warningregistry__ __annotations__ "
    "__dict__ __weakref__ __abstractmethods__ _abc_impl _steploop_kept".split()
)  # and what a Step keeps between calls


class Held:
    """Something that can change.  changes(): the paths of what did.  restore(): puts it back."""

    def changes(self) -> list[str]:
        raise NotImplementedError

    def restore(self) -> None:
        raise NotImplementedError


class Entries(Held):
    """The entries of a dictionary; `names`: only these."""

    def __init__(
        self, where: Any, path: str, ignored: frozenset[str] = frozenset(), names: Sequence[str] | None = None
    ):
        self.where, self.path, self.ignored, self.names = where, path, ignored, names
        self.copy = self._now()

    def _now(self) -> dict[Any, Any]:
        if self.names is not None:
            return {n: self.where[n] for n in self.names if n in self.where}
        return {k: v for k, v in self.where.items() if k not in self.ignored and not str(k).startswith("_steploop")}

    def changes(self) -> list[str]:
        now = self._now()
        if len(now) == len(self.copy) and all(a is b for a, b in zip(now.values(), self.copy.values())):
            return []
        keys = [k for k in {**self.copy, **now} if not alike(now.get(k, MISSING), self.copy.get(k, MISSING))]
        return [f"{self.path}.{k}" if self.path else str(k) for k in keys]

    def restore(self) -> None:
        now = self._now()
        for key in now.keys() - self.copy.keys():
            self._remove(key)
        for key, value in self.copy.items():
            if now.get(key, MISSING) is not value:
                self._put(key, value)

    def _put(self, key: Any, value: Any) -> None:
        self.where[key] = value

    def _remove(self, key: Any) -> None:
        del self.where[key]


class ClassEntries(Entries):
    def __init__(self, where: dict[Any, Any], cls: type):
        self.cls = cls
        super().__init__(where, cls.__name__, ADDED)

    def _put(self, key: Any, value: Any) -> None:
        setattr(self.cls, key, value)

    def _remove(self, key: Any) -> None:
        delattr(self.cls, key)


class _Members(Held):
    """A list, a set, a deque: compared and put back whole."""

    def __init__(self, value: Any, path: str):
        self.value, self.path, self.copy = value, path, tuple(value)

    def changes(self) -> list[str]:
        now = tuple(self.value)
        same = len(now) == len(self.copy) and all(map(alike, now, self.copy))
        return [] if same else [self.path or "a container that the step reads"]

    def restore(self) -> None:
        self.value.clear()
        (self.value.update if isinstance(self.value, set) else self.value.extend)(self.copy)


class _Bytes(Held):
    """Memory: an array of numpy's or of Python's, a bytearray, a view of memory, a number of ctypes'."""

    def __init__(self, value: Any, path: str):
        self.value, self.path, self.shape = value, path, getattr(value, "shape", None)
        copy = value.copy() if isinstance(value, np.ndarray) else bytes_of(value)
        self.copy: Any = value[:] if isinstance(value, _RESIZED) else copy

    def changes(self) -> list[str]:
        same = getattr(self.value, "shape", None) == self.shape and bytes_of(self.value) == bytes_of(self.copy)
        return [] if same else [self.path]

    def restore(self) -> None:
        if isinstance(self.value, np.ndarray):
            self.value[...] = self.copy
        elif isinstance(self.value, _RESIZED):
            self.value[:] = self.copy
        else:
            ctypes.memmove((ctypes.c_char * len(self.copy)).from_buffer(self.value), self.copy, len(self.copy))


class WeakEntries(Held):
    """The entries of a weak dictionary. Those that go are none of the step's: what they were for was let go."""

    def __init__(self, value: Any, path: str):
        self.value, self.path = value, path
        self.copy = self._now()

    def _now(self) -> dict[int, tuple[Any, Any]]:
        by_key = isinstance(self.value, weakref.WeakKeyDictionary)
        return {id(k) if by_key else k: (k, v) for k, v in list(self.value.items())}

    def changes(self) -> list[str]:
        known = self.copy
        other = any(k not in known or not alike(pair[1], known[k][1]) for k, pair in self._now().items())
        return [self.path] if other else []

    def restore(self) -> None:
        for k, (key, _) in self._now().items():
            if k not in self.copy:
                del self.value[key]
        for key, value in self.copy.values():
            self.value[key] = value


class Slot(Held):
    def __init__(self, value: Any, path: str, slot: str):
        self.value, self.path, self.slot = value, path, slot
        self.copy = getattr(value, slot, MISSING)

    def changes(self) -> list[str]:
        return [] if alike(getattr(self.value, self.slot, MISSING), self.copy) else [self.path]

    def restore(self) -> None:
        if self.copy is MISSING:
            delattr(self.value, self.slot)
        else:
            object.__setattr__(self.value, self.slot, self.copy)


class Cell(Held):
    """A variable of an enclosing function."""

    def __init__(self, cell: types.CellType, name: str):
        self.cell, self.name, self.copy = cell, name, contents(cell)

    def changes(self) -> list[str]:
        same = alike(contents(self.cell), self.copy)
        return [] if same else [f"{self.name}, a variable of an enclosing function"]

    def restore(self) -> None:
        if self.copy is not MISSING:
            self.cell.cell_contents = self.copy


class Position(Held):
    """How far an iterator has come. That can't be put back."""

    def __init__(self, value: Any, path: str, position: Callable[[Any], Hashable]):
        self.value, self.path, self.position = value, path, position
        self.copy = position(value)

    def changes(self) -> list[str]:
        return [] if self.position(self.value) == self.copy else [self.path]

    def restore(self) -> None:
        pass


class Calls(Position):
    """How many calls a functools.lru_cache has kept."""

    def __init__(self, value: Any, path: str):
        super().__init__(value, path, lambda v: v.cache_info().misses)

    def restore(self) -> None:
        """Forgets all calls, as those of a trace gave tensors that nobody else can use."""
        self.value.cache_clear()
        self.copy = self.position(self.value)


_KINDS: list[tuple[Any, Callable[[Any, str], Held]]] = [
    (dict, Entries), ((list, set, collections.deque), _Members),
    ((np.ndarray, *_RESIZED, ctypes._SimpleCData, ctypes.Structure, ctypes.Array), _Bytes),
]  # fmt: skip


def changeable(value: Any, path: str) -> Held | None:
    """What there is to be watched of a container, of memory, or of a file that is only read. (Logs are written.)"""
    if isinstance(value, memoryview) and value.contiguous and not value.readonly:
        return _Bytes(value, path)
    if isinstance(value, io.IOBase) and not value.closed and value.readable() and not value.writable():
        return Position(value, path, _told)
    kind = next((k for bases, k in _KINDS if isinstance(value, bases)), None)
    return None if kind is None else kind(value, path)


def position_of(iterator: Any) -> Hashable:
    """Something that is another once an iterator was advanced. (What it takes from is looked at by itself.)"""
    try:
        return repr(iterator.__reduce__())
    except TypeError:  # Python 3.14 no longer tells of some, and earlier ones not of `itertools.pairwise`
        return repr(iterator), getattr(iterator, "__length_hint__", int)()


def taken_from(iterator: Any) -> list[Any]:
    """What an iterator (zip, map, chain) takes its values from, and what it calls."""
    try:
        _, arguments, *rest = iterator.__reduce__()
        found = [*arguments, *(part for state in rest if isinstance(state, tuple) for part in state)]
    except (TypeError, ValueError):
        # (not in its tuples: zip_longest leaves holes in its own, and changes them)
        found = gc.get_referents(iterator)
    return [part for part in found if hasattr(type(part), "__next__") or isinstance(part, types.FunctionType)]


def _told(file: Any) -> Hashable:
    """How far a file was read. A pipe can't tell. A text whose lines are taken one by one can't either: it was read."""
    try:
        return file.tell()
    except (OSError, ValueError):
        return object() if file.seekable() else None


def alike(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, PLAIN) and (a == b or (a != a and b != b)))
