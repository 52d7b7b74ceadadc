"""What a captured step depended on, described so that a later call can tell whether it still holds.

A capture bakes in everything that is Python: numbers and strings that the step reads, the functions that it calls, the
modes of its modules. The walk below starts at the step (and at what a call gives it that is no tensor) and follows what
the step's code can have read, as `reads.py` tells it: attributes that the code names, globals that its functions name,
what closures hold, containers whole. All of it becomes one hashable key. Tensors stand in it by their metadata only,
and are found again by their place in the walk: a parameter that was replaced, or another closure of the same code, uses
the same capture with its own tensors. Python floats stand apart, so that one that changes can become an input.

A walk takes some microseconds for each object. `guards.py` tells quickly whether a new one would find the same.
"""

from __future__ import annotations

import array
import collections
import contextvars
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import random
import re
import sys
import threading
import types
import uuid
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from ..errors import StepError
from .guards import MISSING, Guards, contents
from .patches import patches_of
from .reads import Reads, globals_of, kind_of_file, kind_of_module, trusted

# Values that are described by what they hold. Floats and what prints like them are told apart by their text.
_EXACT = frozenset({
    type(None), bool, int, str, bytes, type(...), type(NotImplemented), torch.dtype, torch.device, torch.Size,
    torch.layout, torch.memory_format, range,
})  # fmt: skip
_BY_TEXT = frozenset({complex, slice})
_FIXED = (
    decimal.Decimal, fractions.Fraction, datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo, uuid.UUID,
    pathlib.PurePath, re.Pattern, np.dtype,
)  # fmt: skip
_CODE_LIKE = (
    types.BuiltinFunctionType, types.MethodWrapperType, types.WrapperDescriptorType, types.MethodDescriptorType,
    types.GetSetDescriptorType, types.ClassMethodDescriptorType,
)  # fmt: skip
_HOOKS = [n for n, v in vars(nn.modules.module).items() if n.startswith("_global_") and isinstance(v, dict)]
# In every class or module, and never what a step reads to compute with.
_NO_DATA = frozenset(
    "__dict__ __weakref__ __module__ __doc__ __annotations__ __slots__ __abstractmethods__ _abc_impl __builtins__ "
    "__loader__ __spec__ __qualname__ __firstlineno__ __static_attributes__ __orig_bases__ __parameters__".split()
)


def ambient() -> Hashable:
    """Settings of torch that change what a step computes."""
    device = "cuda" if torch.cuda.is_initialized() else "cpu"
    return (
        torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled(device), torch.get_autocast_dtype(device),
        torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(), function_modes(),
    )  # fmt: skip


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


def function_modes() -> tuple[Any, ...]:
    """The modes that change what torch's functions do, as torch.set_default_device is one; without the tracer's own."""
    count = torch._C._len_torch_function_stack()
    if not count:
        return ()
    modes = [torch._C._get_function_stack_at(i) for i in range(count)]
    devices = [m.device if isinstance(m, DeviceContext) else m for m in modes]
    return tuple(m for m in devices if not getattr(m, "belongs_to_a_trace", False))


