"""What each kind of value adds to the key of a walk: tensors, modules, containers, and the rest that is no code."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import re
import threading
import types
import uuid
import weakref
from collections.abc import Hashable
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..errors import StepError
from .reads import kind_of_module, trusted
from .walk import EXACT, Walk, attributes_of

# Values that are described by their text.
FIXED = (
    decimal.Decimal, fractions.Fraction, datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo, uuid.UUID,
    pathlib.PurePath, re.Pattern, np.dtype,
)  # fmt: skip


def walk_identity(walk: Walk, value: Any, path: str) -> Hashable:
    return ("object", walk.id_of(value))


def walk_fixed(walk: Walk, value: Any, path: str) -> Hashable:
    walk.facts.append((path, value))
    return (type(value), repr(value), hash(value))


def walk_tensor(walk: Walk, value: Tensor, path: str) -> Hashable:
    walk.tensors.append(value)
    walk.paths.append(path)
    walk.facts.append((path, f"{value.dtype} {tuple(value.shape)} requires_grad={value.requires_grad}"))
    described = ("tensor", type(value), value.shape, value.dtype, value.device, value.requires_grad)
    own = value.__dict__
    return (*described, walk.entries(own, walk.names, path)) if own else described


def walk_script(walk: Walk, value: Any, path: str) -> Hashable:
    # A tracer gets wrong gradients from its autograd formulas, without a word.
    raise StepError(
        f"the step uses TorchScript: {path or type(value).__name__}. It can't be captured; use the Python "
        "original (the module or function that was given to torch.jit.script or torch.jit.trace). "
        'backend="reference" runs it as it stands.'
    )


def walk_module(walk: Walk, module: nn.Module, path: str) -> Hashable:
    if type(module).__module__ == "torch._dynamo.eval_frame":
        return walk.into(module._orig_mod, path)  # a compiled module: the trace runs what it was made of
    ignored: frozenset[str] = getattr(type(module), "_capture_ignores", frozenset())
    return ("module", *walk.instance(module, path, ignored))


def walk_mapping(walk: Walk, value: dict[Any, Any], path: str) -> Hashable:
    walk.guards.watch(value, None, frozenset())
    if isinstance(value, collections.OrderedDict) and len(value) > 1:  # no dictionary counts changes of its order
        walk.guards.sequences.append((value, tuple(value)))
    found: list[Hashable] = [type(value)]
    for key, item in list(value.items()):
        label = walk.into(key, f"{path} (a key)") if type(key) not in EXACT else key
        found.append((label, walk.into(item, f"{path}[{key!r}]" if path else str(key), value, key)))
    return (*found, *_extra(walk, value, dict, path))


def walk_sequence(walk: Walk, value: Any, path: str) -> Hashable:
    kind: Any = type(value)
    if kind is not tuple:
        walk.guards.sequences.append((value, tuple(value)))
    hold = value if isinstance(value, list) else None
    items = [walk.into(v, f"{path}[{i}]", hold, i) for i, v in enumerate(value)]
    return (kind, *items, *_extra(walk, value, (list, tuple, collections.deque), path))


def walk_set(walk: Walk, value: Any, path: str) -> Hashable:
    walk.guards.sequences.append((value, tuple(value)))
    walk.facts.append((path, value))
    # The order in which a set is gone through is what a step sees of it.
    return (type(value), *(walk.into(v, f"{path} (a member)") for v in value))


def walk_buffer(walk: Walk, value: Any, path: str) -> Hashable:
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        walk.guards.sequences.append((value.reshape(-1), tuple(value.reshape(-1))))
        return ("array", value.shape, *(walk.into(v, path) for v in value.reshape(-1)))
    held = value.tobytes() if hasattr(value, "tobytes") else bytes(value)
    walk.guards.buffers.append((value, held))
    shape = (value.dtype.str, value.shape) if isinstance(value, np.ndarray) else ()
    return (type(value), *shape, held)


def walk_scalar(walk: Walk, value: Any, path: str) -> Hashable:
    walk.facts.append((path, value))
    return (type(value), value.tobytes())


def walk_method(walk: Walk, value: types.MethodType, path: str) -> Hashable:
    return ("method", walk.into(value.__self__, path), walk.into(value.__func__, path))


def walk_partial(walk: Walk, value: functools.partial[Any], path: str) -> Hashable:
    parts = (value.func, value.args, value.keywords)
    return ("partial", *(walk.into(p, path) for p in parts))


def walk_builtin(walk: Walk, value: Any, path: str) -> Hashable:
    owner = getattr(value, "__self__", None)
    if owner is None or isinstance(owner, (types.ModuleType, type)):
        return ("object", walk.id_of(value))
    return ("builtin", value.__name__, walk.into(owner, path))


def walk_python_module(walk: Walk, module: types.ModuleType, path: str) -> Hashable:
    if trusted(kind_of_module(module.__name__)):
        return ("object", walk.id_of(module))
    return ("python module", walk.id_of(module), walk.entries(vars(module), walk.names, path or module.__name__))


def walk_reference(walk: Walk, value: weakref.ref[Any], path: str) -> Hashable:
    target = value()
    walk.guards.references.append((value, target))
    return ("reference", walk.into(target, path))


def walk_cached(walk: Walk, value: Any, path: str) -> Hashable:
    """A function behind functools.lru_cache: what it holds by now is what it goes on giving."""
    known = value.cache_info()
    walk.guards.caches.append((value, (known.misses, known.currsize)))
    return ("cached", walk.into(value.__wrapped__, path))


def walk_local(walk: Walk, value: threading.local, path: str) -> Hashable:
    return ("local", walk.entries(value.__dict__, walk.names, path), walk.into(type(value), path))


def walk_enum_member(walk: Walk, value: enum.Enum, path: str) -> Hashable:
    walk.facts.append((path, value))
    return ("enum", walk.id_of(type(value)), value.name, walk.entries(value.__dict__, walk.names, path))


def walk_descriptor(walk: Walk, value: Any, path: str) -> Hashable:
    parts = (value.fget, value.fset) if isinstance(value, property) else (value.__func__,)
    return (type(value), *(walk.into(p, path) for p in parts))


def walk_object(walk: Walk, value: Any, path: str) -> Hashable:
    parts: list[Hashable] = ["object", *walk.instance(value, path)]
    for base in (int, float, str, bytes, complex):
        if isinstance(value, base):
            parts.append(base.__repr__(value))
    if len(parts) == 2 and attributes_of(value) is None:
        parts.append(walk.id_of(value))
    return tuple(parts)


def _extra(walk: Walk, value: Any, bases: Any, path: str) -> tuple[Hashable, ...]:
    """What a subclass of a container has beside what it contains."""
    if type(value) in (dict, list, tuple, collections.deque, collections.OrderedDict):
        return ()
    return walk.instance(value, path)
