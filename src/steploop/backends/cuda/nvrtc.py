"""CUDA C++ compiled at run time by NVRTC, the library that comes with torch's CUDA wheel (or nvidia-cuda-nvrtc's)."""

from __future__ import annotations

import ctypes
import functools
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import BuildError

FLAGS = ("-std=c++17", "-default-device", "--ptxas-options=-v")


def library(pattern: str) -> ctypes.CDLL:
    """A library of NVIDIA's wheels beside torch, or the system's. OSError where there is none."""
    for folder in (Path(sysconfig.get_paths()["purelib"]), Path(torch.__file__).parent.parent):
        for path in sorted(folder.glob(f"nvidia/*/lib/{pattern}*")):
            if ".alt." not in path.name:
                return ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    major = (torch.version.cuda or "13").split(".")[0]
    return ctypes.CDLL(f"{pattern}{major}")


@functools.cache
def nvrtc() -> ctypes.CDLL:
    """NVRTC. Its part of built-in functions must be there before it."""
    try:
        library("libnvrtc-builtins.so.")
    except OSError:
        pass  # NVRTC finds it itself where both lie in a folder of the system
    return library("libnvrtc.so.")


def problem() -> str:
    """Why nothing can be compiled here; "" where it can."""
    try:
        nvrtc()
    except OSError as error:
        return f"NVRTC, which torch's CUDA build brings, is not there ({error})"
    return ""


def version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def architectures() -> list[str]:
    """Those that this NVRTC compiles for, as "sm_90"."""
    count = ctypes.c_int()
    nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    nvrtc().nvrtcGetSupportedArchs(numbers)
    return [f"sm_{number}" for number in numbers]


def compile_cubin(text: str, architecture: str) -> tuple[bytes, str]:
    """(cubin, the compiler's log) of CUDA C++ without headers, for an architecture such as "sm_90"."""
    lib, program = nvrtc(), ctypes.c_void_p()
    lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    options = [f"--gpu-architecture={architecture}", *FLAGS]
    array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    code = lib.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetProgramLog(program, log)
    if code:
        lib.nvrtcDestroyProgram(ctypes.byref(program))
        raise BuildError(f"NVRTC gave {code}:\n{log.value.decode()[:2000]}")
    lib.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetCUBIN(program, cubin)
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw, log.value.decode()


@dataclass(frozen=True)
class Usage:
    """What a kernel takes of a multiprocessor. spills: bytes, stored and loaded.  shared: bytes that are known before a
    launch."""

    registers: int
    spills: int
    stack: int
    shared: int


def usage(log: str) -> Usage:
    """Of the one kernel that a log of `compile_cubin` tells of."""

    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, log)))

    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    stack, shared = number(r"(\d+) bytes stack frame"), number(r"(\d+) bytes smem")
    return Usage(number(r"Used (\d+) registers"), spills, stack, shared)
