"""What runs in a process of its own:  python -m benchmarks.jobs '{"action": ..., ...}' results.json

A job is a dict of plain values; its results are a list of dicts, written as they come.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Emit = Callable[[dict[str, Any]], None]
TOLERANCE = {"y": 2e-3, "grad": 1e-2}  # of a tensor's largest entry: float32 after up to 2048 steps


def main(argv: list[str]) -> None:
    """Runs one job."""
    job, out = json.loads(argv[0]), Path(argv[1])
    limit_cores(job["threads"])
    results: list[dict[str, Any]] = []

    def emit(result: dict[str, Any]) -> None:
        results.append({"case": job["case"], **result})
        part = out.with_suffix(".part")
        part.write_text(json.dumps(results))
        part.replace(out)

    run_job(job, emit)


def run_job(job: dict[str, Any], emit: Emit) -> None:
    """Runs one job in this process."""
    ACTIONS[job["action"]](job, emit)


def limit_cores(threads: int) -> None:
    """As many cores for every peer as threads were asked for."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:threads])


def workload_of(job: dict[str, Any]) -> Any:
    import torch

    from .data import Workload

    torch.set_num_threads(job["threads"])
    return Workload(**job["work"])


def compare_peers(job: dict[str, Any], emit: Emit) -> None:
    """All peers on one workload, once to see that they agree, then interleaved."""
    work = workload_of(job)
    from .data import make_data

    data = make_data(work)
    for mode in job["modes"]:
        ready, blanks = _prepare(job, work, data, mode)
        _measure(job, work.as_dict(), mode, ready, blanks, emit)


def _prepare(job: dict[str, Any], work: Any, data: Any, mode: str) -> tuple[dict, dict[str, str]]:
    """Runners that gave the right result, each with its first run's seconds; reasons for the others."""
    from . import peers

    ready: dict[str, tuple[Any, float, float | None]] = {}
    blanks: dict[str, str] = {}
    expected: dict[str, Any] | None = None
    for name in sorted(job["peers"], key=lambda name: name not in ("eager", "torch.nn")):
        try:
            runner, seconds, arrays = _first_run(name, work, data, mode)
        except peers.Blank as blank:
            blanks[name] = str(blank)
            continue
        worst = None
        if runner.compare:
            if expected is None:
                expected = arrays
            worst, where = difference(arrays, expected)
            if where:
                blanks[name] = f"wrong result: {where} is off by {worst:.1e} of the largest entry"
                continue
        ready[name] = runner, seconds, worst
    return {name: ready[name] for name in job["peers"] if name in ready}, blanks


def _first_run(name: str, work: Any, data: Any, mode: str) -> tuple[Any, float, dict[str, Any]]:
    from . import peers
    from .measure import TimeLimit, time_limit, timed

    limit = peers.PEERS[name].build_limit if name in peers.PEERS else 60.0
    try:
        with time_limit(limit):
            runner = peers.make_runner(name, work, data, mode)
            seconds, result = timed(runner.run)
            return runner, seconds, runner.arrays(result)
    except peers.Blank:
        raise
    except TimeLimit as error:
        raise peers.Blank(str(error)) from error
    except Exception as error:
        raise peers.Blank(peers.short(error)) from error


def difference(found: dict[str, Any], expected: dict[str, Any]) -> tuple[float, str]:
    """The worst difference as a share of a tensor's largest entry; the name of a tensor beyond tolerance."""
    import numpy as np

    worst, where = 0.0, ""
    for name in found.keys() & expected.keys():
        scale = float(np.abs(expected[name]).max(initial=0.0)) or 1.0
        same_shape = found[name].shape == expected[name].shape
        off = float(np.abs(found[name] - expected[name]).max(initial=0.0)) / scale if same_shape else np.inf
        if not off <= TOLERANCE[name.split()[0]]:
            where = name
        worst = max(worst, off) if off == off else np.inf
    return worst, where


def _measure(
    job: dict[str, Any], work: dict[str, Any], mode: str, ready: dict, blanks: dict[str, str], emit: Emit
) -> None:
    """Second runs tell how many rounds fit the budget; then the rounds, without what is too slow for them."""
    from .measure import interleaved, timed

    second = {name: timed(runner.run)[0] for name, (runner, _, _) in ready.items()}
    slow = too_slow(second, job["budget"] / job["least"])
    runs = {name: runner.run for name, (runner, _, _) in ready.items() if name not in slow}
    fast = {name: second[name] for name in runs}
    times = interleaved(runs, job["budget"], fast, job["least"], job["most"])
    times |= {name: [second[name]] for name in slow}
    common = {"action": job["action"], "work": work, "mode": mode}
    for name, (runner, first, worst) in ready.items():
        seconds = [t / runner.calls for t in times[name]]
        emit(
            {
                **common, "peer": name, "times": seconds, "median": statistics.median(seconds),
                "first": first, "off_by": worst,
                "note": "one run only: too slow for more" if name in slow else _note(runner),
            }
        )  # fmt: skip
    for name, reason in blanks.items():
        emit({**common, "peer": name, "blank": reason})


def too_slow(seconds: dict[str, float], a_round: float) -> set[str]:
    """Those that take most of a round's budget, and far longer than most others."""
    if not seconds:
        return set()
    usual = statistics.median(seconds.values())
    return {name for name, taken in seconds.items() if taken > max(a_round / 2, 5 * usual)}


def _note(runner: Any) -> str:
    try:
        return runner.note()
    except Exception as error:  # a note is not worth a measurement
        return f"no plan: {type(error).__name__}"


