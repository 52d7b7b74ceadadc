"""What a captured step depended on, and whether that has changed.

A capture bakes in everything Python: numbers and strings that the step reads, which modules and functions it
calls, train or eval mode, autocast. The walk below starts at the step and follows attributes, closures and
the globals that functions name, and describes all of it as one hashable key. Tensors are described by their
metadata and found again by their place in the walk, so a parameter that was replaced, or another closure of
the same code, uses the same capture with its own tensors.

A walk takes some tens of microseconds per module; `unchanged` looks only at whether the same objects still
stand where the walk found them.
"""

from __future__ import annotations

import dis
import enum
import functools
import random
import sys
import sysconfig
import types
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from ..errors import StepError
from .watch import Watch, Watched, make_watch

_VALUES = (
    type(None), bool, int, float, complex, str, bytes, type(...), torch.dtype, torch.device,
    torch.Size, torch.layout, torch.memory_format, range, slice,
)  # fmt: skip
_LIBRARY = tuple(
    path for name in ("stdlib", "platstdlib", "purelib", "platlib") if (path := sysconfig.get_paths().get(name))
)
_SKIPPED_ATTRIBUTES = {
    "_non_persistent_buffers_set", "_is_full_backward_hook", "_backward_pre_hooks", "_backward_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
}  # fmt: skip
_MISSING = object()


def ambient() -> Hashable:
    """Settings of torch that change what a step computes."""
    device = "cuda" if torch.cuda.is_initialized() else "cpu"
    return (
        torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled(device), torch.get_autocast_dtype(device),
        torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(), function_modes(),
    )  # fmt: skip


def function_modes() -> tuple[Any, ...]:
    """The modes that change what torch's functions do, as torch.set_default_device is one; without the tracer's own."""
    count = torch._C._len_torch_function_stack()
    if not count:
        return ()
    modes = [torch._C._get_function_stack_at(i) for i in range(count)]
    devices = [m.device if isinstance(m, DeviceContext) else m for m in modes]
    return tuple(m for m in devices if not getattr(m, "belongs_to_a_trace", False))


