"""docs/gpu-results/<gpu>.md and .json, from what was measured."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any


def write(results: dict[str, Any], folder: Path) -> Path:
    """Writes both files; gives the page."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", results["machine"]["gpu"].lower()).strip("-")
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    page = folder / f"{name}.md"
    page.write_text("\n".join(lines(results)) + "\n")
    return page


def lines(results: dict[str, Any]) -> list[str]:
    machine = results["machine"]
    command = "scripts/gpu-check" + (" --quick" if results["quick"] else "")
    found = [f"# {machine['gpu']}", "", f"Made by `{command}`.", ""]
    found += [f"- {name}: {value}" for name, value in machine.items()]
    if "micro" in results:
        found += ["", "## What things cost", "", *_micro(results["micro"])]
    if "kernels" in results:
        found += ["", "## Our own kernels", "", *_kernels(results["kernels"])]
    if "suite" in results:
        found += ["", "## The oracle tests", "", *_suite(results["suite"])]
    for mode, title in TITLES.items():
        rows = [row for row in results.get("times", []) if row["mode"] == mode]
        if rows:
            found += ["", f"## {title}", "", *_times(rows)]
    found += ["", f"The whole run took {results['seconds']:.0f} s."]
    return found


TITLES = {
    "forward": "Forward, without gradients", "training": "Forward and gradients of parameters",
    "stream": "One step at a time, without gradients",
}  # fmt: skip
_SHOWN = {
    "op": ("an operation of torch, queued from Python back to back", 1e6, "us"),
    "replay": ("launching a CUDA graph of one kernel from Python", 1e6, "us"),
    "node": ("a small kernel in a CUDA graph, after the one before it", 1e6, "us"),
    "grid_barrier": ("a barrier of all SMs", 1e6, "us"),
    "grid_exchange": ("a barrier of all SMs with an exchange through L2", 1e6, "us"),
    "block_barrier": ("two barriers of one block of 512 threads", 1e6, "us"),
    "l2_bandwidth": ("reading 16 MB from L2 by all SMs", 1e-12, "TB/s"),
    "memory_bandwidth": ("copying 2 GB in memory, bytes read and written", 1e-12, "TB/s"),
}


def _micro(micro: dict[str, Any]) -> list[str]:
    found = ["| | |", "| --- | ---: |"]
    for name, (text, scale, unit) in _SHOWN.items():
        found.append(f"| {text} | {micro[name] * scale:.2f} {unit} |")
    kinds = list(micro["product"])
    found += ["", "The product (B, H) x (H, 4 H), in a CUDA graph of such products: microseconds, and in"]
    found += ["brackets TFLOP/s.", "", f"| H | B | {' | '.join(kinds)} |", "| ---: | ---: |" + " ---: |" * len(kinds)]
    for name in micro["product"][kinds[0]]:
        b, h = map(int, name.split())
        cells = [f"{(t := micro['product'][k][name]) * 1e6:.1f} ({8 * b * h * h / t / 1e12:.1f})" for k in kinds]
        found.append(f"| {h} | {b} | {' | '.join(cells)} |")
    return found


def _kernels(kernels: dict[str, Any]) -> list[str]:
    """Against the plain loop, in the order of CELLS; then what compute-sanitizer said, and the soak."""
    found = ["The backend `cuda` beside the plain loop: the largest difference, of the largest value.", ""]
    for cell, difference in kernels["differences"].items():
        found.append(f"- {cell}: {difference if isinstance(difference, str) else format(difference, '.1e')}")
    soak = kernels["soak"]
    result = "WRONG" if soak["wrong"] else "always the same bits"
    found += ["", f"{soak['steps']:,} steps beside another stream: {result}."]
    return [*found, "", *(f"- {tool}: {words}" for tool, words in kernels["sanitizer"].items())]


def _suite(suite: dict[str, Any]) -> list[str]:
    ended = f" ({suite['ended']})" if suite["ended"] else ""
    found = [f"{suite['passed']} passed, {suite['failed']} failed, {suite['skipped']} skipped{ended}."]
    return [*found, *(f"- failed: `{name}`" for name in suite["failures"])]


def _times(rows: list[dict[str, Any]]) -> list[str]:
    """Microseconds per step; in brackets how many times faster than the plain loop (median of paired rounds)."""
    ways = list(dict.fromkeys(way for row in rows for way in (row["seconds"] | row["blank"])))
    first = ways[0]
    found = [f"Microseconds per step; in brackets: times faster than the {first} (median of paired rounds).", ""]
    found += [f"| cell | type | H | B | T | {' | '.join(ways)} |", "| --- | --- |" + " ---: |" * (3 + len(ways))]
    notes: dict[str, list[str]] = {}
    for row in rows:
        cells = []
        for way in ways:
            if way in row["seconds"]:
                text = f"{statistics.median(row['seconds'][way]) / row['T'] * 1e6:.1f}"
                if way != first and first in row["seconds"]:
                    ratio = statistics.median(a / b for a, b in zip(row["seconds"][first], row["seconds"][way]))
                    text += f" ({ratio:.1f}x)"
                cells.append(text)
            else:
                cells.append("-")
                notes.setdefault(f"{way}: {row['blank'].get(way, '')}", []).append(row["cell"])
        sizes = f"{row['cell']} | {row['dtype']} | {row['H']} | {row['B']} | {row['T']}"
        found.append(f"| {sizes} | {' | '.join(cells)} |")
    wrong = [f"- {row['cell']} H={row['H']} B={row['B']}: {text}" for row in rows for text in row.get("wrong", [])]
    blank = [f"- {note} ({', '.join(dict.fromkeys(cells))})" for note, cells in notes.items()]
    return [*found, "", *blank, *wrong]
