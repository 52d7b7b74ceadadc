"""`steploop doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import sys


def doctor() -> None:
    """Tell what this machine has: versions, threads, compiler, cache; and what to install."""
    import torch

    from .. import __version__

    rows = {
        "steploop": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use",
    }
    # The native backend knows best of the compiler it uses; of threads it has something else to say.
    native = _native_backend()
    rows |= {f"native {name}" if name in rows else name: value for name, value in native.items()}
    rows.setdefault("compiler", _compiler())
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")


def _compiler() -> str:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in wanted:
        if found := shutil.which(name):
            return found
    if platform.system() == "Darwin":
        return "none; to install one: xcode-select --install"
    return "none; to install one: sudo apt install g++ (Debian, Ubuntu), sudo dnf install gcc-c++ (Fedora)"


def _native_backend() -> dict[str, str]:
    """What the native backend says of itself (its cache folder, its flags)."""
    try:
        from ..backends.cpu import doctor as examine
    except ImportError:
        return {"native loops": "not in this version; loops run on the eager backend"}
    found = examine()
    return dict(found) if isinstance(found, dict) else {"native loops": str(found)}
