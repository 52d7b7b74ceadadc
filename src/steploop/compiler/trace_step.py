"""Runs a step once on fake tensors and records it, alone or together with its gradient.

The gradient is asked for inside the trace, of the user's own function, so that no_grad regions, detach,
custom autograd.Functions and surrogate gradients keep their meaning. Parameters and closed-over tensors are
not swapped for anything: the trace meets the real ones, and they become inputs of the graph afterwards.
The batch size is a symbol from the start, with a size nothing else has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import sympy
import torch
import torch.utils.checkpoint
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import SLoc
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from ..errors import StepError, SteploopError
from .alone import alone
from .conditions import condition, conditions_of
from .fake_tensors import Fakes
from .forget import forget_dispatch, forget_shapes, forget_with
from .free_numbers import FreeNumber, NotFree, Symbols, has_symbols, lift
from .inplace import make_functional
from .ir.graph import StepGraph, expression
from .ops.rules import has
from .passes.gradients import factor_for_gradients
from .program import Program
from .rebuild import RealTensors, rebuild
from .refusals import refusal, refused_call
from .source_lines import Lines
from .stages import stage
from .trace import Leaf, Observed, Signature, Trace, Wanted
from .trial import refused_dtypes


def trace_forward(
    program: Program, signature: Signature, symbolic: bool, observed: Observed | None = None
) -> Trace:
    return _trace(program, signature, symbolic, None, observed or Observed())


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
    _inner.append([])
    try:
        with alone():
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
        self.targets = [] if wanted is None else wanted.tensors  # of the gradients that are wanted
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
        lines = self.lines = Lines(self.recorder)
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
            refused = lines.refused or refusal(error, lines.failed, lines.of_gradient)
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
            targets = [leaf for leaf in inputs if leaf.requires_grad] + self.targets
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
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        with torch.no_grad():
            fake = self.mode.from_tensor(torch.empty(hint, device="meta"), symbolic_context=context)
        size = cast(torch.SymInt, fake.shape[0])
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
                    shape = [self._here(size, forward) for size in value.shape]
                    leaves.append(torch.empty(shape, dtype=value.dtype, device=value.device))
        return leaves

    def _here(self, size: Any, forward: StepGraph) -> Any:
        """A size of the forward trace, by the symbols of this one."""
        expr = expression(size)
        if isinstance(expr, int):
            return expr
        known = {place: self.sizes[symbol] for symbol, place in self.symbols.items()}
        values = {s: known[forward.symbols[s]] for s in expr.free_symbols}
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
        captured = RealTensors(module, self.env)
        graph = rebuild(module.graph, captured, self.env)
        inputs = [n for n in graph.nodes if n.op == "placeholder"][len(captured.tensors) :]
        if pinned := self.floats.pinned(self.env):
            raise NotFree(pinned)
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
        tensors: list[Tensor | FreeNumber] = [*captured.tensors, *numbers]
        fixes = any(batch in expr.free_symbols for expr in captured.fixed)
        if any(sum(has(expression(s), batch) for s in n.meta["val"].shape) > 1 for n in step.outputs if self.symbolic):
            raise FixedBatch("the step gives a number for every two rows")
        detached = tuple(captured.detached)
        return Trace(step, tensors, holds, self.out_spec, calls, conditions=sizes, fixes=fixes, detached=detached)

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
        self, step: StepGraph, cts: Sequence[fx.Node], gradients: list[fx.Node], captured: RealTensors,
        numbers: int,
    ) -> None:  # fmt: skip
        step.ct_outputs, step.ct_nexts = [*cts[: len(step.outputs)]], [*cts[len(step.outputs) :]]
        left = iter(gradients)
        marks = self.shape_of_result
        step.grad_xs = [next(left) if m else None for m in marks["grad_xs"]]
        step.grad_constants = [next(left) if m else None for m in marks["grad_constants"]]
        step.grad_prevs = [next(left) if m else None for m in marks["grad_prevs"]]
        by_tensor = {id(t): next(left) for t, m in zip(self.targets, marks["grad_captured"]) if m}
        step.grad_captured = [*(by_tensor.get(id(t)) for t in captured.tensors), *[None] * numbers]


class FixedBatch(Exception):
    """The captured function only holds for one batch size."""


def _own(value: Tensor) -> Tensor:
    # A result that is an input, or a closed-over tensor, must still be a node of the graph.
    return value.detach().clone() if not value.requires_grad else value.clone()
