"""Threads of the native loops: those of the OpenMP runtime that torch uses, when it can be called.

A second OpenMP runtime in one process would stall against torch's, whose workers spin after each parallel
region. So kernels do not link one: they are given the entry point of the one that torch has already mapped.
Without it they start plain threads for each call.
"""

from __future__ import annotations

import ctypes
import functools
import os

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)


@functools.cache
def runtime() -> tuple[str, int]:
    """(path, address of GOMP_parallel) of the OpenMP runtime in this process; ("", 0) without one."""
    for path in _mapped():
        name = os.path.basename(path)
        if name.startswith(("libgomp", "libiomp", "libomp")):
            try:
                entry = ctypes.CDLL(path).GOMP_parallel
            except (OSError, AttributeError):
                continue
            return path, ctypes.cast(entry, ctypes.c_void_p).value or 0
    return "", 0


def entry() -> int:
    """The address of GOMP_parallel, or 0. A forked child must not use its parent's runtime."""
    return 0 if _forked else runtime()[1]


def _mapped() -> list[str]:
    try:
        with open("/proc/self/maps") as maps:
            return list(dict.fromkeys(line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")))
    except OSError:
        return []
