"""One walk over the objects that a step can have read: what it has found, and how it goes on."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .guards import MISSING, Guards
from .patches import patches_of
from .reads import Reads

# Values that are described by what they hold. Floats and what prints like them are told apart by their text.
EXACT = frozenset({
    type(None), bool, int, str, bytes, type(...), type(NotImplemented), torch.dtype, torch.device, torch.Size,
    torch.layout, torch.memory_format, range,
})  # fmt: skip
_BY_TEXT = frozenset({complex, slice})
# In every class or module, and never what a step reads to compute with.
NO_DATA = frozenset(
    "__dict__ __weakref__ __module__ __doc__ __annotations__ __slots__ __abstractmethods__ _abc_impl __builtins__ "
    "__loader__ __spec__ __qualname__ __firstlineno__ __static_attributes__ __orig_bases__ __parameters__".split()
)


@dataclass(frozen=True)
class Number:
    """A Python float that the walk met. hold: the dictionary, list or cell that holds it, None where none can."""

    path: str
    value: float
    hold: Any = None
    at: Any = None

    def put(self, value: Any) -> None:
        """Puts another value in its place."""
        if isinstance(self.hold, types.CellType):
            self.hold.cell_contents = value
        else:
            self.hold[self.at] = value


class Walk:
    """What a walk has found so far, and how it goes on from one object to the next.

    tensors, paths: the tensors that it met, each once, in order, and where it met them.
    floats: the Python floats that the key leaves out.  facts: (path, value) of other plain values, for messages.
    codes: the code of the functions that it met.  pinned: objects that the key names by their id.
    walker_of: for a type, what describes a value of it.
    """

    def __init__(self, reads: Reads, walker_of: Callable[[type], Walker]):
        self.tensors: list[Tensor] = []
        self.paths: list[str] = []
        self.floats: list[Number] = []
        self.facts: list[tuple[str, Any]] = []
        self.codes: set[types.CodeType] = set()
        self.pinned: list[Any] = []
        self.guards = Guards()
        self.names = reads.names
        self.patches = patches_of(reads.library)
        self.seen: dict[int, int] = {}
        self._alive: list[Any] = []
        self._walker_of = walker_of

    def into(self, value: Any, path: str, hold: Any = None, at: Any = None) -> Hashable:
        """A value's part of the key. hold, at: what holds it, and where in that."""
        kind = type(value)
        if kind is float:
            self.facts.append((path, value))
            self.floats.append(Number(path, value, hold, at))
            return ("float", len(self.floats))
        if kind in EXACT:
            self.facts.append((path, value))
            return (kind, value)
        if kind in _BY_TEXT:
            self.facts.append((path, value))
            return (kind, repr(value))
        number = self.seen.get(id(value))
        if number is not None:
            return ("seen", number)
        self.seen[id(value)] = len(self.seen)
        self._alive.append(value)
        return self._walker_of(kind)(self, value, path)

    def id_of(self, value: Any) -> int:
        """An object's id as part of the key: it must stay taken as long as the key is known."""
        self.pinned.append(value)
        return id(value)

    def is_named(self, name: Any) -> bool:
        return self.names is None or not isinstance(name, str) or name in self.names

    def instance(self, value: Any, path: str, ignored: frozenset[str] = frozenset()) -> tuple[Hashable, ...]:
        """The class of an object and the attributes of it that are named."""
        self.guards.objects.append((value, type(value)))
        parts: list[Hashable] = [self.into(type(value), type(value).__name__)]
        attributes = attributes_of(value)
        if attributes is not None:
            parts.append(self.entries(attributes, self.names, path, ignored))
        for slot in slots_of(type(value)):
            if self.is_named(slot):
                found = getattr(value, slot, MISSING)
                self.guards.slots.append((value, slot, found))
                if found is not MISSING:
                    parts.append((slot, self.into(found, f"{path}.{slot}")))
        return tuple(parts)

    def entries(
        self, where: dict[Any, Any], names: frozenset[str] | None, path: str, ignored: frozenset[str] = frozenset()
    ) -> Hashable:
        """The entries of a dictionary of attributes that are named (None: all)."""
        self.guards.watch(where, names, ignored)
        found: list[Hashable] = []
        for key, item in list(where.items()):
            if key in ignored or (isinstance(key, str) and key.startswith("_steploop")) or key in NO_DATA:
                continue
            if names is None or key in names:
                found.append((key, self.into(item, f"{path}.{key}" if path else str(key), where, key)))
        return tuple(found)


def attributes_of(value: Any) -> dict[str, Any] | None:
    """The dictionary of an object's attributes, past whatever its class makes of attributes that are not there."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def slots_of(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot not in ("__dict__", "__weakref__"):
                yield slot if not slot.startswith("__") else f"_{base.__name__.lstrip('_')}{slot}"


Walker = Callable[[Walk, Any, str], Hashable]
