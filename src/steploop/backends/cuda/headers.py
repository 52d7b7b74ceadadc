"""What stands before and after a loop's text in a kernel for a GPU."""

from __future__ import annotations

import functools
from pathlib import Path

from ..native.reserved import SHARED

KERNELS = Path(__file__).parent / "kernels"
WORDS = ("lanes.h", "math.h", "teams.h", "product.h")


@functools.cache
def _read(path: Path) -> str:
    return path.read_text()


def whole(text: str, machine: Path = KERNELS) -> str:
    """A kernel, from the text of its loop. machine: a folder with a machine.h and a launch.h."""
    before = [machine / "machine.h", *(KERNELS / name for name in WORDS), *SHARED]
    after = [KERNELS / "entry.h", machine / "launch.h"]
    return "\n".join([*map(_read, before), text, *map(_read, after)])
