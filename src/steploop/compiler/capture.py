"""Runs a step once on fake tensors and records it, alone or together with its gradient.

The gradient is asked for inside the trace, of the user's own function, so that no_grad regions, detach,
custom autograd.Functions and surrogate gradients keep their meaning. Parameters and closed-over tensors are
not swapped for anything: the trace meets the real ones, and they become inputs of the graph afterwards.
The batch size is a symbol from the start, with a size nothing else has.
"""

from __future__ import annotations

import logging
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import sympy
import torch
import torch.utils.checkpoint
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode, dispatch_functionalize
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    SLoc,
    StatelessSymbolicContext,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.reference import PythonReferenceAnalysis

from ..errors import StepError, SteploopError, describe
from . import forward_mode
from .dependencies import Number
from .distributions import without_checks
from .fake_tensors import Fakes
from .forget import forget_dispatch, forget_shapes, forget_with
from .free_numbers import FUNCTIONS, FreeFloat, FreeNumber, NotFree, Symbols, has_symbols, is_float, lift
from .inplace import changes_in_place, make_functional, writes_real_tensor
from .ir.graph import Size, StepGraph, expression
from .passes.gradients import FIRST_FACTOR, factor_for_gradients
from .program import Program
from .recorder import Recorder, tensors_read
from .refusals import asks_for_gradient, is_user_file, own_operations, refusal, refused_call
from .sizes_by_value import sizes_by_value
from .sources import line_of_frame
from .stages import stage
from .traced_as import TRACED_AS
from .trial import refused_dtypes

BATCH_HINT = 1031  # a prime that no feature size is likely to have


