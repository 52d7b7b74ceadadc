"""CUDA C++ compiled by NVRTC and launched by the driver, with nothing but the libraries that torch's wheel brings."""

from __future__ import annotations

import ctypes
import functools
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class CudaError(RuntimeError):
    """NVRTC or the driver refused something; the message is theirs."""


def _library(pattern: str) -> ctypes.CDLL:
    """A library of NVIDIA's wheels beside torch, or the system's."""
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
        _library("libnvrtc-builtins.so.")
    except OSError:
        pass  # NVRTC finds it itself where both lie in a folder of the system
    return _library("libnvrtc.so.")


def compile_cubin(text: str, architecture: str) -> tuple[bytes, str]:
    """(cubin, the compiler's log) of CUDA C++ without headers, for an architecture such as "sm_90"."""
    library, program = nvrtc(), ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"gpu_check.cu", 0, None, None)
    options = [f"--gpu-architecture={architecture}", "-std=c++17", "-default-device", "--ptxas-options=-v"]
    array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    code = library.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    if code:
        raise CudaError(f"NVRTC gave {code}:\n{log.value.decode()}")
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, cubin)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw, log.value.decode()


class Module:
    """Compiled kernels on the current device."""

    def __init__(self, text: str):
        torch.cuda.init()
        torch.cuda.current_stream().synchronize()  # makes sure that there is a context
        major, minor = torch.cuda.get_device_capability()
        self.driver = ctypes.CDLL("libcuda.so.1")
        cubin, self.log = compile_cubin(text, f"sm_{major}{minor}")
        self._module, self._functions = ctypes.c_void_p(), {}
        self._check(self.driver.cuModuleLoadData(ctypes.byref(self._module), cubin))

    def launch(
        self, name: str, grid: int, block: int, arguments: Sequence[Tensor | int], *, cooperative: bool = False
    ) -> None:
        """Queues a kernel on torch's current stream. Integers are `int` in the kernel, tensors pointers.

        cooperative: all blocks run at once, or the launch is refused.
        """
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        sizes = (grid, 1, 1, block, 1, 1, 0)
        if cooperative:
            code = self.driver.cuLaunchCooperativeKernel(self._function(name), *sizes, stream, pointers)
        else:
            code = self.driver.cuLaunchKernel(self._function(name), *sizes, stream, pointers, None)
        self._check(code)

    def _function(self, name: str) -> Any:
        if name not in self._functions:
            function = ctypes.c_void_p()
            self._check(self.driver.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()))
            self._functions[name] = function
        return self._functions[name]

    def _check(self, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(code, ctypes.byref(text))
            raise CudaError(f"the CUDA driver gave {code}: {(text.value or b'').decode()}")
