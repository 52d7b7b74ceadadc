"""Modules by their id: all of a module that a graph of dynamo can hold (see `strict_export.py`)."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

_MODULES: WeakValueDictionary[int, Any] = WeakValueDictionary()


def register(module: Any) -> None:
    """Called from __new__, so that copies and unpickled ones are known too."""
    _MODULES[id(module)] = module


def module_of(number: int) -> Any:
    return _MODULES[number]
