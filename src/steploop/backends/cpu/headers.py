"""What stands before and after a loop's text in a kernel for the CPU."""

from __future__ import annotations

import functools
from pathlib import Path

from ..native.reserved import SHARED

KERNELS = Path(__file__).parent / "kernels"
BEFORE = (*(KERNELS / name for name in ("vector.h", "math.h", "tiles.h", "product.h")), *SHARED)


@functools.cache
def prelude() -> str:
    return "\n".join(path.read_text() for path in BEFORE)


@functools.cache
def entry() -> str:
    return (KERNELS / "entry.h").read_text()


def whole(text: str) -> str:
    """A kernel, from the text of its loop."""
    return f"{prelude()}\n{text}{entry()}"
