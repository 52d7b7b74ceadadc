"""`steploop bench`: a user's own step against its plain Python loop."""

from __future__ import annotations

import json as text_format
import statistics
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ..errors import MismatchError
from .options import AsJson, Backend, UsedBackend, finite
from .user_file import Call, Constant, Init, Input, Target, call_of, users_errors
from .verify import DIFFERS

ROUNDS = 3  # at least, however long they take
SHORTEST = 0.02  # seconds; faster calls are timed several at once


def bench(
    target: Target,
    init: Init = "",
    input: Input = None,
    constant: Constant = None,
    backend: UsedBackend = Backend.auto,
    seconds: Annotated[float, typer.Option(min=0, callback=finite, help="About how long to measure.")] = 5.0,
    json: AsJson = False,
) -> None:
    """Time a step's compiled loop against its plain Python loop, side by side, after both were found to agree.

    Both run in turn on the same data; the ratios are of neighbouring runs, so that a busy machine slows both. Without
    --input, the file's `example()` is called, as for `steploop explain`.

    \b
    steploop bench cell.py:Cell --init "8, 16" --input 100,32,8
    steploop bench cell.py --seconds 20 --json
    """
    call = call_of(target, init, input, constant, backend.value)
    try:
        with users_errors(call.file):
            found = measure(call, seconds)
    except MismatchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(DIFFERS)
    print(text_format.dumps(found, indent=1) if json else _table(found))


def measure(call: Call, seconds: float) -> dict[str, Any]:
    """Seconds per call of both loops, and their ratios: forward alone, and with backward where something trains."""
    import torch

    import steploop as sl

    compiled = call.loop
    plain = sl.Loop(compiled.step, compiled.batch_first, compiled.reverse, backend="reference", until=compiled.until)
    trains = any(p.requires_grad for p in compiled.parameters()) or any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in call.inputs
    )
    begin = time.perf_counter()
    _runner(compiled, call, trains)()
    first = time.perf_counter() - begin
    sl.verify(compiled, *call.inputs, **call.constants)
    ways = {"forward": False, "forward and backward": True} if trains else {"forward": False}
    timed = {
        name: _paired(_runner(plain, call, backward), _runner(compiled, call, backward), seconds / len(ways))
        for name, backward in ways.items()
    }
    plan = compiled.plan(*call.inputs, **call.constants)
    return {
        "backends": sorted({loop.backend for loop in plan.loops}),
        "threads": torch.get_num_threads(),
        "first_call_seconds": first,
        "timed": timed,
    }


def _runner(loop: Any, call: Call, backward: bool) -> Callable[[], None]:
    """One call of a loop; with `backward`, the gradients of all its outputs too."""
    import torch
    from torch.utils import _pytree as pytree

    leaves = [p for p in (*loop.parameters(), *pytree.tree_leaves(call.inputs)) if getattr(p, "requires_grad", False)]
    wait: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def run() -> None:
        with torch.set_grad_enabled(backward):
            outputs, state = loop(*call.inputs, **call.constants)
        if backward:
            ends = [y for y in pytree.tree_leaves((outputs, dict(state))) if getattr(y, "requires_grad", False)]
            ones = [torch.ones_like(y) for y in ends]
            torch.autograd.grad(ends, leaves, ones, allow_unused=True)
        wait()

    return run


def _paired(plain: Callable[[], None], compiled: Callable[[], None], seconds: float) -> dict[str, Any]:
    """Medians over rounds in which both run one after the other."""
    repeats = [max(1, round(SHORTEST / max(_time(run, 1), 1e-6))) for run in (plain, compiled)]
    rounds: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < ROUNDS or time.perf_counter() < end:
        rounds.append((_time(plain, repeats[0]), _time(compiled, repeats[1])))
    ratios = sorted(a / b for a, b in rounds)
    return {
        "plain_seconds": statistics.median(a for a, _ in rounds),
        "compiled_seconds": statistics.median(b for _, b in rounds),
        "ratio": statistics.median(ratios),
        "ratio_from_to": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "rounds": len(rounds),
    }


def _time(run: Callable[[], None], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def _table(found: dict[str, Any]) -> str:
    lines = [f"{'':22}{'plain loop':>12}{'compiled':>12}   times as fast (middle half of the rounds)"]
    for name, timed in found["timed"].items():
        low, high = timed["ratio_from_to"]
        lines.append(
            f"{name:22}{timed['plain_seconds'] * 1e3:9.2f} ms{timed['compiled_seconds'] * 1e3:9.2f} ms"
            f"   {timed['ratio']:.1f} ({low:.1f} to {high:.1f})"
        )
    backends = ", ".join(found["backends"]) or "no loop is left"
    lines.append(f"first call {found['first_call_seconds']:.1f} s; backend: {backends}; threads: {found['threads']}")
    return "\n".join(lines)
