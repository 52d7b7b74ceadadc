"""Splits a step graph into what runs before, in, between and after loops.

Add an edge from every state's `next` to its `prev`: the strongly connected components of that graph (Tarjan
1972) are what must run one step after the other; everything else is batched over time. This is loop
distribution (Allen & Kennedy 1984) on tensor programs. A value read through `prev` outside the component
that computes it is a shift by one step.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from .extract import extract
from .memory_operator import is_memory
from .problem import BatchedPart, LoopPart, Partition, Problem, StateNodes

aten = torch.ops.aten


def components(nodes: Iterable[Any], successors: dict[Any, list[Any]]) -> list[list[Any]]:
    """Strongly connected components in reverse topological order (Tarjan 1972, without recursion)."""
    index: dict[Any, int] = {}
    low: dict[Any, int] = {}
    on_stack: set[Any] = set()
    stack: list[Any] = []
    found: list[list[Any]] = []
    for root in nodes:
        if root in index:
            continue
        work = [(root, iter(successors.get(root, ())))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for child in rest:
                if child not in index:
                    index[child] = low[child] = len(index)
                    stack.append(child)
                    on_stack.add(child)
                    work.append((child, iter(successors.get(child, ()))))
                    break
                if child in on_stack:
                    low[node] = min(low[node], index[child])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component = []
                    while True:
                        member = stack.pop()
                        on_stack.discard(member)
                        component.append(member)
                        if member is node:
                            break
                    found.append(component)
    return found


def needed_nodes(problem: Problem) -> set[fx.Node]:
    """What the wanted values depend on, within a step and through states."""
    following = {s.prev: s.next for s in problem.states}
    needed: set[fx.Node] = set()
    stack = [*problem.wanted, *problem.summed, *(s.next for s in problem.finals)]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        stack.extend(node.all_input_nodes)
        if node in following:
            stack.append(following[node])
    return needed


def recurrent_components(problem: Problem, needed: set[fx.Node]) -> list[list[fx.Node]]:
    """The components that must loop, each in graph order; nodes that can't be batched are forced into one."""
    order = {n: i for i, n in enumerate(problem.graph.nodes)}
    nodes = [n for n in problem.graph.nodes if n in needed]
    if problem.one_loop:
        prevs = {s.prev for s in problem.states}
        whole = [
            n for n in nodes
            if n in prevs or (n.op == "call_function" and n.meta["varies"] and not is_contracted(n))
        ]  # fmt: skip
        return [whole] if whole else []
    successors: dict[fx.Node, list[fx.Node]] = {n: [u for u in n.users if u in needed] for n in nodes}
    states = [s for s in problem.states if s.prev in needed]
    for state in states:
        successors.setdefault(state.next, []).append(state.prev)
    found = []
    own = {s.prev for s in states if s.next is s.prev}
    for component in components(nodes, successors):
        calls = [n for n in component if n.op == "call_function"]
        forced = any(n in problem.stepwise or is_memory(n) for n in calls)
        if len(component) > 1 or component[0] in own or forced:
            # The parts of a result with several parts are taken where it is made.
            parts = {u for n in component for u in n.users if u.target is operator.getitem and u in needed}
            found.append(sorted({*component, *parts}, key=order.__getitem__))
    taken: set[fx.Node] = set()
    for component in found:
        component[:] = [n for n in component if n not in taken]
        taken.update(component)
    return [c for c in found if c]


def is_contracted(node: fx.Node) -> bool:
    """Whether all that a call gives are sums over the rows of the batch."""
    rows, contracted = node.meta["rows"], node.meta["contracted"]
    return contracted is True or (isinstance(contracted, tuple) and any(contracted) and not any(rows))


def loop_nodes(problem: Problem) -> set[fx.Node]:
    """Every node that is in some loop."""
    return {n for c in recurrent_components(problem, needed_nodes(problem)) for n in c}


def partition(problem: Problem) -> Partition:
    needed = needed_nodes(problem)
    loops = recurrent_components(problem, needed)
    delayed = _delay_outside_reads(problem, loops, needed)
    needed |= set(delayed)
    inside: dict[fx.Node, int] = {n: i for i, c in enumerate(loops) for n in c}
    once = [n for n in problem.graph.nodes if n in needed and n.op == "call_function" and not n.meta["varies"]]
    segments = _order(problem, loops, inside, needed, delayed)
    result = Partition(problem, once, segments, delayed)
    for loop in result.loops:
        extract(loop, problem, result)
    return result