class Dependencies:
    """One walk: its key, and the tensors that it met, each once, in order.

    roots: (value, path, what holds it, where in that) of each object where it begins.
    floats: the Python floats that the key leaves out.  facts: (path, value) of other plain values, for messages.
    codes: the code of the functions that it met.  iterators: those that it met.
    """

    def __init__(self, roots: Sequence[tuple[Any, str, Any, Any]], reads: Reads):
        self.reads = reads
        self.tensors: list[Tensor] = []
        self.paths: list[str] = []
        self.floats: list[Number] = []
        self.facts: list[tuple[str, Any]] = []
        self.codes: set[types.CodeType] = set()
        self.pinned: list[Any] = []  # objects that the key names by their id, which must not be given away
        self.program: Any = None
        self._guards = Guards()
        self._names = reads.names
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []
        self._patches = patches_of(reads.library)
        self.key: Hashable = (*(self._walk(*root) for root in roots), *self._beside())
        self._guards.settle(self.tensors, self._patches)
        # Whether a new walk would give the same key, the same floats and the same tensors.
        self.unchanged: Callable[[], bool] = self._guards.unchanged
        self._seen.clear()

    @property
    def caches(self) -> bool:
        """Whether functions are among them that keep what they gave."""
        return bool(self._guards.caches)

    def float_values(self) -> dict[str, float]:
        """The floats by their paths."""
        return {number.path: number.value for number in self.floats}

    # -- what no root leads to ---------------------------------------------------------------------------

    def _beside(self) -> Iterator[Hashable]:
        for reference in self.reads.functions:
            function = reference()
            yield None if function is None else self._walk(function, function.__name__)
        for code, module in sorted(self.reads.loose, key=lambda pair: (pair[1], pair[0].co_name)):
            yield (code, self._globals(code, vars(sys.modules[module])) if module in sys.modules else ())
        for name in sorted(self.reads.modules):
            if name in sys.modules and not trusted(kind_of_module(name)):
                yield ("variables", name, self._subset(vars(sys.modules[name]), None, name))
        for variable in self.reads.variables:
            value = variable.get(MISSING)
            self._guards.variables.append((variable, value))
            yield (variable.name, None if value is MISSING else self._walk(value, variable.name))
        for function in self._patches.users:
            yield self._walk(function, function.__name__)
        yield ("patches", self._patches.number)
        for name in _HOOKS:
            yield self._walk(vars(nn.modules.module)[name], name)
        for index, path in enumerate(self.paths):
            if path in self.reads.contents:
                tensor = self.tensors[index].detach()
                self._guards.contents.append((tensor, tensor.clone()))
                yield ("content", index, tensor.cpu().numpy().tobytes() if tensor.dtype != torch.bfloat16 else
                       tensor.cpu().float().numpy().tobytes())  # fmt: skip

    # -- the walk ----------------------------------------------------------------------------------------

    def _walk(self, value: Any, path: str, hold: Any = None, at: Any = None) -> Hashable:
        kind = type(value)
        if kind is float:
            self.facts.append((path, value))
            self.floats.append(Number(path, value, hold, at))
            return ("float", len(self.floats))
        if kind in _EXACT:
            self.facts.append((path, value))
            return (kind, value)
        if kind in _BY_TEXT:
            self.facts.append((path, value))
            return (kind, repr(value))
        number = self._seen.get(id(value))
        if number is not None:
            return ("seen", number)
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        return _walker(kind)(self, value, path)

    def _id(self, value: Any) -> int:
        """An object's id as part of the key: it must stay taken as long as the key is known."""
        self.pinned.append(value)
        return id(value)

    def _named(self, name: Any) -> bool:
        return self._names is None or not isinstance(name, str) or name in self._names

    def _identity(self, value: Any, path: str) -> Hashable:
        return ("object", self._id(value))

    def _fixed(self, value: Any, path: str) -> Hashable:
        self.facts.append((path, value))
        return (type(value), repr(value), hash(value))

    def _tensor(self, value: Tensor, path: str) -> Hashable:
        self.tensors.append(value)
        self.paths.append(path)
        self.facts.append((path, f"{value.dtype} {tuple(value.shape)} requires_grad={value.requires_grad}"))
        described = ("tensor", type(value), value.shape, value.dtype, value.device, value.requires_grad)
        own = value.__dict__
        return (*described, self._subset(own, self._names, path)) if own else described

    def _script(self, value: Any, path: str) -> Hashable:
        # A tracer gets wrong gradients from its autograd formulas, without a word.
        raise StepError(
            f"the step uses TorchScript: {path or type(value).__name__}. It can't be captured; use the Python "
            "original (the module or function that was given to torch.jit.script or torch.jit.trace). "
            'backend="reference" runs it as it stands.'
        )

    def _module(self, module: nn.Module, path: str) -> Hashable:
        if type(module).__module__ == "torch._dynamo.eval_frame":
            return self._walk(module._orig_mod, path)  # a compiled module: the trace runs what it was made of
        ignored = getattr(type(module), "_capture_ignores", frozenset())
        return ("module", *self._instance(module, path, ignored))

    def _instance(self, value: Any, path: str, ignored: frozenset[str] = frozenset()) -> tuple[Hashable, ...]:
        """The class of an object and the attributes of it that are named."""
        self._guards.objects.append((value, type(value)))
        parts: list[Hashable] = [self._walk(type(value), type(value).__name__)]
        attributes = attributes_of(value)
        if attributes is not None:
            parts.append(self._subset(attributes, self._names, path, ignored))
        for slot in slots_of(type(value)):
            if self._named(slot):
                found = getattr(value, slot, MISSING)
                self._guards.slots.append((value, slot, found))
                if found is not MISSING:
                    parts.append((slot, self._walk(found, f"{path}.{slot}")))
        return tuple(parts)

    def _subset(
        self, where: dict, names: frozenset[str] | None, path: str, ignored: frozenset[str] = frozenset()
    ) -> Hashable:
        """The entries of a dictionary of attributes that are named (None: all)."""
        self._guards.watch(where, names, ignored)
        found: list[Hashable] = []
        for key, item in list(where.items()):
            if key in ignored or (isinstance(key, str) and key.startswith("_steploop")) or key in _NO_DATA:
                continue
            if names is None or key in names:
                found.append((key, self._walk(item, f"{path}.{key}" if path else str(key), where, key)))
        return tuple(found)

    def _mapping(self, value: dict, path: str) -> Hashable:
        self._guards.watch(value, None, frozenset())
        if isinstance(value, collections.OrderedDict) and len(value) > 1:  # no dictionary counts changes of its order
            self._guards.sequences.append((value, tuple(value)))
        found: list[Hashable] = [type(value)]
        for key, item in list(value.items()):
            label = self._walk(key, f"{path} (a key)") if type(key) not in _EXACT else key
            found.append((label, self._walk(item, f"{path}[{key!r}]" if path else str(key), value, key)))
        return (*found, *self._extra(value, dict, path))

    def _sequence(self, value: Any, path: str) -> Hashable:
        kind = type(value)
        if kind is not tuple:
            self._guards.sequences.append((value, tuple(value)))
        hold = value if isinstance(value, list) else None
        items = [self._walk(v, f"{path}[{i}]", hold, i) for i, v in enumerate(value)]
        return (kind, *items, *self._extra(value, (list, tuple, collections.deque), path))

    def _set(self, value: Any, path: str) -> Hashable:
        self._guards.sequences.append((value, tuple(value)))
        self.facts.append((path, value))
        # The order in which a set is gone through is what a step sees of it.
        return (type(value), *(self._walk(v, f"{path} (a member)") for v in value))

    def _extra(self, value: Any, bases: Any, path: str) -> tuple[Hashable, ...]:
        """What a subclass of a container has beside what it contains."""
        if type(value) in (dict, list, tuple, collections.deque, collections.OrderedDict):
            return ()
        return self._instance(value, path)

    def _buffer(self, value: Any, path: str) -> Hashable:
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            self._guards.sequences.append((value.reshape(-1), tuple(value.reshape(-1))))
            return ("array", value.shape, *(self._walk(v, path) for v in value.reshape(-1)))
        held = value.tobytes() if hasattr(value, "tobytes") else bytes(value)
        self._guards.buffers.append((value, held))
        shape = (value.dtype.str, value.shape) if isinstance(value, np.ndarray) else ()
        return (type(value), *shape, held)

    def _scalar(self, value: Any, path: str) -> Hashable:
        self.facts.append((path, value))
        return (type(value), value.tobytes())

    def _bound(self, value: types.MethodType, path: str) -> Hashable:
        return ("method", self._walk(value.__self__, path), self._walk(value.__func__, path))

    def _partial(self, value: functools.partial, path: str) -> Hashable:
        parts = (value.func, value.args, value.keywords)
        return ("partial", *(self._walk(p, path) for p in parts))

    def _builtin(self, value: Any, path: str) -> Hashable:
        owner = getattr(value, "__self__", None)
        if owner is None or isinstance(owner, (types.ModuleType, type)):
            return ("object", self._id(value))
        return ("builtin", value.__name__, self._walk(owner, path))

    def _python_module(self, module: types.ModuleType, path: str) -> Hashable:
        if trusted(kind_of_module(module.__name__)):
            return ("object", self._id(module))
        return ("python module", self._id(module), self._subset(vars(module), self._names, path or module.__name__))

    def _reference(self, value: weakref.ref, path: str) -> Hashable:
        target = value()
        self._guards.references.append((value, target))
        return ("reference", self._walk(target, path))

    def _cached(self, value: Any, path: str) -> Hashable:
        """A function behind functools.lru_cache: what it holds by now is what it goes on giving."""
        known = value.cache_info()
        self._guards.caches.append((value, (known.misses, known.currsize)))
        return ("cached", self._walk(value.__wrapped__, path))

    def _local(self, value: threading.local, path: str) -> Hashable:
        return ("local", self._subset(value.__dict__, self._names, path), self._walk(type(value), path))

    def _member(self, value: enum.Enum, path: str) -> Hashable:
        self.facts.append((path, value))
        return ("enum", self._id(type(value)), value.name, self._subset(value.__dict__, self._names, path))

    def _generator(self, value: Any, path: str) -> Hashable:
        return ("generator", self._id(value))

    def _property(self, value: Any, path: str) -> Hashable:
        parts = (value.fget, value.fset) if isinstance(value, property) else (value.__func__,)
        return (type(value), *(self._walk(p, path) for p in parts))

    def _object(self, value: Any, path: str) -> Hashable:
        parts: list[Hashable] = ["object", *self._instance(value, path)]
        for base in (int, float, str, bytes, complex):
            if isinstance(value, base):
                parts.append(base.__repr__(value))
        if len(parts) == 2 and attributes_of(value) is None:
            parts.append(self._id(value))
        return tuple(parts)

    # -- classes and functions ---------------------------------------------------------------------------

    def _class(self, cls: type, path: str) -> Hashable:
        parts: list[Hashable] = ["class", cls]
        meta = type(cls)
        if meta is not type and not trusted(kind_of_module(meta.__module__)):
            parts.append(self._walk(meta, meta.__name__))
        for base in cls.__mro__:
            if trusted(kind_of_module(base.__module__)):
                parts.append(self._library_class(base))
            else:
                parts.append(self._own_class(base))
        return tuple(parts)

    def _own_class(self, base: type) -> Hashable:
        number = self._seen.get(-id(base))
        if number is not None:
            return ("class seen", number)
        self._seen[-id(base)] = len(self._seen)
        self._guards.watch_class(base, self._names, _NO_DATA)
        found: list[Hashable] = [base]
        for name, item in list(vars(base).items()):
            special = name.startswith("__") and isinstance(item, (types.FunctionType, staticmethod, classmethod))
            if name not in _NO_DATA and (special or self._named(name)) and not isinstance(item, _CODE_LIKE):
                if isinstance(item, types.MemberDescriptorType):
                    continue  # a slot: its value is the instance's
                found.append((name, self._walk(item, f"{base.__name__}.{name}")))
        return tuple(found)

    def _library_class(self, base: type) -> Hashable:
        """A class of torch's or of Python's own: somebody may have put a method of theirs there."""
        number = self._guards.classes[base] = self._patches.class_number(base)
        users = self._patches.users_of(base)
        return (base, number, *(self._walk(f, f"{base.__name__}.{f.__name__}") for f in users))

    def _function(self, function: types.FunctionType, path: str) -> Hashable:
        code = function.__code__
        self.codes.add(code)
        self.facts.append((path, code))
        parts: list[Hashable] = ["function", code]
        for name, cell in zip(code.co_freevars, function.__closure__ or ()):
            held = contents(cell)
            if name != "__class__":  # what super() reads; no code changes it
                self._guards.cells.append((cell, held))
            if held is not MISSING:
                parts.append(self._walk(held, name, cell))
        if function.__dict__:
            parts.append(self._subset(function.__dict__, None, path))
        if trusted(kind_of_file(code.co_filename)):
            return (*parts, self._id(function)) if function.__closure__ else tuple(parts)
        if not function.__dict__:
            self._guards.watch(function.__dict__, None, frozenset())
        self._guards.functions.append(function)
        parts.append(self._walk(function.__defaults__, f"{path} (a default)"))
        parts.append(self._walk(function.__kwdefaults__, f"{path} (a default)"))
        parts.append(self._globals(code, function.__globals__))
        return tuple(parts)

    def _globals(self, code: types.CodeType, variables: dict) -> Hashable:
        """What code takes from its module and from those that it imports."""
        named = globals_of(code)
        self._guards.watch_entries(variables, named.names)
        parts: list[Hashable] = []
        for name in named.names:
            value = variables.get(name, MISSING)
            if value is MISSING:
                continue
            if isinstance(value, types.ModuleType):
                parts.append((name, self._attributes_of(value, name, named.attributes)))
            else:
                parts.append((name, self._walk(value, name, variables, name)))
        for name in named.imports:
            module = sys.modules.get(name)
            self._guards.watch_entries(sys.modules, (name,))
            if module is not None:
                parts.append((name, self._attributes_of(module, name, named.attributes)))
        return tuple(parts)

    def _attributes_of(self, module: types.ModuleType, path: str, names: Sequence[str]) -> Hashable:
        """Variables of a module that a function names."""
        variables = vars(module)
        library = trusted(kind_of_module(module.__name__))
        names = [n for n in (variables if self._names is None and not library else names) if n not in _NO_DATA]
        self._guards.watch_entries(variables, names if not library else [n for n in names if n in variables])
        found: list[Hashable] = [self._id(module)]
        for name in names:
            value = variables.get(name, MISSING)
            if value is MISSING or value is sys.modules:
                continue
            if library and isinstance(value, types.ModuleType):
                if id(value) not in self._seen:
                    self._seen[id(value)] = len(self._seen)
                    found.append((name, self._attributes_of(value, f"{path}.{name}", names)))
            elif library and isinstance(value, types.BuiltinFunctionType):
                found.append((name, self._id(value)))
            else:
                found.append((name, self._walk(value, f"{path}.{name}", variables, name)))
        return tuple(found)


