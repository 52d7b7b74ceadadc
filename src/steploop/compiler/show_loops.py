"""What runs before, in and between which loops, as text: names are those of the step graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from ..backends.contract import Runner
from .ir.graph import StepGraph
from .ir.show import Names
from .problem import LoopPart, Partition


def show_loops(step: StepGraph, partition: Partition, runners: Mapping[LoopPart, Runner]) -> str:
    """Segment by segment. A loop is followed by the text of what runs it, where the backend has one."""
    names = Names(step)
    lines = [f"once: {_list(partition.once, names)}"] if partition.once else []
    number = 0
    for segment in partition.segments:
        if not isinstance(segment, LoopPart):
            lines.append(f"all steps at once: {_list(segment.nodes, names)}")
            continue
        number += 1
        states = ", ".join(s.name for s in segment.states) or "no state"
        lines.append(f"loop {number}, {states}: {_list(segment.nodes, names)}")
        lines += [f"  reads {_list(segment.inputs, names)}"] if segment.inputs else []
        lines += [f"  keeps {_list(segment.kept, names)}"] if segment.kept else []
        lines += [f"  | {line}" for line in runners[segment].show().splitlines()]
    return "\n".join(lines) + "\n"


def _list(nodes: Sequence[fx.Node], names: Names) -> str:
    return ", ".join(map(names.of, nodes))
