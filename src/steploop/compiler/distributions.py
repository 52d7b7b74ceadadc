"""torch.distributions in a step: the checks of arguments and samples look at values, which a trace does not have.

While a step is traced they are left out, whatever `validate_args` says: a wrong parameter gives nan then where the
plain loop raises.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributions import Distribution

_NAME = "_validate_args"
_tracing = threading.local()  # .depth: traces that run in this thread, one inside the other
_lock = threading.Lock()
_users = 0  # threads that trace
_default: Any = None


def _get(distribution: Any) -> bool:
    return not getattr(_tracing, "depth", 0) and vars(distribution).get(_NAME, _default)


def _set(distribution: Any, value: bool) -> None:
    vars(distribution)[_NAME] = value


@contextmanager
def without_checks() -> Iterator[None]:
    """In this thread no distribution checks its arguments meanwhile."""
    _begin()
    _tracing.depth = getattr(_tracing, "depth", 0) + 1
    try:
        yield
    finally:
        _tracing.depth -= 1
        _end()


def _begin() -> None:
    global _users, _default
    with _lock:
        if _users == 0:
            _default = getattr(Distribution, _NAME)
            setattr(Distribution, _NAME, property(_get, _set))
        _users += 1


def _end() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0 and isinstance(getattr(Distribution, _NAME), property):
            setattr(Distribution, _NAME, _default)
