"""The folders that compiled libraries are kept in, and what may be loaded from them.

A library is code that runs in this process, so it is loaded only where nobody else can have put it: its folder
and its file belong to this user, nobody else may write to them, and the file holds exactly the bytes that were
built. A hash of these bytes lies beside every library, in the form that `sha256sum --check` reads. A library that
was cut short (a full disk, a crash of the machine) is found by that hash before the loader of the system trips over it.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BUILDING = ".build-"  # how the names of folders begin in which a build is under way
LOCK = ".lock"
_BUILT = re.compile(r"[0-9a-f]{40}\.(so|cpp|cubin|cu|sha256)")
OLD = 3600  # seconds after which no build can still be under way


def folder() -> Path:
    """Where libraries are kept: STEPLOOP_CACHE, or steploop in the user's cache folder."""
    named = os.environ.get("STEPLOOP_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "steploop"


def places() -> Iterator[Path]:
    """The folders that may be written to now, best first: the cache unless it is unsafe, then one of this process."""
    if is_safe(folder()):
        yield folder()
    yield _own_folder(os.getpid())


@functools.cache
def _own_folder(_pid: int) -> Path:
    """A folder for this process alone, where the cache can't be used."""
    path = Path(tempfile.mkdtemp(prefix="steploop-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def is_safe(path: Path) -> bool:
    """Makes a cache folder if there is none. Says whether it is ours alone to write to; warns where it is not."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        about, link = path.stat(), path.lstat()
    except OSError:
        return False
    trouble = foreign(about) or foreign(link, link=True)
    if trouble:
        _warn_once(str(path), trouble)
    return not trouble


@functools.cache
def _warn_once(path: str, trouble: str) -> None:
    warnings.warn(
        f"steploop does not use its cache of compiled loops, {path}: {trouble}, so what lies in it may not be safe to "
        "run. Loops are compiled anew in every process until then. Remove that folder and make a new one that only "
        "you can write to (mkdir -m 700), or name another folder in STEPLOOP_CACHE.",
        stacklevel=2,
    )


def foreign(about: os.stat_result, link: bool = False) -> str:
    """Why somebody else may have written this file or folder; "" where nobody else can have."""
    if hasattr(os, "getuid") and about.st_uid != os.getuid():
        return "it belongs to another user"
    if not link and hasattr(os, "getuid") and stat.S_IMODE(about.st_mode) & 0o022:
        return "others may write to it"
    return ""


def hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_whole(library: Path) -> bool:
    """Whether a library is a file of ours, in a folder of ours, that holds the bytes that were built."""
    try:
        if any(not stat.S_ISREG(a.st_mode) or foreign(a) for a in map(os.lstat, (library, _beside(library)))):
            return False
        return is_safe(library.parent) and _beside(library).read_text().split()[:1] == [hash_of(library.read_bytes())]
    except (OSError, UnicodeDecodeError):
        return False


def _beside(library: Path) -> Path:
    return library.with_suffix(".sha256")


def publish(library: Path, target: Path) -> None:
    """Moves a library that was just built to its place. A process that is killed in between leaves a hash that does
    not fit, and the library is built anew."""
    note = library.with_suffix(".sha256")
    note.write_text(f"{hash_of(library.read_bytes())}  {target.name}\n")
    for file in (note, library):
        file.chmod(0o600)  # whatever the umask says
    os.replace(note, _beside(target))
    os.replace(library, target)


def contents() -> tuple[int, int]:
    """How many libraries the cache holds, and its bytes."""
    libraries = size = 0
    for file in _ours():
        try:
            size += file.stat().st_size
        except FileNotFoundError:  # another process has removed it since
            continue
        libraries += file.suffix in (".so", ".cubin")
    return libraries, size


def clear() -> None:
    """Remove what was built. A process that has a library loaded keeps it; what builds now is left alone."""
    for file in _ours():
        file.unlink(missing_ok=True)


def _ours() -> list[Path]:
    """Nothing else that lies in the folder: STEPLOOP_CACHE may name one that holds more."""
    found = folder().iterdir() if folder().is_dir() else ()
    return [file for file in found if _BUILT.fullmatch(file.name)]


@contextmanager
def building_in(place: Path) -> Iterator[Path]:
    """A folder to build in, which is gone afterwards. Folders that killed builds have left go as well."""
    with _lock(place):
        work = Path(tempfile.mkdtemp(prefix=BUILDING, dir=place))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _lock(place: Path) -> Iterator[None]:
    """Every build holds the folder's lock together with the others; whoever gets it alone knows that none runs.

    The system lets a lock go when its process ends, however that happens.
    """
    if fcntl is None:
        _sweep(place, OLD)
        yield
        return
    with open(place / LOCK, "a", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        alone = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # others build, or the file system has no locks
            alone = False
        _sweep(place, 0 if alone else OLD)
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
        except OSError:
            pass
        yield


def _sweep(place: Path, age: float) -> None:
    """Removes what builds have left that were begun so many seconds ago or earlier."""
    for left in place.glob(f"{BUILDING}*"):
        try:
            if time.time() - left.lstat().st_mtime >= age:
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            continue
