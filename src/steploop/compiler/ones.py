"""Does a captured step hold where an axis has size 1?

torch's tracer takes it that a free size is at least 2: an axis of size 1 broadcasts, and a step may look at it
(`x.shape[0] > 1`). A capture in this process is made anew for such a size. One that leaves the process can't be: so the
step is traced once more with that size, and both graphs are run on the same random numbers. Where they agree, the
capture holds for it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from .capture import Capture
from .conditions import condition
from .dependencies import Dependencies
from .graph_data import runnable
from .invocation import hints_of
from .ir.graph import ROLES, Size, StepGraph, shape_at, size_at
from .program import Program
from .recorder import Recorder
from .trace import Leaf, Observed, Signature, Trace
from .trace_step import trace_forward, trace_joint

_ROWS = 3  # of a batch that is not one of the sizes in question
_GROUPS = 3  # with so many free sizes, every set of them is tried; else each by itself, and all
_RESULTS = ROLES[ROLES.index("outputs") :]


def allowed_ones(program: Program, capture: Capture, dependencies: Dependencies, training: bool) -> list[list[str]]:
    """The sets of symbols, by name, that may be 1 together."""
    trace = capture.joint if training else capture.forward
    assert trace is not None
    groups = _groups(trace)
    counts = range(1, len(groups) + 1) if len(groups) <= _GROUPS else (1, len(groups))
    found = []
    for count in counts:
        for chosen in combinations(groups, count):
            ones = sorted(name for group in chosen for name in group)
            if _holds(program, capture, dependencies, trace, training, ones):
                found.append(ones)
    return found


def _groups(trace: Trace) -> list[set[str]]:
    """The symbols of a trace, those together that its conditions say are equal."""
    groups = [{name} for name, *_ in trace.symbols]
    for one in trace.conditions:
        if isinstance(one, sympy.Eq) and all(isinstance(a, sympy.Symbol) for a in one.args):
            joined = [g for g in groups if g & {str(a) for a in one.args}]
            groups = [g for g in groups if g not in joined] + [set().union(*joined)]
    return groups


def _holds(
    program: Program, capture: Capture, dependencies: Dependencies, trace: Trace, training: bool, ones: list[str]
) -> bool:
    sizes = hints_of(trace, capture.signature)
    rows = str(trace.graph.batch)
    if rows in sizes and condition(trace.conditions)({**sizes, rows: _ROWS}):
        sizes[rows] = _ROWS
    sizes.update(dict.fromkeys(ones, 1))
    real = capture.tensors(dependencies, joint=training)
    try:
        signature = _signature_at(capture.signature, trace, sizes)
        again = trace_forward(program, signature, False, Observed(Recorder()))
        if training:
            wanted = [t for t in real if t.requires_grad]
            again = trace_joint(program, signature, False, again.graph, wanted, Observed(Recorder()))
        values = _Values()
        first = _results(trace.graph, real, sizes, values)
        tensors: Any = again.tensors
        return _same(first, _results(again.graph, tensors, {}, values))
    except Exception:  # whatever it is that this size does to the step, the capture does not know it
        return False


def _signature_at(signature: Signature, trace: Trace, sizes: dict[str, int]) -> Signature:
    """The signature with numbers for all sizes."""
    at = {(kind, index, dim): sizes[name] for name, kind, index, dim in trace.symbols}
    rows = at.get(("batch", 0, 0), signature.batch)

    def leaf(kind: str, index: int, old: Leaf) -> Leaf:
        sizes = enumerate(old.shape)
        shape: list[Any] = [rows if d == 0 and old.batched else at.get((kind, index, d), n) for d, n in sizes]
        return replace(old, shape=tuple(shape))

    groups = (("x", signature.xs), ("constant", signature.constants), ("state", signature.states))
    xs, constants, states = ([leaf(kind, i, old) for i, old in enumerate(group)] for kind, group in groups)
    return Signature(xs, constants, states, rows)


class _Values:
    """Random numbers for inputs: the same for the same input of both graphs."""

    def __init__(self) -> None:
        self.made: dict[Any, Tensor] = {}

    def of(self, key: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if key not in self.made:
            generator = torch.Generator("cpu").manual_seed(len(self.made))
            if dtype.is_floating_point or dtype.is_complex:
                value = torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu").to(dtype)
            else:
                value = torch.randint(0, 2, tuple(shape), generator=generator, device="cpu").to(dtype)
            self.made[key] = value.to(device)
        return self.made[key]


def _results(graph: StepGraph, real: Sequence[Tensor], sizes: dict[str, int], values: _Values) -> list[Tensor | None]:
    """What a step gives, in all its roles, for random inputs."""
    known: dict[fx.Node, Any] = {}
    for role in ("xs", "constants", "prevs", "ct_outputs", "ct_nexts"):
        for i, node in enumerate(getattr(graph, role)):
            if node is not None and node not in known:
                like = node.meta["val"]
                shape = shape_at(like, sizes)
                known[node] = values.of((role, i), shape, like.dtype, like.device)
    for node, tensor in zip(graph.captured, real, strict=True):
        if isinstance(tensor, FakeTensor):  # somebody else's trace: its numbers are not there
            tensor = values.of(id(tensor), [int(s) for s in tensor.shape], tensor.dtype, tensor.device)
        known[node] = tensor.detach()
    with torch.no_grad(), torch._C._DisableAutocast(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for node in graph.graph.nodes:
            if node.op == "call_function":
                known[node] = _call(node, known, sizes)
    roles = [n for role in _RESULTS for n in getattr(graph, role) if not role.startswith("ct_")]
    return [None if n is None else known[n] for n in roles]


def _call(node: fx.Node, known: dict[fx.Node, Any], sizes: dict[str, int]) -> Any:
    def value(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return known[argument]
        if isinstance(argument, Size):
            return size_at(argument.expr, sizes)
        return [value(a) for a in argument] if isinstance(argument, (list, tuple)) else argument

    args, kwargs = [value(a) for a in node.args], {k: value(v) for k, v in node.kwargs.items()}
    if node.target is operator.getitem:
        return args[0][args[1]]
    return runnable(node.target)(*args, **kwargs)


def _same(first: Iterable[Tensor | None], second: Iterable[Tensor | None]) -> bool:
    pairs = list(zip(first, second, strict=True))
    for a, b in pairs:
        if a is None or b is None:
            # A gradient that is none in one of them is zero.
            there = [t for t in (a, b) if t is not None]
            if any(t.any() for t in there):
                return False
        elif a.shape != b.shape or a.dtype != b.dtype:
            return False
        elif a.is_floating_point() or a.is_complex():
            exact = a.dtype in (torch.float64, torch.complex128)
            close = 1e-8 if exact else 1e-2 if a.dtype in (torch.float16, torch.bfloat16) else 1e-3
            if not torch.allclose(a, b, rtol=close, atol=close, equal_nan=True):
                return False
        elif not torch.equal(a, b):
            return False
    return True
