"""Functions of torch's and of Python's own that a step ran: they stay what they are, unless somebody patches them.

Whoever writes `torch.nn.functional.relu = ...` or `nn.Linear.forward = ...` puts another function into the dictionary
of a module or of a class. So what is compared is which objects stand there under the names that the functions use.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .guards import MISSING, class_dictionary, dict_version
from .reads import kind_of_file, trusted


class Patches:
    """What stands under the names that some functions use, as one number that is another where anything is.

    dicts: the dictionaries where they stand.
    """

    def __init__(self, library: frozenset[tuple[types.CodeType, str]]):
        places: dict[int, tuple[dict[str, Any], set[str]]] = {}
        for code, module in library:
            if module in sys.modules:
                _collect(places, vars(sys.modules[module]), code.co_names)
        self._places = [(where, sorted(names)) for where, names in places.values()]
        self._classes: dict[type, tuple[dict[Any, Any], list[Any]]] = {}
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._pinned: list[Any] = []
        self.users: list[types.FunctionType] = []
        self._places += [(where, sorted(where)) for where in map(class_dictionary, Tensor.__mro__) if where is not None]
        self.dicts = [where for where, _ in self._places]
        self._renew()

    def look(self) -> int:
        """The number, as it is now."""
        if self._versions is None or [*map(dict_version, self.dicts)] != self._versions:
            self._renew()
        return self.number

    def class_number(self, cls: type) -> int:
        """Like `number`, for the methods of one class."""
        known = self._classes.get(cls)
        if known is None:
            known = self._classes[cls] = class_dictionary(cls) or {}, []
        where, found = known
        version = dict_version(where) if dict_version is not None else None
        if version is None or found[:1] != [version]:
            found[:] = [version, self._numbered((_code_in(where, where),))]
        return found[1]

    def class_dicts(self, classes: Iterable[type]) -> list[dict[Any, Any]]:
        """The dictionaries behind classes whose number was asked for."""
        return [self._classes[cls][0] for cls in classes]

    def users_of(self, cls: type) -> list[types.FunctionType]:
        """Functions that a user has put among the methods of a class."""
        return [f for f in self._classes[cls][0].values() if _is_users(f)]

    def _renew(self) -> None:
        self._versions = [*map(dict_version, self.dicts)] if dict_version is not None else None
        self.number = self._numbered(tuple(_code_in(where, names) for where, names in self._places))
        found = [_without_tracer(where.get(name)) for where, names in self._places for name in names]
        self.users = [f for f in found if _is_users(f)]

    def _numbered(self, found: tuple[tuple[Any, ...], ...]) -> int:
        ids = tuple(tuple(map(id, part)) for part in found)
        number = self._numbers.get(ids)
        if number is None:
            number = self._numbers[ids] = len(self._numbers) + 1
            self._pinned.append(found)  # the ids stay taken
        return number


def _collect(
    places: dict[int, tuple[dict[str, Any], set[str]]], variables: dict[str, Any], names: tuple[str, ...]
) -> None:
    for name in names:
        value = variables.get(name, MISSING)
        if value is MISSING:
            continue
        places.setdefault(id(variables), (variables, set()))[1].add(name)
        if isinstance(value, types.ModuleType):
            inside = vars(value)
            found = [n for n in names if n in inside]
            if found:
                places.setdefault(id(inside), (inside, set()))[1].update(found)


def _code_in(where: dict[Any, Any], names: Any) -> tuple[Any, ...]:
    """The functions, classes and modules among some variables."""
    return tuple(v for n in list(names) if _is_code(v := _without_tracer(where.get(n))))


def _without_tracer(value: Any) -> Any:
    """While torch.fx traces, wrappers that hold its tracer stand in the place of some methods: what they wrap."""
    if isinstance(value, types.FunctionType) and "_Patcher__fx_already_patched" in value.__dict__:
        wrapper: Any = value
        return wrapper.__wrapped__
    return value


def _is_code(value: Any) -> bool:
    return callable(value) or isinstance(value, (types.ModuleType, property, staticmethod, classmethod))


def _is_users(value: Any) -> bool:
    return isinstance(value, types.FunctionType) and not trusted(kind_of_file(value.__code__.co_filename))


@functools.lru_cache(maxsize=256)
def patches_of(library: frozenset[tuple[types.CodeType, str]]) -> Patches:
    """The Patches of some code, shared by all walks."""
    return Patches(library)
