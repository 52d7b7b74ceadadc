"""The benchmarks' program: `scripts/bench --help`, or `python -m benchmarks` where steploop is installed."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import signal
import threading
from pathlib import Path

from . import machine, report, session
from .cases import CASES, SCALES
from .peers import PEERS

ROOT = Path(__file__).resolve().parent.parent


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measures steploop and its peers side by side. Without options: every case at full size "
        "(an hour and more), and docs/benchmarks.md from it.",
    )
    made.add_argument("--quick", action="store_true", help="small sizes, some minutes: to see that all works")
    made.add_argument(
        "--case", nargs="+", choices=list(CASES), metavar="CASE", help=f"only: {', '.join(CASES)}"
    )
    made.add_argument("--grid", action="store_true", help="only the grid (or the grid as well as --case)")
    made.add_argument(
        "--peers", nargs="+", choices=list(PEERS), metavar="PEER", help=f"only: {', '.join(PEERS)}"
    )
    made.add_argument("--threads", type=int, default=2, help="threads, and cores, for every peer (2)")
    made.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "bench", help="folder for results (runs/bench)"
    )
    made.add_argument("--budget", type=float, help="seconds of rounds for each column of a table (90)")
    made.add_argument("--docs", action="store_true", help="write docs/benchmarks.md from this run too")
    made.add_argument(
        "--render", nargs="+", type=Path, metavar="JSON",
        help="measure nothing: the page from earlier runs; a later file's tables replace an earlier one's",
    )  # fmt: skip
    made.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    return made


def main(argv: list[str] | None = None) -> int:
    """Runs the program."""
    options = parser().parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: raise_exit())
    if options.threads < 1:
        parser().error("--threads must be at least 1")
    if options.render:
        run, page = report.merge(options.render), options.out / "benchmarks.md"
    else:
        run, page = _measured(options)
    whole = not (
        options.quick or options.tiny or options.case or options.grid or options.peers or options.render
    )
    if options.docs or whole:
        page = ROOT / "docs" / "benchmarks.md"
    report.write(run, page, page.parent / "img")
    print(f"The page: {_shown(page)}")
    return 0


def raise_exit() -> None:
    """Ends the program when it is terminated, by an exception: the process it started ends too."""
    raise SystemExit(143)


def _measured(options: argparse.Namespace) -> tuple[report.Run, Path]:
    scale = SCALES["tiny" if options.tiny else "quick" if options.quick else "full"]
    if options.budget is not None:
        scale = dataclasses.replace(scale, budget=options.budget)
    names = list(options.case or ([] if options.grid else CASES))
    if options.grid and "grid" not in names:
        names.append("grid")
    threads = min(options.threads, os.cpu_count() or 1)
    meta = {**machine.describe(threads), "scale": scale.name, "load_start": session.load()}
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = options.out / f"{stamp}-{scale.name}.json"

    def keep(results: report.Results) -> None:
        report.write_json({"meta": {**meta, "load_end": session.load()}, "results": results}, path)

    keep([])
    session.run_cases(names, scale, threads, options.peers, keep, lambda text: print(text, flush=True))
    print(f"The results: {_shown(path)}")
    return json.loads(path.read_text()), path.with_suffix(".md")


def _shown(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    raise SystemExit(main())