@dataclass(frozen=True)
class Leaf:
    """What is known of an input before it is captured. shape: of one step, the batch included."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    batched: bool

    @staticmethod
    def of(tensor: Tensor, batched: bool, per_step: bool = False) -> Leaf:
        shape = tuple(int(s) for s in (tensor.shape[1:] if per_step else tensor.shape))
        return Leaf(shape, tensor.dtype, tensor.device, batched)


@dataclass(eq=False)
class Signature:
    """The leaves that a capture is made for, and which of their axes besides the batch are symbols.

    dynamic: (kind, index, dim) of axes that were seen with several sizes; kind "x", "constant" or "state".
    batch: the B of the call, used where a symbolic batch is impossible; None: no batch axis is known.
    batch_hint: what a symbolic batch answers where it is compared with a number.
    """

    xs: list[Leaf]
    constants: list[Leaf]
    states: list[Leaf]
    batch: int | None
    dynamic: frozenset[tuple[str, int, int]] = frozenset()
    batch_hint: int = BATCH_HINT


@dataclass(eq=False)
class Trace:
    """A captured graph, the real tensors it met (in the order of `graph.captured`), and its conditions on sizes.

    tensors: the real tensors, then what the tensors of free Python floats are made of.
    holds_for: whether the conditions hold for sizes by the names of symbols, and for floats by their paths.
    numbers: the calls that were traced, each with the floats in it, before anything was simplified.
    batched: the graph in the form for all steps at once, once it was asked for.
    conditions: those of the conditions that are on sizes alone.
    """

    graph: StepGraph
    tensors: list[Tensor | FreeNumber]
    holds_for: Callable[[dict[str, int], dict[str, float]], bool]
    out_spec: Any
    numbers: list[tuple[Any, list[float]]] = field(default_factory=list)
    keep_alive: list[Any] = field(default_factory=list)
    inlined: list[str] = field(default_factory=list)
    batched: StepGraph | None = None
    conditions: list[sympy.Expr] = field(default_factory=list)

    @cached_property
    def symbols(self) -> list[tuple[str, str, int, int]]:
        """(name, kind of input, index, dim) of every symbol: printing a symbol takes its time."""
        return [(str(symbol), *place) for symbol, place in self.graph.symbols.items()]


@dataclass(frozen=True)
class Observed:
    """What a trace is to note beside the graph, and which Python floats are to be inputs of it."""

    recorder: Recorder = field(default_factory=Recorder)
    free: Sequence[Number] = ()


def trace_forward(
    program: Program, signature: Signature, symbolic: bool, observed: Observed | None = None
) -> Trace:
    return _trace(program, signature, symbolic, None, observed or Observed())


@dataclass(frozen=True)
class Wanted:
    """What a joint trace is to add to a forward one: gradients of these tensors, given cotangents like its results."""

    tensors: list[Tensor]
    forward: StepGraph


def trace_joint(
    program: Program, signature: Signature, symbolic: bool, forward: StepGraph, tensors: Sequence[Tensor],
    observed: Observed | None = None,
) -> Trace:  # fmt: skip
    """Forward and gradient in one graph. `tensors`: what the forward trace met; gradients are asked for those
    that require them."""
    wanted = Wanted([t for t in tensors if t.requires_grad], forward)
    return _trace(program, signature, symbolic, wanted, observed or Observed())


def _trace(
    program: Program, signature: Signature, symbolic: bool, wanted: Wanted | None, observed: Observed
) -> Trace:
    # Under another trace (a loop inside a step) this one must see none of the outer modes. functorch stays as it
    # is: a step may use torch.func inside itself.
    _inner.append([])
    try:
        with (
            _disable_current_modes(), _quiet(), _no_autocast_cache(), _no_saved_tensors_hooks(), without_checks(),
            _no_anomalies(), _nothing_compiled(), _nothing_checkpointed(), forward_mode.switched_off(),
            sizes_by_value(),
        ):  # fmt: skip
            trace = _Tracer(program, signature, symbolic, wanted, observed).run()
        trace.keep_alive.extend(_inner[-1])
        stage("capture" if wanted is None else "capture with gradient", trace.graph, recorded=True)
    finally:
        _inner.pop()
        forget_shapes()
    forget_with(trace)
    return trace


# What the traces that are running (one inside the other) must keep alive.
_inner: list[list[Any]] = []


def is_tracing() -> bool:
    """Whether a step is being traced."""
    return bool(_inner)


def keep_with_trace(value: Any) -> None:
    """Keeps something alive as long as the trace that is running: a graph names an inner loop by number only."""
    if _inner:
        _inner[-1].append(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """An error in a step is raised; torch's tracer need not log it as well, least of all where it is only tried."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _no_saved_tensors_hooks() -> Iterator[None]:
    """What a trace saves for its own gradient is none of the hooks' business (activation checkpointing counts)."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


@contextmanager
def _no_anomalies() -> Iterator[None]:
    """Anomaly detection looks at the values of gradients. Those of the whole loop it sees all the same."""
    enabled, check_nan = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    torch.set_anomaly_enabled(False, False)
    try:
        yield
    finally:
        torch.set_anomaly_enabled(enabled, check_nan)


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """What a step has compiled with torch.compile runs as it was written: it is compiled with the rest of the step."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch._dynamo.config.patch(error_on_nested_fx_trace=False):
        yield


@contextmanager
def _nothing_checkpointed() -> Iterator[None]:
    """What a step checkpoints (in the reentrant way, which has a backward pass of its own) is run as it stands: what is
    kept for the backward is decided for the whole step."""
    function = torch.utils.checkpoint.CheckpointFunction
    outer = vars(function).get("apply")  # that of a trace around this one
    function.apply = lambda run, _preserve, *args: run(*args)
    try:
        yield
    finally:
        if outer is None:
            del function.apply
        else:
            function.apply = outer


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Autocast keeps casts of weights: a trace may neither read real ones from there nor leave fake ones."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


class Sizes(ShapeEnv):
    """Symbols for sizes, which do not note where in the code each came up: torch would import all of torch.export for
    it, and look at every frame of the stack."""

    batch: sympy.Symbol | None = None

    def _set_replacement(self, *given: Any) -> None:
        """A step that needs the number of rows (`for row in x`) is left at once: it may go on for all of the hint's."""
        super()._set_replacement(*given)
        if self.batch is not None and self.replace(self.batch) != self.batch:
            raise FixedBatch("the step fixes the batch size")

    def _get_stack_summary(self, *_args: Any, **_options: Any) -> tuple[SLoc, str]:
        return SLoc(None, None), ""


