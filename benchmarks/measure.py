"""How times and memory are taken: interleaved runs, time limits, processes of their own, peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PAUSE = 0.003  # lets the worker threads that a peer leaves spinning fall asleep before the next one


class TimeLimit(Exception):
    """A piece of work took longer than it was given."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeLimit in the body after `seconds`, where there are alarms and this is the main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise TimeLimit(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the run gave."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def interleaved(
    runs: dict[str, Callable[[], Any]], budget: float, expected: dict[str, float], least: int, most: int
) -> dict[str, list[float]]:
    """Rounds of one run each, every other round backwards: what else the machine does meets all alike.

    budget:   seconds for all rounds; `expected` seconds of each run tell how many fit (least..most).
    Returns the seconds of each run; entry i of every list is of round i, so that ratios can be paired.
    """
    total = sum(expected.values()) or 1.0
    rounds = max(least, min(most, int(budget / total)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    enabled = gc.isenabled()
    for index in range(rounds):
        gc.collect()
        gc.disable()
        try:
            for name in list(runs) if index % 2 == 0 else list(reversed(runs)):
                time.sleep(PAUSE)
                seconds, result = timed(runs[name])
                del result
                times[name].append(seconds)
        finally:
            if enabled:
                gc.enable()
    return times


def paired_ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds of ours / theirs; of the medians where one was too slow to take part in them."""
    if len(ours) != len(theirs):
        return statistics.median(ours) / statistics.median(theirs)
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def peak_memory(run: Callable[[], Any]) -> tuple[int, str]:
    """Bytes that one run adds to the process at its worst, and how that was measured.

    Linux: the high-water mark of the resident set, reset before the run, less the resident set before it.
    Elsewhere: the growth of ru_maxrss, which misses what earlier peaks had already reached.
    """
    gc.collect()
    _give_back_freed_pages()
    if _reset_high_water():
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before, "VmHWM, reset before the run, less VmRSS before it"
    unit = 1 if platform.system() == "Darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) * unit, "growth of ru_maxrss"


def _give_back_freed_pages() -> None:
    """Makes glibc return freed memory to the system: a run that gets it again would seem to take none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if platform.system() == "Linux" else None
    if trim is not None:
        trim(0)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def in_process(
    job: dict[str, Any], timeout: float, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Runs a job of jobs.py in a process of its own: {"results": [...], "error": text or None}.

    What the job had finished before a crash or the timeout is kept.
    """
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory(prefix="steploop-bench-") as folder:
        out = Path(folder) / "results.json"
        command = [sys.executable, "-m", "benchmarks.jobs", json.dumps(job), str(out)]
        env = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), **(environment or {})}
        log = Path(folder) / "log"
        with open(log, "w") as stream:
            process = subprocess.Popen(
                command, cwd=root, env=env, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            error = _wait(process, timeout)
        results = json.loads(out.read_text()) if out.exists() else []
        if error == "" and process.returncode:
            lines = log.read_text(errors="replace").strip().splitlines()
            error = f"exit status {process.returncode}: {lines[-1][:200] if lines else 'no message'}"
    return {"results": results, "error": error or None}


def _wait(process: subprocess.Popen, timeout: float) -> str:
    """Why the process was ended, or "". The process leads a group of its own: its compilers end too."""
    try:
        process.wait(timeout)
        return ""
    except subprocess.TimeoutExpired:
        return f"took longer than {timeout:g} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