class Dependencies:
    """One walk from a root: its key, and the tensors it met, each once, in order.

    places: (where, key, value, path) of everything found in a dictionary, for `unchanged` and `changes`.
    """

    def __init__(self, root: Any):
        self.tensors: list[Tensor] = []
        self.paths: list[str] = []
        self.places: list[tuple[dict, Any, Any, str]] = []
        self._class_places: list[tuple[type, str, Any]] = []
        self._lists: list[tuple[list, tuple]] = []
        self._cells: list[tuple[types.CellType, Any]] = []
        self._lengths: list[tuple[dict, int]] = []
        self._arrays: list[np.ndarray] = []
        self._generators: list[Any] = []
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []
        self.program: Any = None
        self.pinned: list[Any] = []  # objects that the key names by their id, which must not be given away
        self.key: Hashable = self._walk(root, "")
        self._metadata = [_metadata(t) for t in self.tensors]
        self._watched: list[Watched] | None = None
        self._watch: Watch | None = None
        self._held: list[tuple[Tensor, str, Tensor, int]] = []
        self._seen.clear()

    def unchanged(self) -> bool:
        """Whether a new walk would give the same key and the same tensors."""
        if self._arrays:
            return False
        if self._watch is not None and self._watch.same() and self._lists_unchanged():
            return True
        if self._watched is None:
            if any(where.get(key, _MISSING) is not value for where, key, value, _ in self.places):
                return False
            if any(len(where) != length for where, length in self._lengths):
                return False
            self._watched = self._prepared()
        if not self._all_unchanged():
            return False
        self._watch = make_watch(self._watched, self._class_places, self._cells, self.tensors)
        return True

    def _all_unchanged(self) -> bool:
        """Looks at everything."""
        if not all(watched.unchanged() for watched in self._watched):
            return False
        for cls, name, value in self._class_places:
            if vars(cls).get(name, _MISSING) is not value:
                return False
        for cell, value in self._cells:
            if _contents(cell) is not value:
                return False
        for tensor, metadata in zip(self.tensors, self._metadata):
            if _metadata(tensor) != metadata:
                return False
        return self._lists_unchanged()

    def _lists_unchanged(self) -> bool:
        for found, copy in self._lists:
            if len(found) != len(copy) or any(a is not b for a, b in zip(found, copy)):
                return False
        return True

    def _prepared(self) -> list[Watched]:
        """What `unchanged` looks at in dictionaries.

        A dictionary that was walked whole is compared whole, by the ids of what it holds (which a copy keeps
        taken): values that compare equal may still be computed with differently, as 1 and 1.0 are.
        """
        found: dict[int, Watched] = {}
        for where, length in self._lengths:
            found.setdefault(id(where), Watched(where)).length = length
        for where, key, value, _ in self.places:
            watched = found.setdefault(id(where), Watched(where))
            if type(where) is not dict or watched.length is None:
                watched.entries.append((key, value))
            elif watched.ids is None:
                watched.ids = [*map(id, where), *map(id, where.values())]
                self._alive.append(dict(where))
        return list(found.values())

    def watch(self) -> None:
        """Remembers where the memory of every tensor is, for `changes`."""
        self._held = [(t, p, t.data, t._version) for t, p in zip(self.tensors, self.paths) if _has_version(t)]

    def random_states(self) -> list[Any]:
        """The states of Python's and numpy's random generators, those among the objects that the walk met too."""
        return [_state_of(g) for g in (random, np.random, *self._generators)]

    def changes(self) -> list[str]:
        """The paths of Python values that are not what the walk found; puts them back."""
        found = []
        for tensor, path, held, version in self._held:
            if not _same_memory(tensor, held) or tensor._version != version:
                found.append(f"the tensor {path}")
                tensor.data = held
        self._held = []
        for where, key, value, path in self.places:
            now = where.get(key, _MISSING)
            if now is not value and not (type(now) is type(value) and _equal(now, value)):
                found.append(path)
                where[key] = value
        for cls, name, value in self._class_places:
            if vars(cls).get(name, _MISSING) is not value and not _equal(vars(cls).get(name, _MISSING), value):
                found.append(f"{cls.__name__}.{name}")
                setattr(cls, name, value)
        for held, copy in self._lists:
            if len(held) != len(copy) or any(a is not b for a, b in zip(held, copy)):
                found.append("a list that the step reads")
                held[:] = copy
        for where, length in self._lengths:
            if len(where) != length:
                known = {key for place, key, _, _ in self.places if place is where}
                new = [k for k in where if k not in known and k not in _SKIPPED_ATTRIBUTES]
                found.extend(str(k) for k in new)
                for key in new:
                    del where[key]
        for cell, value in self._cells:
            if _contents(cell) is not value and not _equal(_contents(cell), value):
                found.append("a variable of an enclosing function")
                cell.cell_contents = value
        return found

    # -- the walk ------------------------------------------------------------------------------------------

    def _walk(self, value: Any, path: str) -> Hashable:
        if isinstance(value, _VALUES):
            return (type(value), repr(value) if isinstance(value, (float, complex, slice)) else value)
        number = self._seen.get(id(value))
        if number is not None:
            return ("seen", number)
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        if isinstance(value, Tensor):
            self.tensors.append(value)
            self.paths.append(path)
            return ("tensor", _metadata(value))
        if isinstance(value, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
            # A tracer gets wrong gradients from its autograd formulas, without a word.
            raise StepError(
                f"the step uses TorchScript: {path or type(value).__name__}. It can't be captured; use the Python "
                "original (the module or function that was given to torch.jit.script or torch.jit.trace). "
                'backend="reference" runs it as it stands.'
            )
        if isinstance(value, nn.Module):
            compiled = type(value).__module__ == "torch._dynamo.eval_frame"
            return self._walk(value._orig_mod, path) if compiled else self._module(value, path)
        if isinstance(value, dict):
            return self._dict(value, path)
        if isinstance(value, list):
            self._lists.append((value, tuple(value)))
            return ("list", *(self._walk(v, f"{path}[{i}]") for i, v in enumerate(value)))
        if isinstance(value, tuple):
            return (type(value), *(self._walk(v, f"{path}[{i}]") for i, v in enumerate(value)))
        if isinstance(value, (set, frozenset)):
            return (type(value), frozenset(value) if all(isinstance(v, _VALUES) for v in value) else self._id(value))
        if isinstance(value, types.FunctionType):
            return self._function(value, path)
        if isinstance(value, types.MethodType):
            return ("method", self._walk(value.__self__, path), self._walk(value.__func__, path))
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return ("partial", *(self._walk(p, path) for p in parts))
        if isinstance(value, type):
            return self._class(value, path)
        if isinstance(value, enum.Enum):
            return (type(value), value.name)
        if isinstance(value, (random.Random, np.random.Generator, np.random.RandomState)):
            self._generators.append(value)
            return ("generator", self._id(value))
        if isinstance(value, np.ndarray):
            self._arrays.append(value)
            return ("array", value.dtype.str, value.shape, value.tobytes())
        if isinstance(value, (types.ModuleType, types.BuiltinFunctionType)):
            return ("object", self._id(value))
        return self._object(value, path)

    def _id(self, value: Any) -> int:
        """An object's id as part of the key: it must stay taken as long as the key is known."""
        self.pinned.append(value)
        return id(value)

    def _dict(self, value: dict, path: str, skip: set[str] = frozenset()) -> Hashable:
        self._lengths.append((value, len(value)))
        found: list[Hashable] = []
        for key, item in list(value.items()):
            if key in skip or (isinstance(key, str) and key.startswith("_steploop")):
                continue
            where = f"{path}.{key}" if path else str(key)
            self.places.append((value, key, item, where))
            label = key if isinstance(key, _VALUES) else self._id(key)
            found.append((label, self._walk(item, where)))
        return ("dict", *found)

    def _module(self, module: nn.Module, path: str) -> Hashable:
        skip = _SKIPPED_ATTRIBUTES | getattr(type(module), "_capture_ignores", frozenset())
        return ("module", self._walk(type(module), path), self._dict(module.__dict__, path, skip))

    def _class(self, cls: type, path: str) -> Hashable:
        if _is_library(getattr(sys.modules.get(cls.__module__), "__file__", None)):
            return ("class", cls)
        parts: list[Hashable] = ["class", cls]
        for base in cls.__mro__:
            if _is_library(getattr(sys.modules.get(base.__module__), "__file__", None)) or base is object:
                continue
            for name, item in vars(base).items():
                function = _function_of(item)
                path = f"{base.__name__}.{name}"
                if function is not None:
                    parts.append((name, type(item), self._function(function, path)))
                elif isinstance(item, (*_VALUES, list, dict, tuple, Tensor)) and not name.startswith("__"):
                    parts.append((name, type(item), self._walk(item, path)))
                else:
                    continue
                self._class_places.append((base, name, item))
        return tuple(parts)

    def _function(self, function: types.FunctionType, path: str) -> Hashable:
        code = function.__code__
        if _is_library(code.co_filename):
            return ("function", code, self._id(function) if function.__closure__ else None)
        parts: list[Hashable] = ["function", code]
        for name, cell in zip(code.co_freevars, function.__closure__ or ()):
            contents = _contents(cell)
            if name != "__class__":  # what super() reads; no code changes it
                self._cells.append((cell, contents))
            if contents is not _MISSING:
                parts.append(self._walk(contents, path))
        parts.append(self._walk(function.__defaults__, path))
        parts.append(self._walk(function.__kwdefaults__, path))
        names = _names(code)
        for name in _global_names(code):
            if name in function.__globals__:
                value = function.__globals__[name]
                self.places.append((function.__globals__, name, value, name))
                parts.append((name, self._global(value, name, names)))
        return tuple(parts)

    def _global(self, value: Any, name: str, names: tuple[str, ...]) -> Hashable:
        if not isinstance(value, types.ModuleType):
            return self._walk(value, name)
        if _is_library(getattr(value, "__file__", None)):
            return ("object", self._id(value))
        found: list[Hashable] = ["python module", self._id(value)]
        for attribute in names:
            if attribute in vars(value) and id(vars(value)[attribute]) not in self._seen:
                item = vars(value)[attribute]
                self.places.append((vars(value), attribute, item, f"{name}.{attribute}"))
                found.append((attribute, self._walk(item, f"{name}.{attribute}")))
        return tuple(found)

    def _object(self, value: Any, path: str) -> Hashable:
        parts: list[Hashable] = ["object", self._walk(type(value), path)]
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            parts.append(self._dict(attributes, path))
        slots = [s for c in type(value).__mro__ for s in _slots(c)]
        for slot in slots:
            if hasattr(value, slot):
                parts.append((slot, self._walk(getattr(value, slot), f"{path}.{slot}")))
                self._arrays.append(np.empty(0))  # a slot can't be watched: walk again at every call
        if attributes is None and not slots:
            parts.append(self._id(value))
        return tuple(parts)


def _function_of(item: Any) -> types.FunctionType | None:
    """The function behind a method, a static or class method, or a property."""
    item = getattr(item, "__func__", item) if isinstance(item, (staticmethod, classmethod)) else item
    item = item.fget if isinstance(item, property) else item
    return item if isinstance(item, types.FunctionType) else None


def _has_version(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_inference()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    try:
        return a.data_ptr() == b.data_ptr()
    except RuntimeError:  # one of them was made by a tracer
        return False


def same_states(a: Any, b: Any) -> bool:
    """Whether two states of random generators are equal."""
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same_states(x, y) for x, y in zip(a, b))
    if isinstance(a, dict):
        return all(same_states(a[k], b[k]) for k in a)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state() if hasattr(generator, "get_state") else generator.getstate()


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    slots = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(s for s in slots if s not in ("__dict__", "__weakref__"))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, _VALUES) and isinstance(b, _VALUES):
        return a == b or (a != a and b != b)
    return a is b


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """Names that a code object and those inside it look up as globals; an attribute of that name is another thing."""
    found = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found.extend(_global_names(constant))
    return tuple(dict.fromkeys(found))


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Names that a code object and those inside it look up as globals or attributes."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.extend(_names(constant))
    return tuple(dict.fromkeys(names))


@functools.lru_cache(maxsize=4096)
def _is_library(filename: str | None) -> bool:
    """Code that does not change under a running program: the standard library, installed packages, ourselves."""
    if filename is None or filename.startswith("<frozen"):
        return True
    if filename.startswith("<"):
        return False
    here = __file__.rsplit("/", 2)[0]
    return filename.startswith(_LIBRARY) or (filename.startswith(here) and "/nn/" not in filename)


def _metadata(tensor: Tensor) -> Hashable:
    return (type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)
