"""`scripts/gpu-check`: measures what steploop does on this machine's GPU, and writes it down."""

from __future__ import annotations

import argparse
import itertools
import subprocess
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from .. import machine
from ..measure import TimeLimit, time_limit
from . import report, suite, timing
from .steps import CELLS, Problem, data_of, module_of
from .ways import WAYS, Blank, Compiled, Way

ROOT = Path(__file__).resolve().parents[2]
STEPS = 64
PARTS = ("micro", "kernels", "suite", "times")
COMPILED_WHEN_QUICK = {("lstm", "forward"), ("lnlstm", "forward")}  # it takes up to a minute for each


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="scripts/gpu-check",
        description="Microbenchmarks, the oracle tests on the GPU, and steploop beside a plain loop, cuDNN, "
        "torch.compile and a CUDA graph. At most 25 minutes; writes docs/gpu-results/<gpu>.md and .json.",
    )
    made.add_argument("--quick", action="store_true", help="fewer sizes and tests: at most 4 minutes")
    made.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    made.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS, help="only these are timed")
    made.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu-results", help="folder (docs/gpu-results)")
    made.add_argument("--minutes", type=float, help="for all parts together (25, or 4 with --quick)")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)  # cpu: to try it
    return made


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no CUDA device here.\n  fix:      PYTHON=/path/to/python scripts/gpu-check")
        return 2
    begin = time.monotonic()
    end = begin + 60 * (options.minutes or (4 if options.quick else 25))
    results: dict[str, Any] = {"quick": options.quick, "machine": describe(options.device)}
    print("\n".join(f"{name}: {value}" for name, value in results["machine"].items()), flush=True)

    def keep() -> Path:
        results["seconds"] = time.monotonic() - begin
        return report.write(results, options.out)

    parts = {"micro": _micro, "kernels": _kernels, "suite": _suite, "times": _times}
    for name in options.parts:
        print(f"-- {name}, at {time.monotonic() - begin:.0f} s", flush=True)
        try:
            parts[name](results, options, end, keep)
        except Exception:  # the other parts are worth having
            traceback.print_exc()
            results.setdefault("errors", []).append(f"{name}: {traceback.format_exc(limit=1)}")
        keep()
    print(f"The page: {keep()}")
    failed = results.get("suite", {}).get("failed", 0)
    return 1 if failed or results.get("errors") else 0


