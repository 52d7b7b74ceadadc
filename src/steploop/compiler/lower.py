"""From a captured step to executables: the forward plan, and the backward plan with what must be kept for it.

The backward half of a joint graph is again a step, running in reversed time, with the cotangents of the
states as its states. Forward values in it depend only on inputs and on states, all known by then, so they
are recomputed batched over time, or were saved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .absorb import is_light_product
from .execute import Executable
from .ir.edit import remove_dead
from .ir.graph import GRADIENTS, ROLES, Size, StepGraph, expression
from .memory_operator import is_whole, own_prevs
from .ops.table import is_random, operation_of
from .partition import loop_nodes, partition
from .passes.manager import find_mixing, hoist, mixing_reasons
from .problem import Partition, Problem, StateNodes, problem_of
from .show_loops import show_loops
from .stages import note, stage

aten = torch.ops.aten
SPREAD = 4  # a value of so many times the bytes of what it is made of is made again, not kept
SAVE_LIMIT = 1 << 30  # bytes that save="auto" may keep beyond the states


def copied(step: StepGraph, *also: list[fx.Node]) -> tuple[StepGraph, list[list[fx.Node]]]:
    """A copy of a step with its own graph; `also`: lists of nodes to be mapped to the copy."""
    graph = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    for node in step.graph.nodes:
        if node.op == "output":
            continue
        twins[node] = graph.node_copy(node, twins.__getitem__)
        twins[node].meta = dict(node.meta)

    def twin(nodes: Sequence[fx.Node | None]) -> list[Any]:
        return [None if n is None else twins[n] for n in nodes]

    lists: dict[str, Any] = {name: twin(getattr(step, name)) for name in ROLES}
    twinned = StepGraph(graph=graph, batch=step.batch, symbols=step.symbols, ends=step.ends, **lists)
    return twinned, [twin(a) for a in also]


# -- forward -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class ForwardPlan:
    """The executable of the forward pass; `step.outputs` are the step's outputs followed by what is saved."""

    step: StepGraph
    executable: Executable
    outputs: int


def lower_forward(
    step: StepGraph, save: Sequence[fx.Node], names: Sequence[str], choose: Callable[..., Any], one_loop: bool
) -> ForwardPlan:
    own, (saved,) = copied(step, list(save))
    for role in ("ct_outputs", "ct_nexts", *GRADIENTS):
        setattr(own, role, [])
    count = len(own.outputs)
    own.outputs = [*own.outputs, *saved]
    remove_dead(own)

    def problem() -> Problem:
        found = problem_of(own, names, mixing_reasons(own), one_loop)
        found.ends = None if save or step.ends is None else own.prevs[step.ends]
        return found

    executable = Executable(improved(own, problem, "forward"), choose)
    note("loops of forward", lambda: show_loops(own, executable.partition, executable.runners))
    return ForwardPlan(own, executable, count)


def improved(step: StepGraph, problem: Callable[[], Problem], name: str) -> Partition:
    """The partition after products and sums have been moved out of loops."""
    problem()
    stage(name, step)
    hoist(step, lambda: loop_nodes(problem()))
    return partition(problem())


# -- backward ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """Which gradients are asked for: one flag per x, constant, initial state, reset value, captured tensor."""

    xs: tuple[bool, ...]
    constants: tuple[bool, ...]
    initial: tuple[bool, ...]
    reset_to: tuple[bool, ...]
    captured: tuple[bool, ...]

    @property
    def any(self) -> bool:
        return any((*self.xs, *self.constants, *self.initial, *self.reset_to, *self.captured))


@dataclass(eq=False)
class Saving:
    """What the forward keeps: forward values of a joint graph, packed.

    prevs: indices of states whose value before every step is needed (their nexts are in `nodes`, or in `again`).
    nodes: what is kept, each once.
    again: what is made again of those, see `replay`.  edges: indices of states that are kept between spans for it.
    """

    prevs: list[int]
    nodes: list[fx.Node]
    again: list[fx.Node] = field(default_factory=list)
    edges: list[int] = field(default_factory=list)


