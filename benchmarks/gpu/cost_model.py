"""Microseconds of one step of a recurrent program on a GPU, by the way in which its steps are launched.

    python -m benchmarks.gpu.cost_model [docs/gpu-results/<gpu>.json]

Ways, of which the first two exist and the others are what a CUDA backend would do:

    eager   every operation of a step is a launch by torch
    graph   the same operations in a CUDA graph of many steps
    block   one block per 16 rows for all steps; it reads the weights anew at every step, from its shared memory where
            they fit there, else from L2
    grid    all SMs for all steps; each keeps its share of the weights and reads the whole state at every step, after
            one barrier of the grid for every product that waits for another

A step's time is what must happen one after the other: launches or barriers, then the larger of arithmetic and bytes.
It is the loop's alone: what is batched over time outside of it, and what a call costs once, come on top.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROWS = 16  # of a tile: what tensor cores take at once
SHARED = 200e3  # bytes of an SM's shared memory that weights may fill


@dataclass(frozen=True)
class Constants:
    """Seconds, bytes per second and operations per second of one GPU. source: where they are from.

    op: one operation queued from Python.  node: one small kernel in a graph, after the one before it.
    barrier: of the whole grid, with an exchange of values.  block_barrier: of one block, both ways.
    l2: bytes per second from L2 to all SMs.  rate: of products, by kind, all SMs together.
    product: measured seconds of (B, H) x (H, 4 H) by kind and "B H", where there are any.
    """

    source: str
    sms: int
    op: float
    node: float
    barrier: float
    block_barrier: float
    l2: float
    rate: dict[str, float]
    product: dict[str, dict[str, float]]


# Before a GPU was at hand: an H100's data sheet, half of the tensor cores' peak, and launches as people report them.
GUESSED = Constants(
    "guesses, nothing measured", 132, op=5e-6, node=1.8e-6, barrier=1.2e-6, block_barrier=0.1e-6, l2=5.5e12,
    rate={"fp32": 59e12, "tf32": 236e12, "bf16": 473e12}, product={},
)  # fmt: skip


def measured(results: dict[str, Any]) -> Constants:
    """From the JSON that gpu-check writes."""
    micro = results["micro"]
    rate = dict(GUESSED.rate)
    for kind, times in micro["product"].items():
        sizes = {name: [int(n) for n in name.split()] for name in times}
        rate[kind] = max(8 * b * h * h / times[name] for name, (b, h) in sizes.items())
    return replace(
        GUESSED, source=results["machine"]["gpu"], sms=results["machine"]["sms"], op=micro["op"], node=micro["node"],
        barrier=micro["grid_exchange"], block_barrier=micro["block_barrier"], l2=micro["l2_bandwidth"], rate=rate,
        product=micro["product"],
    )  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What a step consists of. products: (inputs, outputs) of each product in the loop, in units of H.

    operations: launches of a step in the loop, products among them (its views launch nothing, but cost Python time).
    waits: products that wait for another of the same step.
    """

    name: str
    products: tuple[tuple[float, float], ...]
    operations: int
    waits: int = 0


CELLS = {
    cell.name: cell
    for cell in (
        Cell("lstm", ((1, 4),), 10), Cell("gru", ((1, 3),), 11), Cell("lnlstm", ((1, 4),), 13),
        Cell("slstm", ((1, 1),), 19), Cell("decoder", ((1, 4), (1, 4), (1, 1), (2, 1)), 20, 2),
    )
}  # fmt: skip


def step(cell: Cell, batch: int, hidden: int, kind: str, on: Constants) -> dict[str, float | None]:
    """Seconds of one step by way; None where the weights do not fit."""
    size = 2 if kind == "bf16" else 4
    work = [(2 * batch * i * o * hidden**2, i * o * hidden**2 * size) for i, o in cell.products]
    flop, weights = sum(f for f, _ in work), sum(w for _, w in work)
    state = batch * hidden * size * max(i for i, _ in cell.products)
    by_torch = sum(_by_torch(f, w, batch, hidden, kind, on) for f, w in work)
    small = cell.operations - len(cell.products)
    tiles = min(on.sms, -(-batch // ROWS))
    rate = on.rate[kind]
    from_memory = 0.0 if weights <= SHARED else max(weights / (on.l2 / on.sms), tiles * weights / on.l2)
    return {
        "eager": max(cell.operations * on.op, small * on.node + by_torch),
        "graph": small * on.node + by_torch,
        "block": (1 + len(cell.products)) * on.block_barrier + max(flop * on.sms / (tiles * rate), from_memory),
        "grid": (1 + cell.waits) * on.barrier + flop / rate + on.sms * state / on.l2
        if weights <= on.sms * SHARED
        else None,
    }


def _by_torch(flop: float, weights: float, batch: int, hidden: int, kind: str, on: Constants) -> float:
    """One product launched in a graph: scaled from the measured one of this batch and size, else a roofline."""
    known = on.product.get(kind, {}).get(f"{batch} {hidden}")
    if known is not None:
        return max(on.node, known * flop / (8 * batch * hidden * hidden))
    return on.node + max(flop / on.rate[kind], weights / on.l2)


def table(on: Constants, kind: str) -> list[str]:
    """A Markdown table of predictions."""
    lines = ["| cell | H | B | eager | graph | block | grid |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for cell in CELLS.values():
        for hidden in (128, 512, 1024, 2048):
            for batch in (1, 64, 256):
                found = step(cell, batch, hidden, kind, on)
                shown = " | ".join("no" if v is None else f"{v * 1e6:.1f}" for v in found.values())
                lines.append(f"| {cell.name} | {hidden} | {batch} | {shown} |")
    return lines


def main(arguments: list[str]) -> int:
    on = measured(json.loads(Path(arguments[0]).read_text())) if arguments else GUESSED
    print(f"Microseconds per step, forward; constants: {on.source}.")
    for kind in on.rate:
        print(f"\n{kind}\n", *table(on, kind), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
