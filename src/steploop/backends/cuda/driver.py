"""Kernels on a GPU, through NVIDIA's driver: loading what NVRTC gave, and launching it on torch's stream."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import BuildError

_MOST_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_OF_A_BLOCK = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN


@functools.cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def check(code: int) -> None:
    """BuildError with the driver's message, where it refused something."""
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        raise BuildError(f"the CUDA driver gave {code}: {(text.value or b'').decode()}")


@functools.cache
def shared_memory(device: int) -> int:
    """Bytes of shared memory that a block may have."""
    found = ctypes.c_int()
    check(driver().cuDeviceGetAttribute(ctypes.byref(found), _SHARED_OF_A_BLOCK, device))
    return found.value


class Module:
    """Compiled kernels on one device."""

    def __init__(self, cubin: bytes, device: torch.device):
        self.device = device
        self._module = ctypes.c_void_p()
        self._functions: dict[str, Any] = {}
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes sure that there is a context
            check(driver().cuModuleLoadData(ctypes.byref(self._module), cubin))

    def function(self, name: str) -> Any:
        if name not in self._functions:
            function = ctypes.c_void_p()
            check(driver().cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()))
            self._functions[name] = function
        return self._functions[name]

    def most_blocks(self, name: str, threads: int, shared: int) -> int:
        """Blocks of so many threads and bytes of shared memory that can run on the device at once."""
        function, of_one = self.function(name), ctypes.c_int()
        check(driver().cuFuncSetAttribute(function, _MOST_SHARED, shared))
        size = ctypes.c_size_t(shared)
        check(driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(ctypes.byref(of_one), function, threads, size))
        return of_one.value * torch.cuda.get_device_properties(self.device).multi_processor_count

    def launch(
        self, name: str, blocks: int, threads: int, arguments: Sequence[Any], *, shared: int = 0,
        cooperative: bool = False,
    ) -> None:  # fmt: skip
        """Queues a kernel on torch's current stream of the device.

        arguments: values of ctypes; a tensor is its address, an integer an `int`.
        cooperative: all blocks run at once, or the launch is refused.
        """
        values = [_value(a) for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        with torch.cuda.device(self.device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            sizes = (blocks, 1, 1, threads, 1, 1, shared)
            if cooperative:
                check(driver().cuLaunchCooperativeKernel(self.function(name), *sizes, stream, pointers))
            else:
                check(driver().cuLaunchKernel(self.function(name), *sizes, stream, pointers, None))


def _value(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int(argument) if isinstance(argument, int) else argument
