"""The tensors that a function or module can reach without being given them, as far as Python shows them."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn


def trainable(root: Any) -> list[tuple[str, Tensor]]:
    """(name, tensor) of every leaf that requires a gradient, below a module or closed over by a function.

    Looks through modules, closures, used globals, defaults, bound methods, partials, plain containers and
    objects' attributes.
    """
    search = _Search()
    search.visit("", root, 0)
    return search.found


class _Search:
    def __init__(self) -> None:
        self.found: list[tuple[str, Tensor]] = []
        self.seen: set[int] = set()

    def visit(self, name: str, value: Any, depth: int) -> None:
        if depth > 6 or id(value) in self.seen:
            return
        if isinstance(value, (str, bytes, int, float, complex, type(None), type)):
            return
        self.seen.add(id(value))
        if isinstance(value, Tensor):
            if value.requires_grad and value.is_leaf:
                self.found.append((name, value))
        elif isinstance(value, nn.Module):
            for path, parameter in value.named_parameters(prefix=name):
                self.visit(path, parameter, depth)
            self._members(name, vars(value), depth)
        elif isinstance(value, functools.partial):
            self.visit(name, value.func, depth + 1)
            self._members(name, {**dict(enumerate(value.args)), **value.keywords}, depth)
        elif hasattr(value, "__code__") or hasattr(value, "__func__"):
            self._function(name, value, depth)
        elif isinstance(value, dict):
            self._members(name, value, depth)
        elif isinstance(value, (list, tuple, set)):
            self._members(name, dict(enumerate(value)), depth)
        elif hasattr(value, "__dict__") and not hasattr(value, "__path__") and depth < 3:
            self._members(name, vars(value), depth)

    def _members(self, name: str, members: dict[Any, Any], depth: int) -> None:
        for key, member in list(members.items()):
            self.visit(f"{name}.{key}" if name else str(key), member, depth + 1)

    def _function(self, name: str, function: Any, depth: int) -> None:
        if hasattr(function, "__func__"):
            self.visit(name, function.__self__, depth + 1)
            function = function.__func__
        code = function.__code__
        for free, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                self.visit(free, cell.cell_contents, depth + 1)
            except ValueError:  # the cell is still empty
                continue
        for used in code.co_names:
            value = function.__globals__.get(used)
            # modules of Python code are not looked into
            if value is not None and not hasattr(value, "__file__"):
                self.visit(used, value, depth + 1)
        self._members(
            name, {**dict(enumerate(function.__defaults__ or ())), **(function.__kwdefaults__ or {})}, depth
        )
