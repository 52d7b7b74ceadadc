"""A second device for machines that have none: the CPU in disguise, which refuses to be mixed with the CPU.

`pytest --device pretended` runs tests on it. It finds what a GPU would find about where tensors are made and moved;
about streams, graphs and speed it knows nothing. It is built by the C++ compiler, in about a minute, once.
"""

from __future__ import annotations

import functools
import importlib
import types
from pathlib import Path

import torch

NAME = "pretended"


class _Module(types.ModuleType):
    """What torch asks of `torch.<device>`."""

    @staticmethod
    def is_available() -> bool:
        return True

    is_initialized = is_available

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """Random numbers are the CPU's, whose seed is set anyway."""

    get_rng_state = staticmethod(lambda *_: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *_: torch.set_rng_state(state))

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@functools.cache
def install() -> str:
    """Makes the device known to torch; gives its name."""
    from torch.utils.cpp_extension import load

    source = Path(__file__).parent / "device.cpp"
    extension = load("steploop_pretended_device", [str(source)], extra_cflags=["-O1", "-g0"])
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _Module(NAME))
    extension.install()
    importlib.import_module(f"{__name__}.kernels")
    return NAME
