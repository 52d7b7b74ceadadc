"""Copies a loop of a partition into a graph of its own, with what it reads as inputs."""

from __future__ import annotations

from torch import Tensor, fx

from .ir.graph import LoopInput, LoopProgram
from .ops.table import is_factory
from .problem import LoopPart, Partition, Problem, StateNodes


def extract(loop: LoopPart, problem: Problem, result: Partition) -> None:
    """Copies a component into a graph of its own, with what it reads as inputs."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[LoopInput] = []
    own = {*loop.nodes, *(s.prev for s in loop.states)}
    prevs = []
    for state in loop.states:
        prevs.append(_copy_placeholder(graph, state.prev, copies))
    body = _with_constants(loop.nodes, own, loop.states)
    for node in body:
        for source in node.all_input_nodes:
            if source not in own and source not in copies and source not in body:
                copies[source] = _input(graph, source, inputs)
                loop.inputs.append(source)
    for state in loop.states:
        if state.next not in own and state.next not in copies:
            copies[state.next] = _input(graph, state.next, inputs)
            loop.inputs.append(state.next)
    for node in body:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
    loop.kept = _kept(loop, own, problem, result)
    kept = [copies[n] for n in loop.kept]
    nexts = [copies[s.next] for s in loop.states]
    graph.output((nexts, kept))
    ends = next((i for i, s in enumerate(loop.states) if s.prev is problem.ends), None)
    loop.program = LoopProgram(
        graph=graph, batch=problem.batch, prevs=prevs, nexts=nexts, inputs=inputs, kept=kept,
        names=[s.name for s in loop.states], mixes_rows=any(n in problem.stepwise for n in loop.nodes),
        ends=ends,
    )  # fmt: skip


def _with_constants(nodes: list[fx.Node], own: set[fx.Node], states: list[StateNodes]) -> list[fx.Node]:
    """The calls of a loop, and before them the constants made of sizes that they read."""
    extra: dict[fx.Node, None] = {}
    for node in [*nodes, *(s.next for s in states)]:
        for source in [*node.all_input_nodes, node]:
            if source not in own and is_factory(source) and source.meta.get("rows") is not None:
                if all(i in own for i in source.all_input_nodes) or not source.all_input_nodes:
                    extra[source] = None
    free = [n for n in extra if not n.all_input_nodes]
    return free + list(nodes)


def _copy_placeholder(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    copy = graph.placeholder(node.name)
    copy.meta = dict(node.meta)
    copies[node] = copy
    return copy


def _input(graph: fx.Graph, source: fx.Node, inputs: list[LoopInput]) -> fx.Node:
    with graph.inserting_after(graph._root):
        node = graph.placeholder(source.name)
    node.meta = dict(source.meta)
    kind = "step" if source.meta["varies"] else "once"
    inputs.append(LoopInput(node, kind, source.meta["rows"], source.name))
    return node


def _kept(loop: LoopPart, own: set[fx.Node], problem: Problem, result: Partition) -> list[fx.Node]:
    """Values of a loop that are read outside it."""
    wanted = {*problem.wanted, *problem.summed, *(s.next for s in result.delayed.values())}
    foreign = {s.next for s in problem.finals if s.prev not in own}
    calls = {n for s in result.segments for n in s.nodes}
    kept = []
    for node in [*loop.nodes, *(s.prev for s in loop.states)]:
        if node in loop.also_outside:
            continue
        outside = any(u not in own and u in calls for u in node.users)
        if (outside or node in wanted or node in foreign) and isinstance(node.meta.get("val"), Tensor):
            kept.append(node)
    return kept