def describe(device: str) -> dict[str, Any]:
    """The machine, as plain values."""
    general = machine.describe(torch.get_num_threads())
    found = {"gpu": "none", "sms": 0}
    if device == "cuda":
        about = torch.cuda.get_device_properties()
        found = {
            "gpu": about.name, "sms": about.multi_processor_count, "compute capability": f"{about.major}.{about.minor}",
            "memory": f"{about.total_memory / 1e9:.1f} GB", "L2": f"{about.L2_cache_size / 1e6:.0f} MB",
            "driver": _driver(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
    kept = ("date", "cpu", "cores", "python", "commit")
    return {**found, "torch": torch.__version__, **{name: general[name] for name in kept}}


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()[0]
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return "not known"


def _micro(results: dict[str, Any], options: argparse.Namespace, end: float, keep: Any) -> None:
    from . import micro

    few = [(b, h) for b, h in micro.SIZES if h in (128, 512, 1024, 2048)]
    results["micro"] = micro.measure(few if options.quick else micro.SIZES)


def _kernels(results: dict[str, Any], options: argparse.Namespace, end: float, keep: Any) -> None:
    from . import kernels

    results["kernels"] = kernels.check(0.2 * (end - time.monotonic()))
    print(results["kernels"], flush=True)


def _suite(results: dict[str, Any], options: argparse.Namespace, end: float, keep: Any) -> None:
    left = end - time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        results["suite"] = suite.run(options.quick, left * (0.6 if "times" in options.parts else 1), log)
        (options.out / "suite.log").write_text(log.read_text(errors="replace")) if results["suite"]["failed"] else None
    print({name: value for name, value in results["suite"].items() if name != "failures"}, flush=True)


def problems(quick: bool) -> list[tuple[Problem, str]]:
    """What is timed, the most telling first: time may run out."""
    first = [(512, 64)] if quick else [(512, 64), (1024, 16), (128, 256), (2048, 64), (256, 1), (1024, 256)]
    found = [(Problem(c, STEPS, b, h), m) for (h, b), c, m in itertools.product(first, CELLS, ("forward", "training"))]
    if quick:
        found += [(Problem(c, STEPS, b, h), "forward") for c, b, h in (("lstm", 1, 1024), ("lnlstm", 256, 2048))]
        found += [(Problem(c, STEPS, 1, 512), "stream") for c in ("lstm", "rssm")]
    else:
        half = (Problem(c, STEPS, 64, 1024, torch.bfloat16) for c in CELLS)
        found += [(p, m) for p in half for m in ("forward", "training")]
        found += [(Problem(c, STEPS, b, 512), "stream") for c in CELLS for b in (1, 64)]
    return found


def _times(results: dict[str, Any], options: argparse.Namespace, end: float, keep: Any) -> None:
    rows = results["times"] = []
    todo = [(problem, mode) for problem, mode in problems(options.quick) if problem.cell in options.cells]
    for index, (problem, mode) in enumerate(todo):
        left = end - time.monotonic()
        if left < 5:
            print(f"no time left for {len(todo) - index} of {len(todo)} problems", flush=True)
            break
        rows.append(measured(problem, mode, left, len(todo) - index, options.device, options.quick))
        print(f"{problem} {mode}: {_line(rows[-1])}", flush=True)
        keep()


def measured(problem: Problem, mode: str, left: float, problems: int, device: str, quick: bool) -> dict[str, Any]:
    """One row: seconds of each way, round by round. left: seconds for this and all problems after it."""
    module = module_of(problem, device)
    xs, constants = data_of(problem, device)
    times, runs = timing.Times(), {}
    for way in WAYS:
        try:
            if quick and isinstance(way, Compiled) and (problem.cell, mode) not in COMPILED_WHEN_QUICK:
                raise Blank("left out with --quick")
            with time_limit(max(1.0, min(way.build_limit, left / 4))):
                runs[way.name] = _made(way, problem, module, xs, constants, mode, device)
        except (Blank, TimeLimit) as error:
            times.blank[way.name] = str(error)
        except Exception as error:
            times.blank[way.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    wrong = _compared(runs, mode)
    times.seconds = timing.rounds(runs, min(5.0, left / problems / 3), device)
    sizes = {"cell": problem.cell, "T": problem.steps, "B": problem.batch, "H": problem.hidden}
    kind = str(problem.dtype).removeprefix("torch.")
    return {**sizes, "dtype": kind, "mode": mode, "seconds": times.seconds, "blank": times.blank, "wrong": wrong}


def _made(way: Way, problem: Problem, module: Any, xs: Any, constants: Any, mode: str, device: str) -> Any:
    run = way.make(problem, module, xs, constants, mode)
    for _ in range(3):  # captures, graphs, compilers
        run()
    timing.wait(device)
    return run


def _compared(runs: dict[str, Any], mode: str) -> list[str]:
    """Which ways do not give what the first one gives, in most rows (float32 to 1e-3, halves to 1e-1).

    Not in all rows: a draw of the RSSM may fall otherwise by a rounding, and changes all that follows.
    """
    if mode == "training" or not runs:
        return []
    name, *others = runs
    expected, wrong = runs[name]().clone(), []
    for other in others:
        error = float((runs[other]() - expected).abs().amax((0, 2)).median() / expected.abs().max())
        if not error <= (1e-3 if expected.dtype == torch.float32 else 1e-1):
            wrong.append(f"{other} differs from the {name} by {error:.1e} of the largest value")
    return wrong


def _line(row: dict[str, Any]) -> str:
    found = [f"{way} {sorted(s)[len(s) // 2] / row['T'] * 1e6:.1f}" for way, s in row["seconds"].items()]
    return ", ".join([*found, *(f"{way} - ({why[:60]})" for way, why in row["blank"].items()), *row["wrong"]])


if __name__ == "__main__":
    raise SystemExit(main())