def stream(job: dict[str, Any], emit: Emit) -> None:
    """Seconds of one step of a stream, without gradients."""
    work = workload_of(job)
    from . import streams

    _run_peers(job, work, "forward", lambda name: streams.make_runner(name, work, job["calls"]), emit)


def search(job: dict[str, Any], emit: Emit) -> None:
    """Seconds of one search, without gradients."""
    work = workload_of(job)
    from . import searches

    for mode in job["modes"]:
        _run_peers(job, work, mode, lambda name, mode=mode: searches.make_runner(name, work, mode), emit)


def g2p(job: dict[str, Any], emit: Emit) -> None:
    """Seconds of the recipe's batches: trained on, or said."""
    work = workload_of(job)
    from . import g2p

    for mode in job["modes"]:
        _run_peers(job, work, mode, lambda name, mode=mode: g2p.make_runner(name, work, mode), emit)


def kalman(job: dict[str, Any], emit: Emit) -> None:
    """Seconds of a filter's log-likelihood, or of its gradients too."""
    work = workload_of(job)
    from . import kalman

    for mode in job["modes"]:
        _run_peers(job, work, mode, lambda name, mode=mode: kalman.make_runner(name, work, mode), emit)


def _run_peers(job: dict[str, Any], work: Any, mode: str, make: Callable[[str], Any], emit: Emit) -> None:
    from . import peers

    ready: dict[str, Any] = {}
    blanks: dict[str, str] = {}
    expected = None
    for name in job["peers"]:
        try:
            runner = make(name)
            arrays = runner.arrays(runner.run())
        except Exception as error:  # a peer that fails is a blank
            blanks[name] = str(error) if isinstance(error, peers.Blank) else peers.short(error)
            continue
        expected = expected or arrays
        worst, where = difference(arrays, expected)
        if where:
            blanks[name] = f"wrong result: {where} is off by {worst:.1e}"
        else:
            ready[name] = runner, 0.0, worst
    _measure(job, work.as_dict(), mode, ready, blanks, emit)


def guards(job: dict[str, Any], emit: Emit) -> None:
    """Seconds of the check that a kept capture still holds."""
    work = workload_of(job)
    from . import guards

    for row in guards.rows(work, job["calls"]):
        emit(row)


def memory(job: dict[str, Any], emit: Emit) -> None:
    """Peak memory of one training step of one peer, after a short run that loads and compiles everything."""
    work = workload_of(job)
    from dataclasses import replace

    from . import peers
    from .data import make_data
    from .measure import peak_memory

    (name,) = job["peers"]
    common = {"action": "memory", "work": work.as_dict(), "mode": "training", "peer": name}
    try:
        short = replace(work, T=min(work.T, 8))
        data = make_data(work)
        runner = peers.make_runner(name, work, data, "training")
        peers.make_runner(name, short, make_data(short), "training").run()
        size, how = peak_memory(runner.run)
    except Exception as error:  # a peer that fails is a blank
        emit({**common, "blank": str(error) if isinstance(error, peers.Blank) else peers.short(error)})
        return
    emit({**common, "bytes": size, "how": how})


def first_call(job: dict[str, Any], emit: Emit) -> None:
    """Seconds of a process's first forward and backward, of the next, and of the first at another T and B.

    job["imports"]: modules that an earlier process had after its call; importing them is not counted. What
    the results call `imports` are this process's.
    """
    work = workload_of(job)
    from dataclasses import replace

    from . import peers
    from .data import make_data

    (name,) = job["peers"]
    mode = job["modes"][0]
    common = {
        "action": "first_call",
        "work": work.as_dict(),
        "mode": mode,
        "peer": name,
        "cache": job["cache"],
    }
    importing = _import_all(job["imports"])
    try:
        runner = peers.make_runner(name, work, make_data(work), mode)
        first, steady = _first_and_steady(runner, 3 if job["vary"] else 1)
        files = _files(job.get("cache_folder"))
        result = {**common, "first": first, "steady": steady, "importing": importing, "files": files}
        others = {"T": replace(work, T=work.T // 2 + 1), "B": replace(work, B=work.B + 3)}
        for axis, other in others.items() if job["vary"] else ():
            runner.again(make_data(other))
            changed, usual = _first_and_steady(runner)
            result |= {f"new_{axis}": changed, f"usual_{axis}": usual}
        result["new_files"] = _files(job.get("cache_folder")) - files
    except Exception as error:  # a peer that fails is a blank
        emit({**common, "blank": str(error) if isinstance(error, peers.Blank) else peers.short(error)})
        return
    names = [n for n, m in list(sys.modules.items()) if getattr(m, "__spec__", None) and n != "__main__"]
    emit({**result, "imports": names})


def _first_and_steady(runner: Any, after: int = 3) -> tuple[float, float]:
    """Seconds of the next run, and the median of those after it."""
    from .measure import timed

    first, *others = [timed(runner.run)[0] for _ in range(1 + after)]
    return first, statistics.median(others)


def _import_all(names: list[str]) -> float:
    start = time.perf_counter()
    for name in names:
        if name not in sys.modules and not name.startswith("benchmarks"):
            try:
                __import__(name)
            except Exception:  # modules made at run time cannot be imported by name
                continue
    return time.perf_counter() - start


def _files(folder: str | None) -> int:
    return sum(1 for path in Path(folder).rglob("*") if path.is_file()) if folder else 0


ACTIONS: dict[str, Callable[[dict[str, Any], Emit], None]] = {
    "compare": compare_peers,
    "stream": stream,
    "guards": guards,
    "search": search,
    "g2p": g2p,
    "kalman": kalman,
    "memory": memory,
    "first_call": first_call,
}

if __name__ == "__main__":
    main(sys.argv[1:])
