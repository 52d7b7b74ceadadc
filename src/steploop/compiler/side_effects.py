"""Whether tracing a step changed anything of the user's, and how it was before.

A step is captured once and not run again. What it changes in Python (a counter, a list, an attribute) would change once
instead of at every step, so that is refused, and undone. A value that the step computes once and keeps is none: running
the step for real changes it at the first step and not at the second.
"""

from __future__ import annotations

import collections
import functools
import os
import random
import sys
import threading
import types
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .changeable import (
    ADDED,
    PLAIN,
    WEAK,
    Calls,
    Cell,
    ClassEntries,
    Entries,
    Held,
    Position,
    Slot,
    WeakEntries,
    changeable,
    position_of,
    taken_from,
)
from .guards import MISSING, class_dictionary, contents
from .reads import globals_of, kind_of_file, kind_of_module, trusted
from .walk import attributes_of, slots_of

# More objects than this are not looked at: no step's own values are so many.
_MOST = 200_000


class Snapshot:
    """Everything that can be reached from some roots and can change, as it is now."""

    def __init__(self, roots: Sequence[Any]):
        self._seen: set[int] = set()
        self._alive: list[Any] = []
        self._held: list[Held] = []
        self._tensors: list[tuple[Tensor, str, Tensor, int]] = []
        self._generators: list[Any] = []
        self._frames: list[tuple[int, str]] = []
        self._recomputed: list[tuple[dict[Any, Any], str, Any]] = []
        self._queue: collections.deque[tuple[Any, str]] = collections.deque((root, "") for root in roots)
        self._held.append(Entries(os.environ, "os.environ"))
        while self._queue and len(self._seen) < _MOST:
            self._visit(*self._queue.popleft())
        self.random = self._random()

    def changes(self) -> list[str]:
        """What is not what it was: paths, those of tensors as "the tensor ..."."""
        found = [f"the tensor {p}" for t, p, held, v in self._tensors if not _same_memory(t, held) or t._version != v]
        for held in self._held:
            found += held.changes()
        return list(dict.fromkeys(found))

    def resumed(self, frames: set[int]) -> list[str]:
        """Generators among what was reached that ran meanwhile."""
        return [path for frame, path in self._frames if frame in frames]

    def restore(self) -> None:
        """Puts everything back, as far as it can be."""
        self.put_back_recomputed()
        for tensor, _, memory, version in self._tensors:
            if not _same_memory(tensor, memory) or tensor._version != version:
                tensor.data = memory
        for held in self._held:
            if held.changes():
                held.restore()

    def put_back_recomputed(self) -> None:
        """Puts back weights that hooks compute before every use: what a trace left there is no tensor of torch's."""
        for where, name, value in self._recomputed:
            if value is not MISSING:
                where[name] = value

    def drawn(self) -> bool:
        """Whether a random generator of Python's or numpy's has moved."""
        return not _same_states(self.random, self._random())

    def _random(self) -> list[Any]:
        return [_state_of(g) for g in (random, np.random, *self._generators)]

    # -- what can be reached -----------------------------------------------------------------------------

    def _follow(self, value: Any, path: str) -> None:
        if not isinstance(value, PLAIN) and id(value) not in self._seen:
            self._queue.append((value, path))

    def _visit(self, value: Any, path: str) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._alive.append(value)
        if isinstance(value, Tensor):
            if _has_version(value):
                self._tensors.append((value, path, value.data, value._version))
                self._attributes(value, vars(value), path)
        elif isinstance(value, types.FunctionType):
            self._function(value, path)
        elif isinstance(value, types.MethodType):
            self._follow(value.__self__, path)
            self._follow(value.__func__, path)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self._follow(part, path)
        elif isinstance(value, (property, staticmethod, classmethod)):
            for name in ("fget", "fset", "__func__"):
                self._follow(getattr(value, name, None), path)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.ModuleType):
            if not trusted(kind_of_module(value.__name__)):
                self._attributes(value, vars(value), path)
        elif isinstance(value, (random.Random, np.random.Generator, np.random.RandomState)):
            self._generators.append(value)
        elif isinstance(value, functools._lru_cache_wrapper):
            self._held.append(Calls(value, path))
            self._follow(value.__wrapped__, path)
        elif isinstance(value, types.GeneratorType):
            if value.gi_frame is not None:
                self._frames.append((id(value.gi_frame), path))
        elif isinstance(value, weakref.ref):
            self._follow(value(), path)
        elif isinstance(value, threading.local):
            self._attributes(value, vars(value), path)
        elif isinstance(value, WEAK):
            self._held.append(WeakEntries(value, path))
            for item in list(value.values()):
                self._follow(item, f"{path}.values()")
        elif not _has_own_business(value):
            self._contents(value, path)

    def _contents(self, value: Any, path: str) -> None:
        held = changeable(value, path)
        if held is not None:
            self._held.append(held)
        if isinstance(value, (dict, types.MappingProxyType)):
            for key, item in list(value.items()):
                self._follow(key, path)
                self._follow(item, f"{path}.{key}" if path else str(key))
        elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
            for i, item in enumerate(value):
                self._follow(item, f"{path}[{i}]")
        elif held is None and hasattr(type(value), "__next__") and attributes_of(value) is None:
            self._held.append(Position(value, path, position_of))
            for inner in taken_from(value):
                self._follow(inner, path)
        attributes = attributes_of(value)
        if attributes is not None:
            self._attributes(value, attributes, path)
        for slot in slots_of(type(value)):
            item = getattr(value, slot, MISSING)
            self._held.append(Slot(value, f"{path}.{slot}", slot))
            if item is not MISSING:
                self._follow(item, f"{path}.{slot}")
        self._follow(type(value), type(value).__name__)

    def _attributes(self, value: Any, attributes: dict[Any, Any], path: str) -> None:
        made = recomputed(value) if isinstance(value, nn.Module) else frozenset()
        self._recomputed += [(attributes, name, attributes.get(name, MISSING)) for name in made]
        self._held.append(Entries(attributes, path, ADDED | made))
        for name, item in list(attributes.items()):
            if name != "_steploop_kept" and name not in made:
                self._follow(item, f"{path}.{name}" if path else str(name))

    def _class(self, cls: type) -> None:
        for base in cls.__mro__:
            if id(base) in self._seen and base is not cls or trusted(kind_of_module(base.__module__)):
                continue
            self._seen.add(id(base))
            where = class_dictionary(base)
            if where is None:
                continue
            self._held.append(ClassEntries(where, base))
            for name, item in list(where.items()):
                if name not in ADDED:
                    self._follow(item, f"{base.__name__}.{name}")

    def _function(self, function: types.FunctionType, path: str) -> None:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            self._held.append(Cell(cell, name))
            self._follow(contents(cell), name)
        self._held.append(Entries(function.__dict__, path, ADDED))
        for name, item in list(function.__dict__.items()):
            self._follow(item, f"{path}.{name}")
        if trusted(kind_of_file(function.__code__.co_filename)):
            return
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._follow(value, f"{path} (a default)")
        named = globals_of(function.__code__)
        self._names(function.__globals__, named.names, "")
        modules = {name: function.__globals__.get(name) for name in named.names}
        modules.update((name, sys.modules.get(name)) for name in named.imports)
        for name, module in modules.items():
            if isinstance(module, types.ModuleType) and not trusted(kind_of_module(module.__name__)):
                self._names(vars(module), named.attributes, name)

    def _names(self, variables: dict[str, Any], names: Iterable[str], path: str) -> None:
        names = [n for n in names if n not in ADDED]
        self._held.append(Entries(variables, path, frozenset(), names))
        for name in names:
            value = variables.get(name, MISSING)
            if value is not MISSING and not isinstance(value, types.ModuleType):
                self._follow(value, f"{path}.{name}" if path else name)


def recomputed(module: nn.Module) -> frozenset[str]:
    """Attributes that torch.nn.utils' own hooks (weight_norm, prune, spectral_norm) assign before every forward."""
    hooks = [h for h in module._forward_pre_hooks.values() if type(h).__module__.startswith("torch.nn.utils.")]
    names = [getattr(h, "name", None) or getattr(h, "_tensor_name", None) for h in hooks]
    return frozenset(n for n in names if isinstance(n, str))


def _has_own_business(value: Any) -> bool:
    """Whether an object of Python's or torch's changes for reasons of its own: a lock, a weak set, autocast."""
    kind = type(value)
    module = kind.__module__.split(".")[0]
    return module in ("weakref", "_thread", "functools") or module == "torch" and not isinstance(value, nn.Module)


def _has_version(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_inference()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    try:
        return a.data_ptr() == b.data_ptr()
    except RuntimeError:  # one of them was made by a tracer
        return False


def _same_states(a: Any, b: Any) -> bool:
    """Whether two states of random generators are equal."""
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same_states(x, y) for x, y in zip(a, b))
    if isinstance(a, dict):
        return all(_same_states(a[k], b[k]) for k in a)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state() if hasattr(generator, "get_state") else generator.getstate()
