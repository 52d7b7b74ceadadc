"""Our own kernels on this GPU: are they right, does compute-sanitizer find anything, do their barriers last?

    python -m benchmarks.gpu.kernels [--backend cuda]     six loops against the plain loop, once; for compute-sanitizer

`check` runs it under each tool that is there, and then a soak: 10^6 steps of one loop beside another CUDA stream.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import steploop as sl

from .steps import CELLS, Problem, data_of, module_of

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "synccheck")
STEPS, SOAK_STEPS = 16, 1_000_000


def agree(cell: str, device: str, backend: str) -> float:
    """The largest difference from the plain loop, of the largest value; outputs and gradients of parameters."""
    problem = Problem(cell, STEPS, 5, 40)
    module, (xs, constants) = module_of(problem, device), data_of(problem, device)
    parameters = [p for p in module.parameters() if p.requires_grad]
    found = []
    for name in ("reference", backend):
        torch.manual_seed(0)
        y = sl.Loop(module, backend=name)(*xs, **constants)[0]
        gradients = torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)
        found.append([y.detach(), *(g for g in gradients if g is not None)])
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-6)) for a, b in zip(*found, strict=True))


def check(seconds: float) -> dict[str, Any]:
    """{"differences": {cell: x}, "sanitizer": {tool: words}, "soak": {...}}. seconds: for all of it."""
    end = time.monotonic() + seconds
    found: dict[str, Any] = {"differences": {}, "sanitizer": {}}
    for cell in CELLS:
        try:
            found["differences"][cell] = agree(cell, "cuda", "cuda")
        except sl.SteploopError as error:
            found["differences"][cell] = str(error).splitlines()[0]
    found["soak"] = soak(min(120.0, (end - time.monotonic()) / 2))
    for tool in TOOLS:
        found["sanitizer"][tool] = sanitized(tool, (end - time.monotonic()) / 2)
    return found


def sanitized(tool: str, limit: float) -> str:
    """What a tool of compute-sanitizer says of this file's program."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "compute-sanitizer is not here"
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu.kernels"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(limit, 1))
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    last = next((line for line in reversed(done.stdout.splitlines()) if "ERROR SUMMARY" in line), "")
    return last.strip("= ") or f"exit {done.returncode}: {done.stderr[-200:]}"


def soak(seconds: float, device: str = "cuda", backend: str = "cuda") -> dict[str, Any]:
    """Steps of one loop again and again, while another stream computes: every run gives the bits of the first."""
    problem = Problem("lnlstm", 1000, 16, 256)
    module, (xs, constants) = module_of(problem, device), data_of(problem, device)
    loop = sl.Loop(module, backend=backend)
    other = torch.cuda.Stream() if device == "cuda" else None
    busy = torch.randn(2048, 2048, device=device)
    done, end = 0, time.monotonic() + seconds
    with torch.no_grad():
        first = loop(*xs, **constants)[0].clone()
        while done < SOAK_STEPS and time.monotonic() < end:
            if other is not None:
                with torch.cuda.stream(other):
                    busy = (busy @ busy).tanh()
            if not torch.equal(loop(*xs, **constants)[0], first):
                return {"steps": done, "wrong": True}
            done += problem.steps
    return {"steps": done, "wrong": False}


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kernels", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--backend", default="cuda")
    made.add_argument("--device", default="cuda")
    options = made.parse_args(argv)
    for cell in CELLS:
        print(f"{cell}: {agree(cell, options.device, options.backend):.1e}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