def attributes_of(value: Any) -> dict | None:
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


_W = Dependencies
_BY_TYPE: list[tuple[Any, Callable[[Dependencies, Any, str], Hashable]]] = [
    ((torch.jit.ScriptModule, torch.jit.ScriptFunction), _W._script),
    (Tensor, _W._tensor),
    (nn.Module, _W._module),
    (types.FunctionType, _W._function),
    (types.MethodType, _W._bound),
    (functools.partial, _W._partial),
    (functools._lru_cache_wrapper, _W._cached),
    ((types.BuiltinFunctionType, types.MethodWrapperType), _W._builtin),
    (types.ModuleType, _W._python_module),
    (enum.EnumMeta, _W._class),
    (type, _W._class),
    ((property, staticmethod, classmethod), _W._property),
    (enum.Enum, _W._member),
    ((dict, types.MappingProxyType), _W._mapping),
    ((list, tuple, collections.deque), _W._sequence),
    ((set, frozenset), _W._set),
    ((np.ndarray, bytearray, memoryview, array.array), _W._buffer),
    (np.generic, _W._scalar),
    (_FIXED, _W._fixed),
    (weakref.ref, _W._reference),
    (threading.local, _W._local),
    (contextvars.ContextVar, _W._identity),
    ((random.Random, np.random.Generator, np.random.RandomState, torch.Generator), _W._identity),
    (_CODE_LIKE, _W._identity),
]


# (Weak: a class of a user's leads to all that its module holds, and a notebook makes a new one at each run of a cell.)
_WALKERS: weakref.WeakKeyDictionary[type, Callable[[Dependencies, Any, str], Hashable]] = weakref.WeakKeyDictionary()


def _walker(kind: type) -> Callable[[Dependencies, Any, str], Hashable]:
    found = _WALKERS.get(kind)
    if found is None:
        found = next((walk for types_, walk in _BY_TYPE if issubclass(kind, types_)), _W._object)
        _WALKERS[kind] = found
    return found