def backward_nodes(step: StepGraph) -> set[fx.Node]:
    """The nodes of a joint graph that depend on cotangents."""
    found = {n for n in (*step.ct_outputs, *step.ct_nexts) if n is not None}
    for node in step.graph.nodes:
        if any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def gradients(step: StepGraph, needs: Needs) -> list[fx.Node]:
    """The gradient nodes that a backward pass must compute: those asked for, and those of states."""
    found = [g for g, n in zip(step.grad_xs, needs.xs) if n]
    found += [g for g, n in zip(step.grad_constants, needs.constants) if n]
    found += [g for g, n in zip(step.grad_captured, needs.captured) if n]
    following = {c: g for c, g in zip(step.ct_nexts, step.grad_prevs)}
    if any((*needs.initial, *needs.reset_to)):
        found += [g for g in step.grad_prevs]
    needed: set[fx.Node] = set()
    stack = [g for g in found if g is not None]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        stack.extend(node.all_input_nodes)
        after = following.get(node)
        if after is not None:
            stack.append(after)
    return [n for n in step.graph.nodes if n in needed]


def choose_saved(step: StepGraph, needs: Needs, policy: str) -> Saving:
    """What the forward keeps for the backward. policy: "states" or "all"."""
    mixing_reasons(step)
    backward = backward_nodes(step)
    needed = gradients(step, needs)
    read = [i for n in needed if n in backward for i in n.all_input_nodes if i not in own_prevs(n)]
    given = set(step.results(*GRADIENTS))
    # In the order of the graph, so that the same step always makes the same kernels.
    inputs = [i for i in read if i not in backward]
    inputs += [n for n in needed if n not in backward and n in given]
    kept = _savable(inputs, step) if policy == "all" else []
    nodes = dict.fromkeys(kept)
    known = set(kept)
    following, nexts = dict(zip(step.prevs, step.nexts)), set(step.nexts)
    prevs: list[int] = []
    stack, seen = list(inputs), set()
    while stack:
        node = stack.pop()
        if node in seen or node in known:
            continue
        seen.add(node)
        if node in following and not _storable(following[node], step):
            known.add(node)  # its next is an input, a constant or another state's prev: keep it as it is
            nodes[node] = None
        elif node in following:
            prevs.append(step.prevs.index(node))
            known.add(following[node])
            nodes[following[node]] = None
        elif _must_keep(node) or (node in nexts and _storable(node, step)):
            known.add(node)
            nodes[node] = None
        else:
            stack.extend(i for i in node.all_input_nodes if i not in own_prevs(node))
    return Saving(sorted(prevs), list(nodes))


def _storable(node: fx.Node, step: StepGraph) -> bool:
    return node.op == "call_function" and node.meta["varies"] and isinstance(node.meta["val"], Tensor)


def _must_keep(node: fx.Node) -> bool:
    """Random numbers can't be drawn again."""
    if not isinstance(node.meta.get("val"), Tensor) or node.op != "call_function":
        return False
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else node
    parts = getattr(node.target, "__name__", "") == "getitem"
    return is_random(node) or (parts and is_random(source))


def _savable(inputs: Iterable[fx.Node], step: StepGraph) -> list[fx.Node]:
    """The values to keep under "all": what the backward reads, seen through operations that cost nothing."""
    found: dict[fx.Node, None] = {}
    nexts = set(step.nexts)
    stack, seen = list(inputs), set()
    while stack:
        node = stack.pop()
        if node in seen or not node.meta["varies"] or node.op != "call_function":
            continue
        seen.add(node)
        free = operation_of(node).cheap or is_whole(node) or _is_spread(node)
        if isinstance(node.meta["val"], Tensor) and node not in nexts and not free:
            found[node] = None
        elif node not in nexts:
            stack.extend(node.all_input_nodes)
    order = {n: i for i, n in enumerate(step.graph.nodes)}
    return sorted(found, key=order.__getitem__)


def _is_spread(node: fx.Node) -> bool:
    """Whether a value has many more numbers than what it is made of, one operation each, as an outer product has."""
    known = operation_of(node)
    if not isinstance(node.meta["val"], Tensor) or known.random or not (known.pointwise or is_light_product(node)):
        return False
    return SPREAD * sum(row_bytes(i) for i in node.all_input_nodes) <= row_bytes(node)



