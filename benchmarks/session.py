"""Runs the jobs of cases one after the other, and keeps what they gave."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .cases import CASES, Job, Scale
from .data import Workload
from .measure import in_process

Result = dict[str, Any]
Imports = dict[tuple[str, str], list[str]]
SLOW = 150e9  # floating point operations per second: what a skipped point's time is judged by


def run_cases(
    names: list[str],
    scale: Scale,
    threads: int,
    peers: list[str] | None,
    keep: Callable[[list[Result]], None],
    say: Callable[[str], None] = print,
    start: Callable[..., dict[str, Any]] = in_process,
) -> list[Result]:
    """All results. `keep` is called with those so far after every job, `start` runs a job."""
    results: list[Result] = []
    imports: Imports = {}
    for name in names:
        for job in jobs_of(name, scale, threads, peers):
            began = time.perf_counter()
            new = list(_run(job, results, start, imports))
            results += new
            keep(results)
            say(f"{label(job)}: {_summary(new)}  [{time.perf_counter() - began:.0f} s]")
    return results


def jobs_of(name: str, scale: Scale, threads: int, peers: list[str] | None) -> list[Job]:
    """The jobs of a case, with only these peers."""
    jobs = []
    for job in CASES[name](scale):
        chosen = [p for p in job["peers"] if peers is None or p in peers]
        if chosen:
            jobs.append({**job, "peers": chosen, "threads": threads})
    return jobs


def label(job: Job) -> str:
    """A job in words."""
    extra = f" {job['peers'][0]}" if len(job["peers"]) == 1 else f" {', '.join(job['modes'])}"
    return f"{job['case']}{extra} {Workload(**job['work'])}{' ' + job['cache'] if 'cache' in job else ''}"


def _run(
    job: Job, earlier: list[Result], start: Callable[..., dict[str, Any]], imports: Imports
) -> Iterator[Result]:
    reason = _skip(job, earlier)
    if reason:
        yield from _blanks(job, f"skipped: {reason}", [])
    elif job["action"] == "first_call":
        yield _first_call(job, start, imports)
    else:
        answer = start(job, job["timeout"])
        yield from answer["results"]
        if answer["error"]:
            yield from _blanks(job, answer["error"], answer["results"])


def _blanks(job: Job, reason: str, done: list[Result]) -> Iterator[Result]:
    """A blank for whatever a job left out."""
    have = {(result["mode"], result["peer"]) for result in done}
    for mode in job["modes"]:
        for peer in job["peers"]:
            if (mode, peer) not in have:
                blank = {"work": job["work"], "mode": mode, "peer": peer, "blank": reason}
                yield {"case": job["case"], "action": job["action"], "cache": job.get("cache"), **blank}


def _skip(job: Job, earlier: list[Result]) -> str:
    """Why a job is not worth starting, or ""."""
    if job.get("needs_earlier"):
        failed = [
            r for r in earlier if r["case"] == job["case"] and r["peer"] in job["peers"] and "blank" in r
        ]
        return f"{failed[0]['work']['T']} steps: {failed[0]['blank']}" if failed else ""
    if job["case"] != "grid":
        return ""
    work = Workload(**job["work"])
    seconds = sum(work.flops(mode) for mode in job["modes"]) / SLOW * len(job["peers"]) * (job["least"] + 2)
    if seconds > job["timeout"]:
        return f"about {seconds:.0f} s, the limit is {job['timeout']:g} s"
    needed = 4.0 * work.T * work.B * (2 * work.I + 20 * work.H)
    if needed > available_memory():
        return f"about {needed / 1e9:.0f} GB of memory"
    return ""


def available_memory() -> float:
    """Bytes of free memory, or infinity where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable")), float("inf"))


def _first_call(job: Job, start: Callable[..., dict[str, Any]], imports: Imports) -> Result:
    """The median of some processes' first calls. One before them fills the warm cache and lists the imports.

    `imports` keeps those lists by step and peer: where a cold cache is wanted and the list is known, no
    process needs to run before.
    """
    known = job["work"]["kind"], job["peers"][0]
    with tempfile.TemporaryDirectory(prefix="steploop-cache-") as folder:
        if job["cache"] == "warm" or known not in imports:
            scout, error = _in_cache(job, Path(folder) / "warm", start)
            if error:
                return next(_blanks(job, error, []))
            imports[known] = scout["imports"]
        runs = []
        for index in range(job["repeats"]):
            cache = Path(folder) / ("warm" if job["cache"] == "warm" else f"cold{index}")
            result, error = _in_cache({**job, "imports": imports[known]}, cache, start)
            if error:
                return next(_blanks(job, error, []))
            runs.append(result)
    runs.sort(key=lambda result: result["first"])
    middle = dict(runs[(len(runs) - 1) // 2])
    middle.pop("imports")
    with_imports = statistics.median(run["first"] + run["importing"] for run in runs)
    return {**middle, "with_imports": with_imports, "firsts": [run["first"] for run in runs]}


def _in_cache(job: Job, cache: Path, start: Callable[..., dict[str, Any]]) -> tuple[Result, str]:
    cache.mkdir(mode=0o700, exist_ok=True)
    folders = {
        "STEPLOOP_CACHE": "steploop",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
    }
    environment = {name: str(cache / folder) for name, folder in folders.items()}
    job = {**job, "cache_folder": environment["STEPLOOP_CACHE"]}
    answer = start(job, job["timeout"], environment)
    result = answer["results"][0] if answer["results"] else {}
    return result, answer["error"] or result.get("blank", "") or ("" if result else "no result")


def _summary(results: list[Result]) -> str:
    parts = []
    for result in results:
        mode = {"forward": "f", "training": "t", "training_x": "tx"}.get(result["mode"], result["mode"])
        if "blank" in result:
            shown = "blank"
        elif "bytes" in result:
            shown = f"{result['bytes'] / 1e6:.0f} MB"
        else:
            shown = f"{result.get('median', result.get('first')):.4g} s"
        parts.append(f"{result['peer']}/{mode} {shown}")
    return ", ".join(parts)


def load() -> float | None:
    """The system's load average over the last minute, where it has one."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
