"""Tells a person at a terminal what a first call does, where that takes long."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

AFTER = 2.0  # seconds
TOGETHER = 0.5  # parts with less than so many seconds between them belong to one call

_lock = threading.Lock()
_spent = 0.0  # seconds of the parts of one call so far
_ended = 0.0  # when the last part ended
_told = False


@contextmanager
def long_part(doing: str) -> Iterator[None]:
    """One part of a first call. doing: what it does ("capturing Decoder")."""
    if not _is_watched():
        yield
        return
    start = time.monotonic()
    timer = threading.Timer(max(0.0, AFTER - _so_far(start)), _tell, (doing,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        _add(start)


def _is_watched() -> bool:
    quiet = os.environ.get("STEPLOOP_QUIET", "") not in ("", "0")
    return not quiet and sys.stderr is not None and sys.stderr.isatty()


def _so_far(now: float) -> float:
    global _spent, _told
    with _lock:
        if now - _ended > TOGETHER:
            _spent, _told = 0.0, False
        return _spent


def _add(start: float) -> None:
    global _spent, _ended
    with _lock:
        _ended = time.monotonic()
        _spent += _ended - start


def _tell(doing: str) -> None:
    global _told
    with _lock:
        if _told:
            return
        _told = True
    print(
        f"steploop: {doing}, which only a first call does. (STEPLOOP_QUIET=1 keeps this line away.)",
        file=sys.stderr, flush=True,
    )  # fmt: skip
