"""Operations without a lowering of their own: torch's decompositions, traced for one row, then lowered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from ...compiler.ops.table import operation_of
from .expressions import same_shape
from .language import Const, Iota, Load, Op
from .lowering import Lowering, Unsupported


def decomposed(low: Lowering, node: fx.Node) -> Any:
    """The value (or values) of a node by its decomposition."""
    function = operation_of(node).written_as or decomposition_table.get(node.target)
    if function is None and getattr(node.target, "has_kernel_for_dispatch_key", None) is not None:
        key = torch._C.DispatchKey.CompositeImplicitAutograd
        function = node.target.decompose if node.target.has_kernel_for_dispatch_key(key) else None
    if function is None:
        raise Unsupported(
            f"no native form of {getattr(node.target, '__name__', node.target)}".replace(".default", "")
        )
    tensors: list[fx.Node] = list(dict.fromkeys(node.all_input_nodes))
    examples = [_example(low, n) for n in tensors]

    def call(*given: Tensor) -> Any:
        standing = dict(zip(tensors, given))
        args = fx.map_arg(_plain(low, node.args), standing.__getitem__)
        kwargs = fx.map_arg(_plain(low, node.kwargs), standing.__getitem__)
        found = function(*args, **kwargs)
        return list(found) if isinstance(found, (tuple, list)) else [found]

    try:
        with _disable_current_modes(), torch.no_grad():
            graph = make_fx(call, tracing_mode="fake")(*examples).graph
    except Exception:  # it has none for these arguments, or asks for values
        raise Unsupported(f"no native form of {node.target}".replace(".default", "")) from None
    return _walk(low, node, graph, tensors)


def _walk(low: Lowering, node: fx.Node, graph: fx.Graph, tensors: list[fx.Node]) -> Any:
    inputs = iter(tensors)
    for inner in graph.nodes:
        if inner.op == "placeholder":
            low.values[inner] = low.values[next(inputs)]
        elif inner.op == "call_function":
            if inner.target is node.target:
                raise Unsupported(f"no native form of {node.target}")
            low.lower_node(inner)
        elif inner.op == "output":
            found = [low.values[r] if isinstance(r, fx.Node) else r for r in inner.args[0]]
            _check(low, node, found)
            single = not isinstance(node.meta["val"], (tuple, list))
            return found[0] if single else found
        else:
            raise Unsupported(f"the decomposition of {node.target} holds a tensor of its own")
    raise AssertionError("a graph without output")


def _check(low: Lowering, node: fx.Node, found: list[Any]) -> None:
    """Some decompositions are of another form of the operation, with other results."""
    wanted = node.meta["val"]
    for value, like in zip(found, wanted if isinstance(wanted, (tuple, list)) else [wanted]):
        if not isinstance(like, Tensor):
            continue
        known = isinstance(value, (Const, Iota, Load, Op)) and value.dtype == like.dtype
        if not known or not same_shape(value.shape, low.sizes(like.shape)):
            raise Unsupported(f"no native form of {node.target}".replace(".default", ""))


def _example(low: Lowering, node: fx.Node) -> Tensor:
    value = node.meta["val"]
    shape = low.sizes(value.shape)
    if not all(isinstance(n, int) for n in shape):
        raise Unsupported("an operation without a lowering of its own on an axis of unknown size")
    return torch.empty(shape, dtype=value.dtype)


def _plain(low: Lowering, args: Any) -> Any:
    """Arguments with sizes as numbers."""
    if isinstance(args, (list, tuple)):
        return type(args)([_plain(low, a) for a in args])
    if isinstance(args, dict):
        return {k: _plain(low, v) for k, v in args.items()}
    if isinstance(args, (fx.Node, Tensor, str, float, bool, int, torch.dtype, torch.device, type(None))):
        return args
    try:
        return low.size(args)
    except AttributeError:
        return args
