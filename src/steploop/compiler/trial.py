"""Dtypes that torch's tracer lets pass and torch itself refuses: a product of float32 and float64, for example.

The tracer computes shapes, and many of its rules do not look at dtypes. So every call of a captured step whose
arguments are not all of one floating dtype is tried once on real zeros, each combination once per process. Where a
result has another dtype than the tracer thought, the graph is told: the mean of a layer norm of bfloat16 whose weights
are float32.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .ir.graph import Size, StepGraph, expression, size_at

_OF_DTYPES = re.compile(r"dtype|scalar type|[Ee]xpected .* type|not implemented for|of type|operator, with two bool")
# What a trial gave: why torch refuses the call, or the dtypes of its results.
_known: dict[Any, tuple[str, list[torch.dtype | None]]] = {}


def refused_dtypes(step: StepGraph, sizes: Mapping[str, int]) -> tuple[fx.Node, str] | None:
    """The first call that torch refuses for its dtypes, and what it says; None where there is none."""
    for node in step.graph.nodes:
        key = _key(node)
        if key is None:
            continue
        if key not in _known:
            _known[key] = _try(node, sizes)
        refused, dtypes = _known[key]
        if refused:
            return node, refused
        if _differ(node, dtypes):  # of this very call: another of its kind may have had other arguments
            _correct(node, _try(node, sizes)[1])
    return None


def _differ(node: fx.Node, dtypes: list[torch.dtype | None]) -> bool:
    values = tree_flatten(node.meta["val"])[0]
    pairs = zip(values, dtypes) if len(values) == len(dtypes) else ()
    return any(d is not None and isinstance(v, Tensor) and v.dtype != d for v, d in pairs)


def _correct(node: fx.Node, dtypes: list[torch.dtype | None]) -> None:
    """Gives the results of a call the dtypes that they have in truth."""
    if not _differ(node, dtypes):
        return
    values, structure = tree_flatten(node.meta["val"])
    with _disable_current_modes(), torch.no_grad():
        true = [v.to(d) if isinstance(v, Tensor) and d is not None else v for v, d in zip(values, dtypes)]
    node.meta["val"] = tree_unflatten(true, structure)
    for user in node.users:
        if user.target is operator.getitem:
            user.meta["val"] = node.meta["val"][user.args[1]]


def _key(node: fx.Node) -> Any:
    """What a trial stands for; None where none is needed."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    tags = node.target.tags
    if torch.Tag.nondeterministic_seeded in tags or not node.target.namespace.startswith("aten"):
        return None
    values = [n.meta.get("val") for n in node.all_input_nodes]
    tensors = [v for v in values if isinstance(v, Tensor)]
    dtypes = tuple(t.dtype for t in tensors)
    if len(tensors) != len(values) or any(t.device.type != "cpu" or t.layout is not torch.strided for t in tensors):
        return None
    if not dtypes or (len(set(dtypes)) == 1 and dtypes[0] in (torch.float32, torch.float64)):
        return None
    plain = [a for a in tree_flatten((node.args, node.kwargs))[0] if isinstance(a, (bool, float, complex, torch.dtype))]
    kinds = tuple(a if isinstance(a, (bool, torch.dtype)) else type(a) for a in plain)
    return node.target, dtypes, tuple(t.dim() for t in tensors), kinds


def _try(node: fx.Node, sizes: Mapping[str, int]) -> tuple[str, list[torch.dtype | None]]:
    def real(argument: fx.Node) -> Tensor:
        value = argument.meta["val"]
        shape = [size_at(expression(n), sizes) for n in value.shape]
        return torch.zeros(shape, dtype=value.dtype, device="cpu")  # (some kernels take any strides for dense ones)

    args, kwargs = tree_map_only(fx.Node, real, (node.args, node.kwargs))
    args, kwargs = tree_map_only(Size, lambda size: size_at(size.expr, sizes), (args, kwargs))
    try:
        with torch.no_grad():
            found = cast("Callable[..., Any]", node.target)(*args, **kwargs)
    except Exception as error:
        return str(error) if _OF_DTYPES.search(str(error)) else "", []
    return "", [v.dtype if isinstance(v, Tensor) else None for v in tree_flatten(found)[0]]
