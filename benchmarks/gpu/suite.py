"""The oracle tests on the GPU, in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
QUICK = "not (edge_sizes and float64) and not random_lengths"  # what repeats much of the rest


def run(quick: bool, limit: float, log: Path) -> dict[str, Any]:
    """{"passed": n, "failed": n, "skipped": n, "failures": [...], "seconds": s}; the whole text goes to `log`."""
    workers = max(1, min(16, (os.cpu_count() or 2) - 1))
    command = [sys.executable, "-m", "pytest", "tests/oracle", "--device", "cuda", "-p", "no:cacheprovider"]
    command += ["--tb=short", "-n", str(workers), "--dist", "worksteal", *(["-k", QUICK] if quick else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    with open(log, "w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(limit)
            ended = ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 2)
            ended = f"stopped after {limit:.0f} s"
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
    return {**summary(log.read_text(errors="replace")), "ended": ended}


def summary(text: str) -> dict[str, Any]:
    """What pytest's last line and list of failures say."""
    last = next((line for line in reversed(text.splitlines()) if re.search(r"\d+ (passed|failed)", line)), "")
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    time = re.search(r"in ([\d.]+)s", last)
    failures = [line.split(" - ")[0].split(" ", 1)[1] for line in text.splitlines() if line.startswith("FAILED ")]
    return {
        "passed": counts.get("passed", 0), "failed": counts.get("failed", 0) + counts.get("error", 0),
        "skipped": counts.get("skipped", 0), "failures": failures, "seconds": float(time.group(1)) if time else None,
    }  # fmt: skip
