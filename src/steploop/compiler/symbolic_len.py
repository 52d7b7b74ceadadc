"""len(x) of a traced tensor, as x.shape[0].

Python wants an int of `Tensor.__len__`, so that a step which asks for len(x) would be captured for one number of rows
alone. While a step is traced, the name `len` is a function that gives the symbol.
"""

from __future__ import annotations

import builtins
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._subclasses.functional_tensor import FunctionalTensor

_plain = builtins.len
_lock = threading.Lock()
_users = 0  # traces that run


def _len(value: Any, /) -> Any:
    if type(value) is FunctionalTensor and value.dim():
        return value.shape[0]
    return _plain(value)


@contextmanager
def symbolic_len() -> Iterator[None]:
    """While this lasts, len of a traced tensor may be a symbol."""
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    global _users
    with _lock:
        _users += change
        builtins.len = _len if _users else _plain
