"""`steploop doctor`."""

from __future__ import annotations

import importlib.util
import json as text_format
import os
import platform
import sys

from .messages import FOR_RECIPES, pip
from .options import AsJson


def doctor(json: AsJson = False) -> None:
    """Tell what this machine has: versions, threads, compiler, cache; and what to install.

    \b
    steploop doctor
    steploop doctor --json
    """
    import torch

    from .. import __version__
    from ..backends import cpu

    rows = {
        "steploop": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use",
    }
    # The native backend knows best of the compiler it uses; of threads it has something else to say.
    rows |= {f"native {name}" if name in rows else name: value for name, value in cpu.doctor().items()}
    rows["recipes"] = _recipes()
    if json:
        print(text_format.dumps(rows, indent=1))
        return
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")


def _recipes() -> str:
    """Whether what `train`, `sample`, `compare` and `convert` need is there."""
    missing = tuple(name for name in FOR_RECIPES if importlib.util.find_spec(name) is None)
    return f"no {', '.join(missing)}; to install: {pip(missing)}" if missing else "all packages are there"
