"""What runs kernels: a GPU, or in the tests something that behaves like one."""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..native import cache
from . import driver, nvrtc
from .headers import whole
from .ways import Way

ENTRY = "steploop_run"


class Kernel(Protocol):
    """A built kernel."""

    def most_blocks(self, near: int) -> int:
        """How many blocks can run at once where each has so many bytes of its own memory."""
        ...

    def launch(self, words: Sequence[int], memory: Tensor, barrier: Tensor, way: Way) -> None:
        """Runs it, or queues it. words: the pointers and numbers of its call.  memory: of all teams."""
        ...


class Machine(Protocol):
    """device: the type of its tensors' device.  warps: of a block.  lanes: of a warp."""

    device: str
    warps: int
    lanes: int

    def problem(self) -> str:
        """Why it can't run kernels; "" where it can."""
        ...

    def near(self, device: torch.device) -> int:
        """Bytes of its own memory that a block may have."""
        ...

    def processors(self, device: torch.device) -> int:
        """How many blocks run without sharing anything."""
        ...

    def begin(self, text: str, device: torch.device) -> Future[Kernel]:
        """Starts building a kernel, from the text of its loop."""
        ...


class Gpu(Machine):
    """The CUDA devices of this computer."""

    device, warps, lanes = "cuda", 8, 32

    def __init__(self) -> None:
        self._cubins: dict[tuple[str, str], Future[bytes]] = {}
        self._builders: list[ThreadPoolExecutor] = []
        self._lock = threading.Lock()

    def problem(self) -> str:
        if not torch.cuda.is_available():
            return "torch finds no CUDA device here"
        return nvrtc.problem()

    def near(self, device: torch.device) -> int:
        return driver.shared_memory(_number(device))

    def processors(self, device: torch.device) -> int:
        return torch.cuda.get_device_properties(device).multi_processor_count

    def begin(self, text: str, device: torch.device) -> Future[Kernel]:
        major, minor = torch.cuda.get_device_capability(device)
        made = self._cubin(text, f"sm_{major}{minor}")
        found: Future[Kernel] = Future()

        def loaded(cubin: Future[bytes]) -> None:
            try:
                found.set_result(_Loaded(driver.Module(cubin.result(), device), self.lanes * self.warps))
            except Exception as error:
                found.set_exception(error)

        made.add_done_callback(loaded)
        return found

    def _cubin(self, text: str, architecture: str) -> Future[bytes]:
        with self._lock:
            key = text, architecture
            if key not in self._cubins:
                if not self._builders:
                    self._builders.append(ThreadPoolExecutor(os.cpu_count() or 1, "steploop-nvrtc"))
                self._cubins[key] = self._builders[0].submit(kept_cubin, text, architecture)
            return self._cubins[key]


def kept_cubin(text: str, architecture: str) -> bytes:
    """The cubin of a loop's text, from the cache of kernels or compiled now."""
    source = whole(text)
    parts = [source, architecture, nvrtc.version(), *nvrtc.FLAGS]
    name = f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:40]}.cubin"
    if cache.is_whole(cache.folder() / name):
        return (cache.folder() / name).read_bytes()
    cubin, _ = nvrtc.compile_cubin(source, architecture)
    for place in cache.places():
        try:
            _keep(cubin, source, place, name)
            break
        except OSError:  # it works without
            continue
    return cubin


def _keep(cubin: bytes, source: str, place: Path, name: str) -> None:
    with cache.building_in(place) as work:
        (work / "kernel.cubin").write_bytes(cubin)
        (work / "kernel.cu").write_text(source)
        os.replace(work / "kernel.cu", (place / name).with_suffix(".cu"))
        cache.publish(work / "kernel.cubin", place / name)


class _Loaded(Kernel):
    def __init__(self, module: driver.Module, threads: int):
        self.module, self.threads = module, threads
        self._most: dict[int, int] = {}  # blocks, by their own memory; asking takes as long as a launch

    def most_blocks(self, near: int) -> int:
        if near not in self._most:
            self._most[near] = self.module.most_blocks(ENTRY, self.threads, near)
        return self._most[near]

    def launch(self, words: Sequence[int], memory: Tensor, barrier: Tensor, way: Way) -> None:
        long = ctypes.c_int64
        numbers = long(memory.numel() // way.teams), long(way.together), long(way.near)
        arguments: list[Any] = [(long * len(words))(*words), memory, numbers[0], barrier, *numbers[1:]]
        self.module.launch(ENTRY, way.blocks, self.threads, arguments, shared=way.near, cooperative=way.together)


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index

