"""Where Python keeps what guards compare: as words of memory, which one native function compares all at once.

A dictionary counts its changes in one word, a function holds its code in another. Where these words stand is found by
trying: an object is changed, and the word that followed is looked for. Where none follows (another Python counts the
changes of dictionaries elsewhere), guards compare in Python.
"""

from __future__ import annotations

import array
import ctypes
import functools
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# What compares: (address of a table, the entry to begin with, how many there are) -> the first entry that differs, -1
# where none does. Set by whoever has native code.
compare: Any = None


class Table:
    """Entries of three words: an address, the word that is to stand there, and 0; or two addresses and how many bytes
    there are to be the same. Whoever makes one keeps alive what stands at the addresses."""

    def __init__(self, entries: Iterable[tuple[int, int, int]]):
        self._words = array.array("Q", [word for entry in entries for word in entry])
        self.count = len(self._words) // 3
        self.address = self._words.buffer_info()[0]

    def differs(self, start: int = 0) -> int:
        """The first entry from `start` on that is not as it was; -1: there is none."""
        return compare(self.address, start, self.count)

    def question(self) -> Callable[[], int]:
        """`differs` as a function that is called in less time."""
        question: Any = functools.partial(compare, self.address, 0, self.count)
        question.table = self  # which must live as long
        return question

    def now(self, entry: int) -> int:
        """The word that stands at an entry's address."""
        return word_at(self._words[3 * entry])

    def renew(self, entry: int, word: int) -> None:
        """From now on, another word is to stand there."""
        self._words[3 * entry + 1] = word


@dataclass(frozen=True)
class Places:
    """Offsets in bytes from the beginning of an object. version: of a dictionary; used: how much it holds."""

    kind: int
    version: int
    used: int
    code: int
    defaults: int
    kwdefaults: int
    cell: int


def word_at(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


@functools.cache
def places(version: Callable[[dict[Any, Any]], int] | None) -> Places | None:
    """The places in this Python, or None. version: counts the changes of a dictionary."""
    in_turn = getattr(sys, "_is_gil_enabled", lambda: True)()
    if version is None or sys.implementation.name != "cpython" or not in_turn or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    found: Any = _kind(), _version(version), _used(), *_function(), _cell()
    return None if None in found else Places(*found)


def _followed(thing: Any, size: int, changes: Sequence[tuple[Callable[[], Any], Callable[[], int]]]) -> int | None:
    """Where the word stands that is, after each of some changes, what it should be then."""
    left = list(range(8, size, 8))
    for change, expected in changes:
        change()
        left = [place for place in left if word_at(id(thing) + place) == expected()]
    return left[0] if len(left) == 1 else None


def _kind() -> int | None:
    class One:
        pass

    class Other:
        pass

    thing = One()
    return _followed(
        thing,
        One.__basicsize__,
        [(functools.partial(setattr, thing, "__class__", c), functools.partial(id, c)) for c in (Other, One, Other)],
    )


def _version(version: Callable[[dict[Any, Any]], int]) -> int | None:
    thing: dict[str, Any] = {}
    changes = (lambda: thing.update(a=1), lambda: thing.update(a=2), thing.clear, lambda: thing.setdefault("b"))
    return _followed(thing, dict.__basicsize__, [(change, lambda: version(thing)) for change in changes])


def _used() -> int | None:
    thing: dict[str, Any] = {}
    changes = [(lambda: thing.update(a=1), 1), (lambda: thing.update(b=1, c=2), 3), (thing.clear, 0)]
    return _followed(thing, dict.__basicsize__, [(change, functools.partial(int, n)) for change, n in changes])


def _function() -> tuple[int | None, ...]:
    thing, size = (lambda: None), types.FunctionType.__basicsize__
    held: dict[str, list[Any]] = {
        "__code__": [(lambda: 1).__code__, (lambda: 2).__code__],
        "__defaults__": [(1,), None, (2,)],
        "__kwdefaults__": [{"a": 1}, None, {"b": 2}],
    }

    def put(name: str, value: Any) -> Callable[[], None]:
        return lambda: setattr(thing, name, value)

    return tuple(
        _followed(thing, size, [(put(name, value), functools.partial(address_of, value)) for value in values])
        for name, values in held.items()
    )


def _cell() -> int | None:
    one, other = object(), object()
    thing = types.CellType(one)
    return _followed(
        thing,
        types.CellType.__basicsize__,
        [(functools.partial(setattr, thing, "cell_contents", v), functools.partial(id, v)) for v in (other, one)],
    )


def address_of(value: Any) -> int:
    """What stands where an object is held that may be missing."""
    return 0 if value is None else id(value)
