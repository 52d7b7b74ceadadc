"""What torch keeps of every trace for as long as the process lives, and is told to forget.

The methods of torch's `ShapeEnv` keep what they computed per method, for all traces of a process. Each entry holds its
ShapeEnv, and that holds all symbolic sizes of a trace, with what was computed of them: some hundred kilobytes for
every step that was ever captured.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def forget_shapes() -> None:
    """Empties these caches. Nothing but time depends on them, and sizes are computed while a step is compiled only."""
    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()


def forget_dispatch(mode: FakeTensorMode) -> None:
    """Empties what a finished trace kept of the calls with symbolic sizes: a circle through its ShapeEnv, in which
    Python's garbage collector can't see the part that is in C++."""
    mode.cache_enabled = False
    cache = getattr(mode.shape_env, "fake_tensor_cache", None)
    if cache is not None:
        cache.clear()


def forget_with(trace: Any) -> None:
    """Empties them once more when a trace is no longer used."""
    weakref.finalize(trace, forget_shapes).atexit = False
