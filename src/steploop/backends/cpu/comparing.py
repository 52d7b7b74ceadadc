"""Small native functions beside the kernels (kernels/compare.cpp): what compares memory, and what puts rows back.

They take less time than letting go of Python's lock and taking it again, and what they look at must not change in the
meantime: they are called with the lock held.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from .build import TRIAL, build, problem


def comparison() -> Callable[[int, int, int], int] | None:
    """(address of a table, an entry, number of entries) -> the first from there on that differs, or -1.
    None without a compiler."""
    if problem():
        return None
    kind = ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_void_p, ctypes.c_long, ctypes.c_long)
    return kind(_address("steploop_differs"))


def putting_back() -> Callable[[int, int, int, int], None]:
    """(address of a mask, rows, address of a table, number of entries): puts the rows back that the mask leaves out."""
    kind = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p, ctypes.c_long)
    return kind(_address("steploop_put_back"))


def _address(name: str) -> int:
    return ctypes.cast(getattr(build(TRIAL), name), ctypes.c_void_p).value or 0
