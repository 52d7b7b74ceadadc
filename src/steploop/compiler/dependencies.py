"""What a captured step depended on, described so that a later call can tell whether it still holds.

A capture bakes in everything that is Python: numbers and strings that the step reads, the functions that it calls, the
modes of its modules. The walk starts at the step, and at what a call gives it that is no tensor. It follows what the
step's code can have read, as `reads.py` tells it: attributes that the code names, globals that its functions name, what
closures hold, containers whole. All of it becomes one hashable key. Tensors stand in it by their metadata only, and are
found again by their place in the walk: a parameter that was replaced, or another closure of the same code, uses the
same capture with its own tensors. Python floats stand apart, so that one that changes can become an input.

`walk.py` has what a walk is made of, `walked_values.py` and `walked_code.py` what each kind of object adds to it.
A walk takes some microseconds for each object. `guards.py` tells quickly whether a new one would find the same.
"""

from __future__ import annotations

import array
import collections
import contextvars
import enum
import functools
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .guards import MISSING
from .reads import Reads, kind_of_module, trusted
from .walk import Walk, Walker
from .walked_code import CODE_LIKE, variables_of, walk_class, walk_function
from .walked_values import (
    FIXED,
    walk_buffer,
    walk_builtin,
    walk_cached,
    walk_descriptor,
    walk_enum_member,
    walk_fixed,
    walk_identity,
    walk_local,
    walk_mapping,
    walk_method,
    walk_module,
    walk_object,
    walk_partial,
    walk_python_module,
    walk_reference,
    walk_scalar,
    walk_script,
    walk_sequence,
    walk_set,
    walk_tensor,
)

_HOOKS = [n for n, v in vars(nn.modules.module).items() if n.startswith("_global_") and isinstance(v, dict)]


class Dependencies(Walk):
    """The whole walk: its key, and the tensors that it met.

    roots: (value, path, what holds it, where in that) of each object where it begins.
    """

    def __init__(self, roots: Sequence[tuple[Any, str, Any, Any]], reads: Reads):
        super().__init__(reads, _walker_of)
        self.reads = reads
        self.program: Any = None
        self.key: Hashable = (*(self.into(*root) for root in roots), *self._beside())
        self.guards.settle(self.tensors, self.patches)
        # Whether a new walk would give the same key, the same floats and the same tensors.
        self.unchanged: Callable[[], bool] = self.guards.unchanged
        self.seen.clear()

    @property
    def caches(self) -> bool:
        """Whether functions are among them that keep what they gave."""
        return bool(self.guards.caches)

    def float_values(self) -> dict[str, float]:
        """The floats by their paths."""
        return {number.path: number.value for number in self.floats}

    def _beside(self) -> Iterator[Hashable]:
        """What the step depends on and no root leads to."""
        for reference in self.reads.functions:
            function = reference()
            yield None if function is None else self.into(function, function.__name__)
        for code, module in sorted(self.reads.loose, key=lambda pair: (pair[1], pair[0].co_name)):
            yield (code, variables_of(self, code, vars(sys.modules[module])) if module in sys.modules else ())
        for name in sorted(self.reads.modules):
            if name in sys.modules and not trusted(kind_of_module(name)):
                yield ("variables", name, self.entries(vars(sys.modules[name]), None, name))
        for variable in self.reads.variables:
            value = variable.get(MISSING)
            self.guards.variables.append((variable, value))
            yield (variable.name, None if value is MISSING else self.into(value, variable.name))
        for function in self.patches.users:
            yield self.into(function, function.__name__)
        yield ("patches", self.patches.number)
        for name in _HOOKS:
            yield self.into(vars(nn.modules.module)[name], name)
        for index, path in enumerate(self.paths):
            if path in self.reads.contents:
                tensor = self.tensors[index].detach()
                self.guards.contents.append((tensor, tensor.clone()))
                yield ("content", index, tensor.cpu().numpy().tobytes() if tensor.dtype != torch.bfloat16 else
                       tensor.cpu().float().numpy().tobytes())  # fmt: skip


_BY_TYPE: list[tuple[Any, Walker]] = [
    ((torch.jit.ScriptModule, torch.jit.ScriptFunction), walk_script),
    (Tensor, walk_tensor),
    (nn.Module, walk_module),
    (types.FunctionType, walk_function),
    (types.MethodType, walk_method),
    (functools.partial, walk_partial),
    (functools._lru_cache_wrapper, walk_cached),
    ((types.BuiltinFunctionType, types.MethodWrapperType), walk_builtin),
    (types.ModuleType, walk_python_module),
    (enum.EnumMeta, walk_class),
    (type, walk_class),
    ((property, staticmethod, classmethod), walk_descriptor),
    (enum.Enum, walk_enum_member),
    ((dict, types.MappingProxyType), walk_mapping),
    ((list, tuple, collections.deque), walk_sequence),
    ((set, frozenset), walk_set),
    ((np.ndarray, bytearray, memoryview, array.array), walk_buffer),
    (np.generic, walk_scalar),
    (FIXED, walk_fixed),
    (weakref.ref, walk_reference),
    (threading.local, walk_local),
    (contextvars.ContextVar, walk_identity),
    ((random.Random, np.random.Generator, np.random.RandomState, torch.Generator), walk_identity),
    (CODE_LIKE, walk_identity),
]

# (Weak: a class of a user's leads to all that its module holds, and a notebook makes a new one at each run of a cell.)
_WALKERS: weakref.WeakKeyDictionary[type, Walker] = weakref.WeakKeyDictionary()


def _walker_of(kind: type) -> Walker:
    """What describes a value of a type."""
    found = _WALKERS.get(kind)
    if found is None:
        found = next((walk for types_, walk in _BY_TYPE if issubclass(kind, types_)), walk_object)
        _WALKERS[kind] = found
    return found
