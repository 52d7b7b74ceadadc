"""What classes and functions add to the key of a walk: their code, and the variables that it names."""

from __future__ import annotations

import sys
import types
from collections.abc import Hashable, Sequence
from typing import Any

from .guards import MISSING, contents
from .reads import globals_of, kind_of_file, kind_of_module, trusted
from .walk import NO_DATA, Walk

CODE_LIKE = (
    types.BuiltinFunctionType, types.MethodWrapperType, types.WrapperDescriptorType, types.MethodDescriptorType,
    types.GetSetDescriptorType, types.ClassMethodDescriptorType,
)  # fmt: skip


def walk_class(walk: Walk, cls: type, path: str) -> Hashable:
    parts: list[Hashable] = ["class", cls]
    meta = type(cls)
    if meta is not type and not trusted(kind_of_module(meta.__module__)):
        parts.append(walk.into(meta, meta.__name__))
    for base in cls.__mro__:
        if trusted(kind_of_module(base.__module__)):
            parts.append(_library_class(walk, base))
        else:
            parts.append(_own_class(walk, base))
    return tuple(parts)


def _own_class(walk: Walk, base: type) -> Hashable:
    number = walk.seen.get(-id(base))
    if number is not None:
        return ("class seen", number)
    walk.seen[-id(base)] = len(walk.seen)
    walk.guards.watch_class(base, walk.names, NO_DATA)
    found: list[Hashable] = [base]
    for name, item in list(vars(base).items()):
        special = name.startswith("__") and isinstance(item, (types.FunctionType, staticmethod, classmethod))
        if name not in NO_DATA and (special or walk.is_named(name)) and not isinstance(item, CODE_LIKE):
            if isinstance(item, types.MemberDescriptorType):
                continue  # a slot: its value is the instance's
            found.append((name, walk.into(item, f"{base.__name__}.{name}")))
    return tuple(found)


def _library_class(walk: Walk, base: type) -> Hashable:
    """A class of torch's or of Python's own: somebody may have put a method of theirs there."""
    number = walk.guards.classes[base] = walk.patches.class_number(base)
    users = walk.patches.users_of(base)
    return (base, number, *(walk.into(f, f"{base.__name__}.{f.__name__}") for f in users))


def walk_function(walk: Walk, function: types.FunctionType, path: str) -> Hashable:
    code = function.__code__
    walk.codes.add(code)
    walk.facts.append((path, code))
    parts: list[Hashable] = ["function", code]
    for name, cell in zip(code.co_freevars, function.__closure__ or ()):
        held = contents(cell)
        if name != "__class__":  # what super() reads; no code changes it
            walk.guards.cells.append((cell, held))
        if held is not MISSING:
            parts.append(walk.into(held, name, cell))
    if function.__dict__:
        parts.append(walk.entries(function.__dict__, None, path))
    if trusted(kind_of_file(code.co_filename)):
        return (*parts, walk.id_of(function)) if function.__closure__ else tuple(parts)
    if not function.__dict__:
        walk.guards.watch(function.__dict__, None, frozenset())
    walk.guards.functions.append(function)
    parts.append(walk.into(function.__defaults__, f"{path} (a default)"))
    parts.append(walk.into(function.__kwdefaults__, f"{path} (a default)"))
    parts.append(variables_of(walk, code, function.__globals__))
    return tuple(parts)


def variables_of(walk: Walk, code: types.CodeType, variables: dict[str, Any]) -> Hashable:
    """What code takes from its module and from those that it imports."""
    named = globals_of(code)
    walk.guards.watch_entries(variables, named.names)
    parts: list[Hashable] = []
    for name in named.names:
        value = variables.get(name, MISSING)
        if value is MISSING:
            continue
        if isinstance(value, types.ModuleType):
            parts.append((name, _attributes_of(walk, value, name, named.attributes)))
        else:
            parts.append((name, walk.into(value, name, variables, name)))
    for name in named.imports:
        module = sys.modules.get(name)
        walk.guards.watch_entries(sys.modules, (name,))
        if module is not None:
            parts.append((name, _attributes_of(walk, module, name, named.attributes)))
    return tuple(parts)


def _attributes_of(walk: Walk, module: types.ModuleType, path: str, names: Sequence[str]) -> Hashable:
    """Variables of a module that a function names."""
    variables = vars(module)
    library = trusted(kind_of_module(module.__name__))
    names = [n for n in (variables if walk.names is None and not library else names) if n not in NO_DATA]
    walk.guards.watch_entries(variables, names if not library else [n for n in names if n in variables])
    found: list[Hashable] = [walk.id_of(module)]
    for name in names:
        value = variables.get(name, MISSING)
        if value is MISSING or value is sys.modules:
            continue
        if library and isinstance(value, types.ModuleType):
            if id(value) not in walk.seen:
                walk.seen[id(value)] = len(walk.seen)
                found.append((name, _attributes_of(walk, value, f"{path}.{name}", names)))
        elif library and isinstance(value, types.BuiltinFunctionType):
            found.append((name, walk.id_of(value)))
        else:
            found.append((name, walk.into(value, f"{path}.{name}", variables, name)))
    return tuple(found)
