"""The backend "cuda" on a GPU made of a CPU (emulation/machine.h): the same text, built by g++, every lane a fiber.

`pytest --emulated` runs every oracle test that goes through the compiled backends on it as well.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steploop.backends import choose
from steploop.backends.cuda import Cuda, ways
from steploop.backends.cuda.headers import whole
from steploop.backends.cuda.machine import Kernel, Machine
from steploop.errors import BuildError

HERE = Path(__file__).parent / "emulation"
FOLDER = Path(tempfile.gettempdir()) / f"steploop-emulated-{os.getuid()}"
# As on a GPU a product and a sum make one rounding, and whole numbers wrap.
FLAGS = ("-std=c++17", "-fPIC", "-shared", "-w", "-O1", "-fwrapv", "-fno-ipa-modref")


def source(text: str, lanes: int) -> str:
    """The C++ of an emulated kernel, from the text of its loop."""
    return f"#define LANES {lanes}\n{whole(text, HERE)}"


@functools.cache
def built(text: str, flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    name = hashlib.sha256("\0".join([text, *flags]).encode()).hexdigest()[:40]
    library = FOLDER / f"{name}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=FOLDER) as work:
            file, made = Path(work) / "kernel.cpp", Path(work) / "kernel.so"
            file.write_text(text)
            done = subprocess.run(["g++", *flags, "-o", made, file, "-lpthread"], capture_output=True, text=True)
            if done.returncode:
                raise BuildError(f"g++ could not compile an emulated kernel:\n{done.stderr[:3000]}")
            os.replace(made, library)
    return ctypes.CDLL(str(library))


_numbers = itertools.count()  # what an earlier backend of one name compiled would serve a later one


class EmulatedKernel(Kernel):
    def __init__(self, machine: Emulated, text: str):
        self.machine, self.text = machine, text
        library = built(source(text, machine.lanes))
        self._run = library.steploop_run
        pointer, long = ctypes.c_void_p, ctypes.c_int64
        self._run.argtypes, self._run.restype = [pointer, pointer, long, pointer, long, long, long, long], None

    def most_blocks(self, near: int) -> int:
        return self.machine.blocks

    def launch(self, words: Sequence[int], memory: Tensor, barrier: Tensor, way: ways.Way) -> None:
        self.machine.launches.append(way)
        array = (ctypes.c_int64 * len(words))(*[w - (1 << 64) if w >= 1 << 63 else w for w in words])
        self._run(
            array, memory.data_ptr(), memory.numel() // way.teams, barrier.data_ptr(), way.together, way.near,
            way.blocks, self.machine.warps,
        )  # fmt: skip


class Emulated(Machine):
    """blocks, warps, lanes: how many.  memory: bytes of a block's own.  launches: those that were run."""

    device = "cpu"

    def __init__(self, blocks: int = 2, warps: int = 2, lanes: int = 4, memory: int = 4096):
        assert blocks * warps * lanes <= 128, "machine.h has room for 128 threads"
        self.blocks, self.warps, self.lanes, self.memory = blocks, warps, lanes, memory
        self.launches: list[ways.Way] = []

    def problem(self) -> str:
        return ""

    def near(self, device: torch.device) -> int:
        return self.memory

    def processors(self, device: torch.device) -> int:
        return self.blocks

    def begin(self, text: str, device: torch.device) -> Future[Kernel]:
        found: Future[Kernel] = Future()
        try:
            found.set_result(EmulatedKernel(self, text))
        except BuildError as error:
            found.set_exception(error)
        return found


class EmulatedCuda(Cuda):
    name = "emulated"
    words = 'the backend "cuda", emulated on the CPU'
    machine: Emulated

    def __init__(self, name: str = "emulated", **sizes: int):
        super().__init__(Emulated(**sizes))
        self.name = name  # type: ignore[misc]


@contextmanager
def registered(together: bool | None = None, rows: int | None = None, **sizes: int) -> Iterator[EmulatedCuda]:
    """Ready to be named, by a name of its own, while this lasts; "auto" does not try it.

    together: how everything is launched, where the model of costs is not asked.  rows: of a tile then.
    """
    backend, best = EmulatedCuda(f"emulated-{next(_numbers)}", **sizes), ways.best
    choose.register(backend)
    choose._order.remove(backend.name)
    if together is not None:
        ways.best = functools.partial(_this_way, together, rows)
    try:
        yield backend
    finally:
        ways.best = best
        choose._order.append(backend.name)
        choose.unregister(backend.name)


def _this_way(together: bool, rows: int | None, *given: Any) -> ways.Way:
    way = (ways.as_grid if together else ways.by_blocks)(*given)
    return way if together or rows is None else replace(way, rows=rows)
