"""A Loop call as one operator of torch, forward and backward: what a call runs, and how it is differentiated.

The operators themselves are in `operators.py`. They take every tensor that a call depends on, and a key to what is to
be done with them. Being operators, they nest inside another step and pass through tracers. Their gradients can't be
differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..errors import NO_SECOND_DERIVATIVE, UnsupportedError
from . import forward_mode
from .invocation import HELD, Invocation
from .ir.graph import Rows
from .layout import split_needs
from .ops.rules import CONTRACTED, Mixed
from .ops.table import add

_PLAIN = (Tensor, torch.nn.Parameter)
_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_modes_before: Callable[[], int] = torch._ops._len_torch_dispatch_stack_pre_dispatch


def traced(tensors: Sequence[Tensor]) -> bool:
    """Whether some tracer is at work: then the call must be one operator, whose results hold nothing back.

    So are calls with tensors on the meta device: the operator gives their results' shapes without running anything.
    """
    for tensor in tensors:
        if tensor.is_meta or (type(tensor) not in _PLAIN and isinstance(tensor, (FakeTensor, FunctionalTensor))):
            return True
    if _modes() == 0 and _modes_before() == 0:
        return False
    if get_proxy_mode() is not None:  # that of make_fx with pre_dispatch=True stands on a stack of its own
        return True
    stack = _get_current_dispatch_mode_stack()
    return any(isinstance(m, (FunctionalTensorMode, FakeTensorMode)) for m in stack)


# -- the operators: what `operators.py` registers --------------------------------------------------------------


# What reads a loop that is a text. `traced_calls` puts it here; every operator call with a text imports that first.
readers: list[Callable[[str], Invocation]] = []


def invocation_of(key: int | str) -> Invocation:
    """What a call of an operator runs: a number of this process, or a whole loop as text."""
    if isinstance(key, str):
        return readers[0](key)
    found = HELD.get(key)
    if found is None:
        raise UnsupportedError(
            "a traced graph names a loop that this process does not hold (any more). Trace it again here, or save it "
            "with torch.export, whose programs carry their loops."
        )
    return found


def set_up(
    ctx: Any, invocation: Invocation, tensors: Sequence[Tensor], steps: int, batch: int, output: Sequence[Tensor]
) -> None:
    ctx.invocation, ctx.steps, ctx.batch, ctx.schedule = invocation, steps, batch, None
    ctx.count, ctx.results = len(tensors), [(o.shape, o.dtype, o.device) for o in output]
    ctx.save_for_backward(*tensors, *invocation.kept(output))
    ctx.needs = [t.requires_grad for t in tensors]
    ctx.set_materialize_grads(False)


def backward(ctx: Any, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """One gradient, or None, for each tensor of the call."""
    invocation: Invocation = ctx.invocation
    saved = ctx.saved_tensors
    tensors, kept = list(saved[: ctx.count]), list(saved[ctx.count :])
    count = len(invocation.trace.graph.outputs) + invocation.layout.initial
    cotangents = [
        torch.zeros((), dtype=dtype, device=device).expand(shape) if g is None else g
        for g, (shape, dtype, device) in zip(gradients[:count], ctx.results)
    ]
    if any(is_batchedtensor(c) or is_legacy_batchedtensor(c) for c in cotangents):
        raise UnsupportedError(
            "several gradients of a Loop at once (is_grads_batched=True, vectorize=True, torch.func.vmap) are not "
            'supported. Ask for them one by one, or use sl.Loop(step, backend="reference").'
        )
    forward_mode.refuse_tangents((f"the cotangent {i}", c) for i, c in enumerate(cotangents))
    layout = invocation.layout
    differentiable = layout.xs + layout.constants + layout.initial + layout.reset_to + layout.captured
    needs = list(ctx.needs[:differentiable])
    needed = split_needs(layout, needs)
    invocation.require_gradient(needed)
    if torch.is_grad_enabled() and any(c.requires_grad for c in cotangents):
        raise UnsupportedError(NO_SECOND_DERIVATIVE)
    if torch.is_grad_enabled() or traced(cotangents):
        # The operator is for tracers, and for gradients of gradients, which it refuses.
        operator = torch.ops.steploop.inner_loop_backward
        if isinstance(invocation.key, str):
            operator = torch.ops.steploop.loop_backward
        grads = operator(cotangents, tensors, kept, invocation.key, ctx.steps, ctx.batch, needs)
    else:
        # What the forward kept stands by its schedule: lengths, mask and resets may have changed unseen by torch.
        schedule = ctx.schedule or invocation.schedule(tensors, ctx.steps, ctx.batch)
        grads = invocation.gradient(cotangents, tensors, kept, schedule, ctx.batch, needed)
    grads = iter(grads)
    found = [next(grads) if n else None for n in needs]
    return found + [None] * (ctx.count - differentiable)


class LoopFunction(torch.autograd.Function):
    """The operator for calls that no tracer sees: its gradient at once, without the dispatcher's detours.

    (torch.func, for which `setup_context` would stand alone, never comes here.)
    """

    @staticmethod
    def forward(ctx: Any, invocation: Invocation, steps: int, batch: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        # Views could not be changed in place by the caller: autograd takes them for views of one another.
        schedule = invocation.schedule(tensors, steps, batch)
        results = [r.detach() if r._is_view() else r for r in invocation.run(tensors, schedule, batch)]
        set_up(ctx, invocation, tensors, steps, batch, results)
        ctx.schedule = schedule
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, *backward(ctx, gradients)


# -- the batch axis of an operator call inside another step ----------------------------------------------------


def rows_rule(node: fx.Node, batch: Any) -> tuple[Any, ...]:
    """See `rows.py`: an inner loop keeps the rows of the outer step apart if its own step does."""
    names = torch.ops.steploop
    backward = node.target in (names.inner_loop_backward.default, names.loop_backward.default)
    arguments: Any = node.args
    tensors = arguments[1] if backward else arguments[0]
    invocation = invocation_of(arguments[3] if backward else arguments[1])
    if invocation.mixing or invocation.stacked:
        raise Mixed("an inner loop whose step mixes rows")
    parts = invocation.layout.split(tensors)
    batched = invocation.program.constant_batched
    expected = [(n, 1) for n in parts["xs"]] + [(n, 0) for n in (*parts["initial"], *parts["reset_to"])]
    expected += [(n, 0) for n, b in zip(parts["constants"], batched) if b]
    expected += [(parts[name], dim) for name, dim in (("lengths", 0), ("mask", 1), ("resets", 1)) if parts[name]]
    found = {(r.outer, r.inner) for n, dim in expected if (r := n.meta["rows"]) is not None and r.dim == dim}
    if len(found) != 1 or any(n.meta["rows"] is None or n.meta["rows"].dim != dim for n, dim in expected):
        raise Mixed("an inner loop whose batch is not that of the step")
    outer, inner = found.pop()
    if not backward:
        outputs = [Rows(1, outer, inner)] * len(invocation.trace.graph.outputs)
        return (*outputs, *[Rows(0, outer, inner)] * len(parts["initial"]))
    result: list[Any] = []
    needs = iter(arguments[6])
    for name, dim in (("xs", 1), ("constants", 0), ("initial", 0), ("reset_to", 0), ("captured", None)):
        for i in range(len(parts[name])):
            if next(needs):
                shared = name == "constants" and not batched[i]
                result.append(CONTRACTED if dim is None or shared else Rows(dim, outer, inner))
    return tuple(result)


add("loop inner_loop", rows=rows_rule, sizes=(3,))
add("loop_backward inner_loop_backward", rows=rows_rule, sizes=(5,))