class _Tracer:
    def __init__(
        self, program: Program, signature: Signature, symbolic: bool, wanted: Wanted | None, observed: Observed
    ):
        self.program, self.signature, self.wanted = program, signature, wanted
        self.recorder = observed.recorder
        self.env = Sizes(duck_shape=False, allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        self.mode = Fakes(shape_env=self.env, allow_non_fake_inputs=True)
        self.symbols: dict[sympy.Symbol, tuple[str, int, int]] = {}
        self.sizes: dict[sympy.Symbol, torch.SymInt] = {}
        self.floats = Symbols(self.env, observed.free)
        self.batch: Any = None
        if signature.batch is not None:
            self.batch = self._symbol(self.signature.batch_hint, ("batch", 0, 0)) if symbolic else signature.batch
        self.symbolic = symbolic and signature.batch is not None
        self.env.batch = self.batch.node.expr if self.symbolic else None
        self.counts = (len(signature.xs), len(signature.constants), len(signature.states))
        self.shape_of_result: dict[str, Any] = {}

    def run(self) -> Trace:
        lines = self.lines = _Lines(self.recorder)
        function = self._forward if self.wanted is None else self._joint

        def traced(*arguments: Any) -> list[Tensor]:
            count = len(arguments) - len(self.floats.symbols)
            with self.floats.standing_in(arguments[count:]), lines:
                return function(*arguments[:count])

        try:
            leaves = [*self._fakes(), *self.floats.symbols]
            # (lazy: nobody runs the traced module, so torch need not compile it, nor keep its source)
            with enable_python_dispatcher(), self.mode, _use_lazy_graph_module(True):
                functional = dispatch_functionalize(traced, FunctionalTensorMode())
                module = make_fx(functional, tracing_mode="real", _error_on_data_dependent_ops=True)(*leaves)
        except (SteploopError, FixedBatch):
            raise
        except Exception as error:
            refused = lines.refused or refusal(error, lines.failed)
            if refused is None:
                raise
            raise refused from error
        finally:
            forget_dispatch(self.mode)
        if lines.refused is not None:
            raise lines.refused
        lines.settle(module.graph)
        make_functional(module.graph)
        return self._finish(module)

    # -- the function that is traced -----------------------------------------------------------------------

    def _forward(self, *leaves: Tensor) -> list[Tensor]:
        outputs, nexts = self._step([leaf.clone() for leaf in leaves])
        self.shape_of_result = {"outputs": len(outputs), "nexts": len(nexts)}
        return [_own(v) for v in (*outputs, *nexts)]

    def _step(self, leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        x, c, _ = self.counts
        with self.recorder:
            outputs, nexts = self.program.run(leaves[:x], leaves[x : x + c], leaves[x + c :])
        self.out_spec = self.program.out_spec
        if any(map(has_symbols, getattr(self.out_spec, "leaves", ()))):
            raise NotFree(set(self.floats.paths.values()))  # a number that the step returns as it is
        return list(outputs), list(nexts)

    def _joint(self, *leaves: Tensor) -> list[Tensor]:
        total = sum(self.counts)
        with torch.enable_grad():
            inputs = [leaf.detach() for leaf in leaves[:total]]
            for leaf in inputs:
                if leaf.is_floating_point() or leaf.is_complex():
                    leaf.requires_grad_()
            # The step gets copies: it may write into what it is given, and a leaf can't be written.
            outputs, nexts = self._step([leaf.clone() for leaf in inputs])
            results = [*outputs, *nexts]
            tracked = [i for i, r in enumerate(results) if r.requires_grad]
            cotangents = self._cotangents(results, leaves[total:])
            targets = [leaf for leaf in inputs if leaf.requires_grad] + self.wanted.tensors
            gradients: list[Tensor | None] = [None] * len(targets)
            if tracked and targets:
                self.lines.follow([results[i] for i in tracked])
                gradients = list(
                    torch.autograd.grad(
                        [results[i] for i in tracked], targets, [cotangents[i] for i in tracked],
                        allow_unused=True,
                    )
                )
        self._remember_gradients(inputs, gradients)
        self.shape_of_result["outputs"], self.shape_of_result["nexts"] = len(outputs), len(nexts)
        return [_own(r) for r in results] + [_own(g) for g in gradients if g is not None]

    def _cotangents(self, results: list[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
        if len(given) != len(results):
            raise StepError("the step returned another number of values the second time it was run")
        return list(given)

    def _remember_gradients(self, inputs: list[Tensor], gradients: list[Tensor | None]) -> None:
        present, found = iter(gradients), []
        for leaf in inputs:
            found.append(leaf.requires_grad and next(present) is not None)
        x, c, _ = self.counts
        self.shape_of_result.update(
            grad_xs=found[:x], grad_constants=found[x : x + c], grad_prevs=found[x + c :],
            grad_captured=[g is not None for g in present],
        )

    # -- fake inputs ---------------------------------------------------------------------------------------

    def _symbol(self, hint: int, origin: tuple[str, int, int]) -> torch.SymInt:
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        with torch.no_grad():
            fake = self.mode.from_tensor(torch.empty(hint, device="meta"), symbolic_context=context)
        size = fake.shape[0]
        self.symbols[size.node.expr] = origin
        self.sizes[size.node.expr] = size
        return size

    def _fakes(self) -> list[Tensor]:
        leaves = []
        s = self.signature
        for kind, group in (("x", s.xs), ("constant", s.constants), ("state", s.states)):
            for index, leaf in enumerate(group):
                leaves.append(self._fake(leaf, kind, index))
        if self.wanted is not None:
            forward = self.wanted.forward
            for value in (n.meta["val"] for n in (*forward.outputs, *forward.nexts)):
                with self.mode:
                    shape = [self._here(size) for size in value.shape]
                    leaves.append(torch.empty(shape, dtype=value.dtype, device=value.device))
        return leaves

    def _here(self, size: Any) -> Any:
        """A size of the forward trace, by the symbols of this one."""
        expr = expression(size)
        if isinstance(expr, int):
            return expr
        known = {place: self.sizes[symbol] for symbol, place in self.symbols.items()}
        values = {s: known[self.wanted.forward.symbols[s]] for s in expr.free_symbols}
        return sympy_interp(PythonReferenceAnalysis, values, expr)

    def _fake(self, leaf: Leaf, kind: str, index: int) -> Tensor:
        shape: list[Any] = list(leaf.shape)
        for dim in range(len(shape)):
            if dim == 0 and leaf.batched and self.batch is not None:
                shape[dim] = self.batch
            elif (kind, index, dim) in self.signature.dynamic and shape[dim] > 1:
                shape[dim] = self._symbol(shape[dim], (kind, index, dim))
        with self.mode:
            return torch.empty(shape, dtype=leaf.dtype, device=leaf.device)

    # -- from the traced module to a StepGraph -------------------------------------------------------------

    def _finish(self, module: fx.GraphModule) -> Trace:
        batch = None
        if self.symbolic:
            batch = self.batch.node.expr
            if batch not in self.symbols:
                raise FixedBatch("the step fixes the batch size")
        captured = _Captured(module)
        graph = _rebuild(module.graph, captured, self.env)
        inputs = [n for n in graph.nodes if n.op == "placeholder"][len(captured.tensors) :]
        calls = [(n.target, self.floats.values_in(n)) for n in graph.nodes if n.op == "call_function"]
        made, numbers = lift(graph, self.floats, next(iter(inputs), None))
        placeholders = [n for n in graph.nodes if n.op == "placeholder" and n not in made]
        real = placeholders[: len(captured.tensors)]
        inputs = placeholders[len(captured.tensors) :]
        x, c, s = self.counts
        results = list(next(n for n in graph.nodes if n.op == "output").args[0])
        step = StepGraph(
            graph=graph, batch=batch, symbols=self.symbols,
            xs=inputs[:x], constants=inputs[x : x + c], prevs=inputs[x + c : x + c + s], captured=real,
            outputs=results[: self.shape_of_result["outputs"]],
            nexts=results[self.shape_of_result["outputs"] :][:s], ends=self.program.ends,
        )  # fmt: skip
        self._name(step)
        step.captured.extend(made)
        self._try_dtypes(step)
        if self.wanted is not None:
            self._add_gradients(step, inputs[x + c + s :], results[len(step.outputs) + s :], captured, len(made))
        paths = self.floats.paths
        factor_for_gradients(step)
        holds = condition(conditions_of(self.env, {*self.symbols, *paths}), paths)
        sizes = conditions_of(self.env, set(self.symbols))
        tensors = [*captured.tensors, *numbers]
        return Trace(step, tensors, holds, self.out_spec, calls, conditions=sizes)

    def _try_dtypes(self, step: StepGraph) -> None:
        sizes = {str(symbol): 2 if symbol == step.batch else int(self.env.backed_var_to_val[symbol])
                 for symbol in self.symbols}  # fmt: skip
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            found = refused_dtypes(step, sizes)
        if found is not None:
            node, text = found
            raise refused_call(node, text)

    def _name(self, step: StepGraph) -> None:
        """Gives inputs the names that the user knows them by, so that printed code can be read."""
        program = self.program
        for nodes, names, kind in (
            (step.xs, program.x_names, "x"), (step.constants, program.constant_names, "const"),
            (step.prevs, program.state_names, "prev"),
        ):  # fmt: skip
            for node, name in zip(nodes, names):
                node._rename(f"{kind}_{re.sub(r'[^0-9A-Za-z]+', '_', name)}")

    def _add_gradients(
        self, step: StepGraph, cts: list, gradients: list, captured: _Captured, numbers: int
    ) -> None:
        step.ct_outputs, step.ct_nexts = cts[: len(step.outputs)], cts[len(step.outputs) :]
        left = iter(gradients)
        marks = self.shape_of_result
        step.grad_xs = [next(left) if m else None for m in marks["grad_xs"]]
        step.grad_constants = [next(left) if m else None for m in marks["grad_constants"]]
        step.grad_prevs = [next(left) if m else None for m in marks["grad_prevs"]]
        by_tensor = {id(t): next(left) for t, m in zip(self.wanted.tensors, marks["grad_captured"]) if m}
        step.grad_captured = [*(by_tensor.get(id(t)) for t in captured.tensors), *[None] * numbers]


class FixedBatch(Exception):
    """The captured function only holds for one batch size."""


def _own(value: Tensor) -> Tensor:
    # A result that is an input, or a closed-over tensor, must still be a node of the graph.
    return value.detach().clone() if not value.requires_grad else value.clone()


def conditions_of(env: ShapeEnv, known: set[sympy.Symbol]) -> list[sympy.Expr]:
    """The conditions on known symbols that a trace relied on."""
    guards = [g.expr for g in env.guards]
    return [g for g in guards if g not in (True, sympy.true) and g.free_symbols <= known]


def condition(
    conditions: list[sympy.Expr], floats: Mapping[sympy.Symbol, str] = MappingProxyType({})
) -> Callable[..., bool]:
    """Conditions as one function of {symbol name: size} and of {path of a float: its value}."""
    texts = [PythonPrinter().doprint(g) for g in conditions]
    if not texts:
        return lambda sizes, values=None: True
    code = compile(" and ".join(f"({t})" for t in texts), "<conditions>", "eval")
    names = {str(s): path for s, path in floats.items()}
    return lambda sizes, values=None: bool(
        eval(code, FUNCTIONS, {**sizes, **{n: values[p] for n, p in names.items()}})
    )


class _Captured:
    """The real tensors of a traced module, each once, in the order they were met.

    objects: what else it refers to, by name: random generators, packed weights of quantised layers.
    """

    def __init__(self, module: fx.GraphModule):
        self.tensors: list[Tensor] = []
        self.index: dict[str, int] = {}
        self.objects: dict[str, Any] = {}
        numbers: dict[int, int] = {}
        for node in module.graph.nodes:
            if node.op != "get_attr" or node.target in self.index:
                continue
            tensor = operator.attrgetter(node.target)(module)
            if not isinstance(tensor, Tensor):
                self.objects[node.target] = tensor
                continue
            if isinstance(tensor, FakeTensor):
                tensor = tensor.constant if tensor.constant is not None else tensor
            if id(tensor) not in numbers:
                numbers[id(tensor)] = len(self.tensors)
                self.tensors.append(tensor)
            self.index[node.target] = numbers[id(tensor)]


def _rebuild(graph: fx.Graph, captured: _Captured, env: ShapeEnv) -> fx.Graph:
    """The traced graph with real tensors as inputs, sizes as `Size`, and without copies of whole values."""
    aten = torch.ops.aten
    new = fx.Graph()
    made: dict[fx.Node, Any] = {}
    real = []
    for i in range(len(captured.tensors)):
        node = new.placeholder(f"captured_{i}")
        real.append(node)
    copies = {
        aten.clone.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default,
        aten.lift_fresh.default, aten.lift.default, aten.view_as.default if hasattr(aten, "view_as") else None,
        aten.contiguous.default,
    }  # fmt: skip

    def convert(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return made[argument]
        if isinstance(argument, torch.SymInt):
            return _size(env, argument)
        if isinstance(argument, torch.SymFloat):
            return _plain(argument)
        if isinstance(argument, (list, tuple)):
            return type(argument)(convert(a) for a in argument) if type(argument) in (list, tuple) else [
                convert(a) for a in argument
            ]
        if isinstance(argument, dict):
            return {k: convert(v) for k, v in argument.items()}
        return argument

    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "get_attr" and node.target in captured.objects:
            made[node] = captured.objects[node.target]
        elif node.op == "get_attr":
            made[node] = real[captured.index[node.target]]
            made[node].meta.setdefault("val", captured_value(captured, node, value))
            made[node].meta.setdefault("line", "")
        elif node.op == "placeholder" and isinstance(value, torch.SymFloat):
            made[node] = _plain(value)
        elif node.op == "placeholder":
            made[node] = new.placeholder(node.name)
            made[node].meta.update(val=value, line="")
        elif node.op == "output":
            new.output([convert(a) for a in node.args[0]])
        elif isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
            made[node] = _size(env, value)
        elif isinstance(value, (torch.SymFloat, torch.SymBool, float, bool)) and not _has_tensor(node):
            made[node] = _plain(value)
        elif node.target in copies and not _changes_memory(node):
            made[node] = made[node.args[0]]
        else:
            call = new.call_function(node.target, convert(node.args), convert(dict(node.kwargs)))
            call.meta.update(val=value, line=node.meta.get("line", ""))
            if node.target in FIRST_FACTOR:  # by its strides, which a copy may have changed
                call.meta["contiguous"] = node.args[0].meta["val"].is_contiguous()
            made[node] = call
    return new


def _changes_memory(node: fx.Node) -> bool:
    """Whether a copy is more than the same numbers again.

    It may resolve a tensor that is only marked as conjugate or negative. Or it may lay out a tensor of the step's own
    anew, where an operation after it needs that.
    """
    (source, *_), made = node.args, node.meta.get("val")
    value = source.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(made, Tensor):
        return False
    if value.is_conj() != made.is_conj() or value.is_neg() != made.is_neg():
        return True
    return source.op == "get_attr" and made.is_contiguous() and not value.is_contiguous()


def _has_tensor(node: fx.Node) -> bool:
    return any(isinstance(n.meta.get("val"), Tensor) for n in node.all_input_nodes)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.SymFloat):
        expr = value.node.expr
        # A number made of sizes is fixed here, by a condition on them.
        return FreeFloat(expr) if expr.free_symbols and all(map(is_float, expr.free_symbols)) else float(value)
    return bool(value) if isinstance(value, torch.SymBool) else value


def captured_value(captured: _Captured, node: fx.Node, value: Any) -> Any:
    if value is not None:
        return value
    tensor = captured.tensors[captured.index[node.target]]
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def _size(env: ShapeEnv, value: Any) -> Any:
    expr = env.simplify(expression(value)) if isinstance(value, torch.SymInt) else value
    if any(map(is_float, getattr(expr, "free_symbols", ()))):
        return int(value)  # a size made of a float is fixed here, by a condition on that
    return int(expr) if isinstance(expr, int) or expr.is_number else Size(expr)


# -- source lines --------------------------------------------------------------------------------------------


def _user_line() -> str:
    return line_of_frame(sys._getframe(2))


class _Lines(TorchFunctionMode):
    """Writes the user's source line on every node that is traced, those of the backward pass included.

    A torch call tags the nodes that it made. For the backward pass every autograd node remembers the line of
    the call that made it, and tags the nodes that are traced while it runs.
    """

    belongs_to_a_trace = True

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._tail: fx.Node | None = None
        self._line = ""
        self.refused: StepError | None = None
        self.failed = ""  # the call that torch could not do

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        line = _user_line()
        self._note(function, args)
        if writes_real_tensor(function, args, kwargs or {}):
            # Kept as well: for `x += 1` Python takes a TypeError to mean that it should try x = x + 1.
            self.refused = self.refused or changes_in_place(line)
            raise self.refused
        odd = next((a for a in (*args, *(kwargs or {}).values()) if _is_of_a_user(a)), None)
        if odd is not None:
            self.refused = self.refused or own_operations(type(odd), line)
            raise self.refused
        self._tag(self._line)
        function = TRACED_AS.get(function, function)
        self._recorder.pause()
        try:
            with _disable_current_modes() if self._reads_content(function, args) else nullcontext():
                result = function(*args, **(kwargs or {}))
        except Exception:
            self.failed = self.failed or _called(function, args, kwargs or {})
            raise
        finally:
            self._recorder.go_on()
        self._tag(line)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                tensor.grad_fn.metadata.setdefault("line", line)
        return result

    def _note(self, function: Any, args: tuple[Any, ...]) -> None:
        """What of a call the captured graph will not show."""
        self._recorder.ran(function)
        if getattr(function, "__self__", None) is Tensor.requires_grad and isinstance(args[0], FunctionalTensor):
            frame = sys._getframe(2)
            if is_user_file(frame.f_code.co_filename):
                self.refused = self.refused or asks_for_gradient(frame.f_code.co_filename, frame.f_lineno)
                raise self.refused

    def _reads_content(self, function: Any, args: tuple[Any, ...]) -> bool:
        """Whether a call makes Python numbers of tensors of the user's alone; they are noted, and looked at later."""
        tensors = tensors_read(function, args)
        for tensor in tensors:
            self._recorder.read(tensor)
        return bool(tensors) and len(tensors) == sum(isinstance(a, Tensor) for a in args)

    def _tag(self, line: str, graph: fx.Graph | None = None) -> None:
        """Gives every node made since the last call its line."""
        if graph is None:
            mode = get_proxy_mode()
            if mode is None:
                return
            graph = mode.tracer.graph
        node = graph._root.prev
        newest = node
        while node is not self._tail and node is not graph._root:
            node.meta.setdefault("line", line)
            node = node.prev
        self._tail = newest

    def follow(self, results: list[Tensor]) -> None:
        """Prepares for the backward pass of these results."""
        seen: set[Any] = set()
        stack = [(r.grad_fn, "") for r in results if r.grad_fn is not None]
        while stack:
            function, inherited = stack.pop()
            if function in seen:
                continue
            seen.add(function)
            line = function.metadata.setdefault("line", inherited)
            function.register_prehook(lambda _, line=line: self._enter(line))
            stack.extend((f, line) for f, _ in function.next_functions if f is not None)

    def _enter(self, line: str) -> None:
        self._tag(self._line)
        self._line = line

    def settle(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            node.meta.setdefault("line", self._line)


def _is_of_a_user(value: Any) -> bool:
    """Whether a tensor is of a subclass of the user's, which no tracer of torch takes."""
    return isinstance(value, Tensor) and type(value).__module__.split(".")[0] != "torch"


def _called(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """A torch call as messages show it: 'mm((2, 4) float32, (5, 4) float32)'."""
    try:
        flat = [a for arg in (*args, *kwargs.values()) for a in (arg if isinstance(arg, (list, tuple)) else [arg])]
        tensors = ", ".join(describe(a) for a in flat if isinstance(a, Tensor))
        return f"{getattr(function, '__name__', 'a call')}({tensors})" if tensors else ""
    except Exception:
        return ""  # an argument that can't even be described