def _delay_outside_reads(
    problem: Problem, loops: list[list[fx.Node]], needed: set[fx.Node]
) -> dict[fx.Node, StateNodes]:
    """A prev that is read outside its own loop becomes a node of its own: the sequence of nexts, shifted."""
    home = {n: i for i, c in enumerate(loops) for n in c}
    delayed: dict[fx.Node, StateNodes] = {}
    for state in problem.states:
        prev = state.prev
        if prev not in needed:
            continue
        outside = [u for u in prev.users if u in needed and home.get(u, -1) != home.get(prev, -2)]
        results = prev in problem.wanted or prev in problem.summed
        following = any(s.next is prev and home.get(s.prev, -1) != home.get(prev, -2) for s in problem.states)
        if prev not in home:
            delayed[prev] = state
        elif outside or results or following:
            with problem.graph.inserting_after(prev):
                shifted = problem.graph.placeholder(f"{prev.name}_delayed")
            shifted.meta.update(prev.meta)
            for user in outside:
                user.replace_input_with(prev, shifted)
            problem.wanted[:] = [shifted if n is prev else n for n in problem.wanted]
            problem.summed[:] = [shifted if n is prev else n for n in problem.summed]
            for s in problem.states:
                if s.next is prev and home.get(s.prev, -1) != home[prev]:
                    s.next = shifted
            delayed[shifted] = state
    return delayed


def _order(
    problem: Problem, loops: list[list[fx.Node]], inside: dict[fx.Node, int], needed: set[fx.Node],
    delayed: dict[fx.Node, StateNodes],
) -> list[BatchedPart | LoopPart]:  # fmt: skip
    """Batched calls as early as they are needed, loops as soon as they can run."""
    by_prev = {s.prev: s for s in problem.states}
    outside = [
        n for n in problem.graph.nodes
        if n in needed and n not in inside and (n in delayed or (n.op == "call_function" and n.meta["varies"]))
    ]
    needs: dict[Any, set[Any]] = {}
    for node in outside:
        sources = [delayed[node].next] if node in delayed else node.all_input_nodes
        needs[node] = {inside.get(s, s) for s in sources}
    members = set(outside)
    for i, component in enumerate(loops):
        own = set(component)
        sources = {s for n in component for s in n.all_input_nodes if s not in own}
        sources |= {by_prev[n].next for n in component if n in by_prev} - own
        needs[i] = {inside.get(s, s) for s in sources}
    for unit, sources in needs.items():
        needs[unit] = {s for s in sources if isinstance(s, int) or s in members} - {unit}
    useful = _ancestors_of_loops(needs, len(loops))
    done: set[Any] = set()
    segments: list[BatchedPart | LoopPart] = []
    waiting_loops = list(range(len(loops)))[::-1]
    pending = [n for n in outside if n in useful]
    while waiting_loops:
        ready, progress = [], True
        while progress:
            progress = False
            for node in [n for n in pending if needs[n] <= done]:
                ready.append(node)
                done.add(node)
                progress = True
            pending = [n for n in pending if n not in done]
        if ready:
            segments.append(BatchedPart(ready))
        chosen = next(i for i in waiting_loops if needs[i] <= done)
        waiting_loops.remove(chosen)
        done.add(chosen)
        component = loops[chosen]
        states = [by_prev[n] for n in component if n in by_prev]
        segments.append(LoopPart([n for n in component if n.op == "call_function"], states))
    rest = [n for n in outside if n not in done]
    ordered: list[fx.Node] = []
    while rest:
        ready = [n for n in rest if needs[n] <= done]
        if not ready:
            raise AssertionError("the step graph has a cycle outside its loops")
        ordered.extend(ready)
        done.update(ready)
        rest = [n for n in rest if n not in done]
    if ordered:
        segments.append(BatchedPart(ordered))
    return segments


def _ancestors_of_loops(needs: dict[Any, set[Any]], count: int) -> set[Any]:
    found: set[Any] = set()
    stack: list[Any] = list(range(count))
    while stack:
        unit = stack.pop()
        for source in needs.get(unit, ()):
            if source not in found:
                found.add(source)
                stack.append(source)
    return found
