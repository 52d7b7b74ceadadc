"""Builds a kernel with the C++ compiler of the machine, and keeps what was built.

A library's name is the digest of everything that it depends on: its text, the compiler's version, the flags and
the CPU. It is written under a temporary name and then renamed, so that nobody ever sees half of one: builds may be
killed, run twice at the same time, or find the folder full or read-only (then a folder for this process takes
its place). `cache.py` says which folders and libraries are safe to load code from.

Libraries are built side by side, on all cores, while the program goes on: `begin` starts, `build` waits.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ...errors import BuildError
from ..native import cache
from ..native.cache import folder

FLAGS = (
    "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fwrapv",
    "-fvisibility=hidden", "-w",
)  # fmt: skip
# GCC (12 at the least) is wrong about what functions write that stand in others, and leaves out stores that are needed.
CAREFUL = "-fno-ipa-modref"
FASTEST = ("-O3",)
# Of a long kernel -O3 takes twice as long to build, and what it gives is no faster.
QUICKER = ("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic")
LONG = 100_000  # characters, the headers included
GENERIC = "-mtune=generic"
NATIVE = "-march=native"
TIMEOUT = 300


class Compiler:
    """A C++ compiler that works here, and the flag for the CPU that it accepts."""

    def __init__(self, path: str, version: str, arch: str):
        self.path, self.version, self.arch = path, version, arch

    def flags(self, text: str) -> tuple[str, ...]:
        careful = () if "clang" in self.version.lower() else (CAREFUL,)
        return (*FLAGS, *careful, *level(text), self.arch)


def level(text: str) -> tuple[str, ...]:
    return FASTEST if len(text) < LONG else QUICKER


def candidates() -> list[str]:
    named = os.environ.get("STEPLOOP_CXX") or os.environ.get("CXX")
    return [named] if named else ["g++", "clang++", "c++"]


def compiler() -> Compiler | None:
    """The compiler in use, or None. STEPLOOP_CXX names one; STEPLOOP_ARCH is the flag for the CPU."""
    arch = os.environ.get("STEPLOOP_ARCH", NATIVE)
    for name in candidates():
        path = shutil.which(name)
        if path is None:
            continue
        about = os.stat(path)
        found = _probe(path, arch, about.st_mtime_ns, about.st_size)
        if found is not None:
            return found
    return None


@functools.lru_cache(maxsize=8)
def _probe(path: str, arch: str, _changed: int, _size: int) -> Compiler | None:
    """Asks a compiler for its version; the time and size of its file stand for "the same compiler"."""
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    if answer.returncode:
        return None
    return Compiler(path, answer.stdout.splitlines()[0] if answer.stdout else path, arch)


@functools.cache
def cpu() -> str:
    """What the machine's instruction set is, for the digest."""
    try:
        with open("/proc/cpuinfo") as info:
            lines = [
                x for x in info.read().split("\n\n")[0].splitlines() if x.startswith(("flags", "model name"))
            ]
    except OSError:
        lines = []
    return "\n".join([platform.machine(), platform.processor(), *lines])


def wide_vectors() -> bool:
    """Whether kernels are built for AVX2 or AVX-512 (which has AVX2)."""
    using = compiler()
    return using is not None and using.arch == NATIVE and "avx2" in cpu().split()


_libraries: dict[str, Future[ctypes.CDLL]] = {}  # by their digests: loaded, or being built
_builders: list[ThreadPoolExecutor] = []
_lock = threading.Lock()


def begin(text: str) -> Future[ctypes.CDLL]:
    """The library of a kernel's text: from memory, from the cache, or being built. Its result may be a BuildError."""
    using = compiler()
    if using is None:
        raise BuildError(problem())
    digest = hashlib.sha256("\0".join([text, using.version, *using.flags(text), cpu()]).encode()).hexdigest()[:40]
    with _lock:
        found = _libraries.get(digest)
        if found is None or (found.done() and found.exception() is not None):
            found = _libraries[digest] = _found(digest) or _started(digest, text, using)
    return found


def build(text: str) -> ctypes.CDLL:
    """The library of a kernel's text, else BuildError."""
    return begin(text).result()


def _started(digest: str, text: str, using: Compiler) -> Future[ctypes.CDLL]:
    if not _builders:
        _builders.append(ThreadPoolExecutor(os.cpu_count() or 1, "steploop-build"))
    try:
        return _builders[0].submit(_make, digest, text, using)
    except RuntimeError:  # Python is about to end, and begins no threads any more
        return _done(_make(digest, text, using))


def _after_fork() -> None:
    """A forked process has none of the threads that were building."""
    global _lock
    _lock = threading.Lock()
    _builders.clear()
    for digest, library in list(_libraries.items()):
        if not library.done():
            del _libraries[digest]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _found(digest: str) -> Future[ctypes.CDLL] | None:
    library = _find(digest)
    return None if library is None else _done(library)


def _done(library: ctypes.CDLL) -> Future[ctypes.CDLL]:
    found: Future[ctypes.CDLL] = Future()
    found.set_result(library)
    return found


def _find(digest: str) -> ctypes.CDLL | None:
    library = folder() / f"{digest}.so"
    if not cache.is_whole(library):
        return None
    try:
        return ctypes.CDLL(str(library))
    except OSError:  # a library for another system: built anew and replaced
        return None


def _make(digest: str, text: str, using: Compiler) -> ctypes.CDLL:
    problems = []
    for place in cache.places():
        try:
            return _build_in(place, digest, text, using)
        except OSError as error:
            problems.append(f"{place}: {error}")
    raise BuildError("a native kernel could not be written: " + "; ".join(problems))


def _build_in(place: Path, digest: str, text: str, using: Compiler) -> ctypes.CDLL:
    with cache.building_in(place) as work:
        source, library = work / "kernel.cpp", work / "kernel.so"
        source.write_text(text)
        _compile(source, library, using)
        loaded = ctypes.CDLL(str(library))  # loads before it is published: what the cache holds works
        os.replace(source, place / f"{digest}.cpp")
        cache.publish(library, place / f"{digest}.so")
        return loaded


def _compile(source: Path, library: Path, using: Compiler) -> None:
    """Runs the compiler; flags that it does not know are left out."""
    message, text = "", source.read_text()
    plain = (*FLAGS, *level(text))
    tries = (using.flags(text), (*plain, using.arch), (*plain, CAREFUL, GENERIC), (*plain, GENERIC), plain)
    for flags in dict.fromkeys(tries):
        command = [using.path, *flags, "-o", str(library), str(source), "-lm", "-lpthread"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{using.path} took more than {TIMEOUT} s") from error
        if answer.returncode == 0:
            return
        message = message or answer.stderr
        if "No space left" in answer.stderr:
            raise OSError("no space left")
    raise BuildError(f"{using.path} could not compile a kernel:\n{message[:2000]}")


# Helpers that every machine with a compiler has: what tries the compiler out is of use afterwards.
TRIAL = (Path(__file__).parent / "kernels" / "compare.cpp").read_text()


@functools.cache
def _trial(_path: str, _version: str) -> str:
    try:
        build(TRIAL)
    except BuildError as error:
        return str(error)
    return ""


def problem() -> str:
    """Why kernels can't be built here; "" when they can. A small trial, kept in the cache like any kernel."""
    using = compiler()
    if using is None:
        return f"no C++ compiler found (looked for {', '.join(candidates())}); {what_to_install()}"
    return _trial(using.path, using.version)


def what_to_install() -> str:
    if platform.system() == "Darwin":
        return "run `xcode-select --install`"
    return (
        "install g++ (Debian, Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`; "
        "conda: `conda install cxx-compiler`)"
    )