def row_bytes(node: fx.Node) -> int:
    size = node.meta["val"].element_size()
    for s in node.meta["val"].shape:
        size *= 1 if isinstance(s, torch.SymInt) else int(s)
    return size


@dataclass(eq=False)
class BackwardPlan:
    """The executable of the backward pass.

    known: placeholders for what was saved, in the order of `Saving.nodes`, and then of `Saving.again`.
    xs, constants, captured: indices of those whose gradient is wanted (and exists).
    resets: states whose gradient before each step is wanted, after the xs.
    """

    step: StepGraph
    executable: Executable
    saving: Saving
    known: list[fx.Node]
    xs: list[int]
    constants: list[int]
    captured: list[int]
    resets: list[int]
    states: list[int]


def lower_backward(
    step: StepGraph, saving: Saving, needs: Needs, names: Sequence[str], choose: Callable[..., Any], one_loop: bool,
    resets: bool,
) -> BackwardPlan:  # fmt: skip
    own, (known,) = copied(step, [*saving.nodes, *saving.again])
    known = [as_input(own, node) for node in known]
    own.outputs, own.nexts = [], []
    xs = [i for i, (g, n) in enumerate(zip(own.grad_xs, needs.xs)) if n and g is not None]
    constants = [i for i, (g, n) in enumerate(zip(own.grad_constants, needs.constants)) if n and g is not None]
    captured = [i for i, (g, n) in enumerate(zip(own.grad_captured, needs.captured)) if n and g is not None]
    states = [i for i, c in enumerate(own.ct_nexts) if is_differentiable(c.meta["val"].dtype)]
    _add_missing_gradients(own, states)
    reset_states = [i for i in states if resets and needs.reset_to[i]]

    def problem() -> Problem:
        mixing = find_mixing(own)
        grad_prevs: list[Any] = own.grad_prevs
        pairs = {i: StateNodes(own.ct_nexts[i], grad_prevs[i], names[i]) for i in states}
        wanted: list[Any] = [own.grad_xs[i] for i in xs] + [grad_prevs[i] for i in reset_states]
        summed: list[Any] = [own.grad_constants[i] for i in constants] + [own.grad_captured[i] for i in captured]
        finals = [pairs[i] for i in states if needs.initial[i]]
        return Problem(own.graph, own.batch, list(pairs.values()), wanted, summed, finals, mixing,
                       one_loop=one_loop)  # fmt: skip

    for grads, chosen in ((own.grad_xs, xs), (own.grad_constants, constants), (own.grad_captured, captured)):
        grads[:] = [g if i in chosen else None for i, g in enumerate(grads)]
    remove_dead(own)
    executable = Executable(improved(own, problem, "backward"), choose, down=True)
    note("loops of backward", lambda: show_loops(own, executable.partition, executable.runners))
    return BackwardPlan(own, executable, saving, known, xs, constants, captured, reset_states, states)


def as_input(step: StepGraph, node: fx.Node) -> fx.Node:
    """Turns a forward value into an input of its own."""
    with step.graph.inserting_before(next(iter(step.graph.nodes))):
        given = step.graph.placeholder(f"saved_{node.name}")
    given.meta = {k: copy.copy(v) if k == "line" else v for k, v in node.meta.items()}
    given.meta["saved"] = True
    node.replace_all_uses_with(given)
    step.map_results(lambda n: given if n is node else n)
    step.edited()
    return given


def is_differentiable(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _add_missing_gradients(step: StepGraph, states: list[int]) -> None:
    """No gradient flows from a state's next to its prev: the cotangent before the step is zero."""
    output = next((n for n in step.graph.nodes if n.op == "output"), None)
    for i in states:
        if step.grad_prevs[i] is None:
            like = step.ct_nexts[i].meta["val"]
            sizes: list[Any] = [e if isinstance(e, int) else Size(e) for e in map(expression, like.shape)]
            last = output or next(iter(reversed(step.graph.nodes)))
            with step.graph.inserting_before(last) if output else step.graph.inserting_after(last):
                zero = step.graph.call_function(
                    aten.zeros.default, (sizes,), {"dtype": like.dtype, "device": like.device}
                )
            zero.meta.update(val=like, line="")
            step.grad_prevs[i] = zero
