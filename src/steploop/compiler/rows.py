"""Where the batch axis is in every value of a step, and whether rows stay apart.

If every row of a step's results depends on the same row of its inputs alone, the step can be run on any rows:
all rows of all steps at once (what makes batching over time possible), sorted by length, or one beam. The
analysis is exact where it has a rule for an operation; an operation without one counts as mixing rows,
which is slower and never wrong.

In a joint graph sums over rows are what gradients of parameters are made of. Such sums have no batch axis
any more; they are harmless when only linear operations lead from them to a gradient (`linear_in`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .graph import Rows, Size, StepGraph, expression
from .history_products import PRODUCTS

aten = torch.ops.aten


class Mixed(Exception):
    """An operation lets one row influence another."""


CONTRACTED = "contracted"  # a sum over rows: what a gradient of something without rows is made of
Axis = Rows | None | str


def annotate(step: StepGraph, per_step: Sequence[fx.Node] = ()) -> dict[fx.Node, str]:
    """Writes `rows` and `varies` on every node; returns the nodes that mix rows, each with the reason.

    per_step: nodes of which the value of every step is wanted, not only a sum over the steps.
    With no symbolic batch, or once rows are mixed, `rows` is None where it means nothing.
    """
    forced: set[fx.Node] = set()
    while True:
        mixing = _annotate_once(step, forced)
        more = _needed_each_step(mixing, per_step)
        if not more:
            return mixing
        forced |= more


def _annotate_once(step: StepGraph, forced: set[fx.Node]) -> dict[fx.Node, str]:
    mixing: dict[fx.Node, str] = {}
    varying = {*step.xs, *step.prevs, *(n for n in (*step.ct_outputs, *step.ct_nexts) if n is not None)}
    for node in step.graph.nodes:
        if node.op == "placeholder":
            if "saved" not in node.meta:
                node.meta["varies"] = node in varying
                node.meta["rows"] = _placeholder_rows(node, step)
            node.meta["contracted"] = False
        elif node.op == "call_function":
            _annotate_call(node, step, mixing, forced)
    return mixing


def _needed_each_step(mixing: dict[fx.Node, str], per_step: Sequence[fx.Node]) -> set[fx.Node]:
    """Sums over rows that something uses step by step: they can't be sums over the rows of all steps."""
    found: set[fx.Node] = set()
    stack = [i for n in mixing for i in n.all_input_nodes] + list(per_step)
    while stack:
        node = stack.pop()
        if node.target is operator.getitem and node.meta["contracted"] is True:
            node = node.args[0]
        contracted = node.meta["contracted"]
        if node not in found and (contracted is True or (isinstance(contracted, tuple) and any(contracted))):
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found - set(mixing)


def _annotate_call(node: fx.Node, step: StepGraph, mixing: dict[fx.Node, str], forced: set[fx.Node]) -> None:
    inputs = node.all_input_nodes
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    node.meta["varies"] = random or any(n.meta["varies"] for n in inputs)
    node.meta["rows"], node.meta["contracted"] = None, False
    if step.batch is None:
        return
    if node.target is operator.getitem:
        rows, contracted = inputs[0].meta["rows"], inputs[0].meta["contracted"]
        index = node.args[1]
        node.meta["rows"] = rows[index] if isinstance(rows, tuple) else rows
        node.meta["contracted"] = contracted[index] if isinstance(contracted, tuple) else contracted
        return
    stray = next((n for n in inputs if n.meta["varies"] and not _has_place(n)), None)
    try:
        if stray is not None:
            raise Mixed(mixing.get(stray, "follows a value without a batch axis"))
        if node in forced:
            raise Mixed("sums over the rows of the batch")
        axis = _rule(node, step.batch)
    except Mixed as reason:
        mixing[node] = str(reason)
        node.meta["rows"] = _visible_rows(node, step.batch)
        node.meta["varies"] = True  # it is computed at every step, on the rows of that step
        return
    if isinstance(axis, tuple):
        node.meta["rows"] = tuple(a if isinstance(a, Rows) else None for a in axis)
        node.meta["contracted"] = tuple(a is CONTRACTED for a in axis)
    else:
        node.meta["rows"] = axis if isinstance(axis, Rows) else None
        node.meta["contracted"] = axis is CONTRACTED
    if any(n.meta["contracted"] is True for n in inputs):
        _after_contraction(node, mixing)
    elif node.meta["varies"] and not _has_place(node):
        mixing[node] = "differs from step to step and has no batch axis"


def _has_place(node: fx.Node) -> bool:
    rows, contracted = node.meta["rows"], node.meta["contracted"]
    if isinstance(rows, tuple):
        return any(r is not None for r in rows) or any(contracted)
    return rows is not None or contracted is True


def _visible_rows(node: fx.Node, batch: sympy.Symbol) -> Axis | tuple[Axis, ...]:
    """Where a value that mixes rows has the batch's size."""
    value = node.meta["val"]
    found = []
    for tensor in [value] if isinstance(value, Tensor) else value:
        sizes = [expression(s) for s in tensor.shape] if isinstance(tensor, Tensor) else []
        dims = [d for d, s in enumerate(sizes) if s == batch]
        found.append(Rows(dims[0]) if len(dims) == 1 else None)
    return found[0] if isinstance(value, Tensor) else tuple(found)


def _after_contraction(node: fx.Node, mixing: dict[fx.Node, str]) -> None:
    if linear_in(node) and node.meta["rows"] is None:
        node.meta["contracted"] = True
    else:
        mixing[node] = "uses a sum over the rows of the batch"


def linear_in(node: fx.Node) -> bool:
    """Whether a call is linear in all its contracted inputs together (so that it commutes with sums over steps)."""
    contracted = [n for n in node.all_input_nodes if n.meta["contracted"] is True]
    others = [n for n in node.all_input_nodes if n.meta["contracted"] is not True]
    if node.target in _LINEAR:
        return not others
    if node.target in (aten.mul.Tensor, aten.div.Tensor, aten.mm.default, aten.bmm.default):
        first = node.args[0] in contracted
        if node.target is aten.div.Tensor and not first:
            return False
        return len(contracted) == 1 and all(not n.meta["varies"] for n in others) and len(node.args) == 2
    if node.target in _LINEAR_IN_FIRST:
        return contracted == [node.args[0]] and all(not n.meta["varies"] for n in others)
    return False


# Gradients of what a step makes of parameters alone (a decay that is a sigmoid, say).
_LINEAR_IN_FIRST = {
    aten.sigmoid_backward.default, aten.tanh_backward.default, aten.threshold_backward.default,
    aten.softplus_backward.default, aten.elu_backward.default, aten.leaky_relu_backward.default,
    aten.silu_backward.default, aten.gelu_backward.default, aten.hardtanh_backward.default,
    aten.log_sigmoid_backward.default, aten._softmax_backward_data.default, aten._log_softmax_backward_data.default,
}  # fmt: skip


_LINEAR = {
    aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.view.default, aten.t.default, aten.transpose.int,
    aten.permute.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default,
    aten.expand.default, aten.slice.Tensor, aten.select.int, aten.sum.dim_IntList, aten.sum.default,
    aten.cat.default, aten.stack.default, aten._to_copy.default, aten.slice_backward.default,
    aten.select_backward.default, aten.reshape.default, aten._unsafe_view.default, aten.mul.Scalar,
    aten.div.Scalar, aten.constant_pad_nd.default, aten.embedding_dense_backward.default,
    aten.split_with_sizes.default, aten.split.Tensor, aten.clone.default, aten.view_as_real.default,
    aten.view_as_complex.default, aten._conj.default, aten.diagonal.default, aten.tril.default,
    aten.triu.default, aten.flip.default, aten.unfold.default, aten.unfold_backward.default,
}  # fmt: skip


def _placeholder_rows(node: fx.Node, step: StepGraph) -> Rows | None:
    value = node.meta.get("val")
    if step.batch is None or not isinstance(value, Tensor) or value.dim() == 0:
        return None
    return Rows(0) if expression(value.shape[0]) == step.batch else None


# -- rules ---------------------------------------------------------------------------------------------------


def _shape(node: fx.Node) -> list[Any]:
    return [expression(s) for s in node.meta["val"].shape]


def _has(size: Any, batch: sympy.Symbol) -> bool:
    return not isinstance(size, int) and batch in size.free_symbols


def _tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


def _rule(node: fx.Node, batch: sympy.Symbol) -> Axis | tuple[Axis, ...]:
    if _computes_with(node, batch):
        raise Mixed("computes with the batch size")
    if not any(isinstance(n.meta["rows"], (Rows, tuple)) for n in node.all_input_nodes):
        return _made_up(node, batch)
    rule = RULES.get(node.target)
    if rule is None:
        packet = getattr(node.target, "overloadpacket", None)
        rule = PACKET_RULES.get(getattr(packet, "__name__", ""))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = _pointwise
    if rule is None:
        raise Mixed(f"steploop has no rule for the batch axis of {node.target}")
    return rule(node, batch)


def _made_up(node: fx.Node, batch: sympy.Symbol) -> Axis:
    """No input has rows: a value made from sizes, e.g. zeros(B, H), or one without a batch."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        tensors = [v for v in value if isinstance(v, Tensor)] if isinstance(value, (list, tuple)) else []
        if any(_has(expression(s), batch) for t in tensors for s in t.shape):
            raise Mixed("makes several values of the batch's size")
        return None
    dims = [d for d, s in enumerate(_shape(node)) if _has(s, batch)]
    if not dims:
        return None
    size = _shape(node)[dims[0]]
    if len(dims) > 1 or node.target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        raise Mixed("numbers the rows of the batch")
    factor = sympy.simplify(size / batch)
    if not _is_inner(factor, batch):
        raise Mixed("has an axis that is not a multiple of the batch")
    return Rows(dims[0], 1, int(factor) if factor.is_number else factor)


def _is_inner(size: sympy.Expr, batch: sympy.Symbol) -> bool:
    """Whether it can be the size of what stands inside the batch: a number, or a size that other inputs have."""
    return bool(size.is_integer) and not _has(size, batch) and size.is_polynomial(*size.free_symbols)


def _computes_with(node: fx.Node, batch: sympy.Symbol) -> bool:
    """Whether the batch size is used as a number, and not only as the size of an axis of the result: run on the
    rows of all steps at once, the call would see another number."""
    packet = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    sizes = _SIZES_AT.get(packet, ())
    args = [a for i, a in enumerate(node.args) if i not in sizes]
    return _mentions(args, batch) or _mentions(list(node.kwargs.values()), batch)


# Which arguments of an operation are the sizes of its result.
_SIZES_AT = {
    **dict.fromkeys(["view", "reshape", "expand", "_unsafe_view", "new_zeros", "new_ones", "new_empty", "new_full",
                     "select_backward", "slice_backward", "unfold_backward"], (1,)),
    **dict.fromkeys(["zeros", "ones", "empty", "full", "rand", "randn"], (0,)),
    "arange": (0, 1, 2), "randint": (1, 2), "empty_strided": (0, 1), "new_empty_strided": (1, 2),
    "native_group_norm": (3,), "native_group_norm_backward": (5,), "loop": (3,), "loop_backward": (5,),
    "inner_loop": (3,), "inner_loop_backward": (5,),
}  # fmt: skip


def _mentions(argument: Any, batch: sympy.Symbol) -> bool:
    if isinstance(argument, Size):
        return batch in argument.expr.free_symbols
    if isinstance(argument, (list, tuple)):
        return any(_mentions(a, batch) for a in argument)
    return False


def _aligned(nodes: list[fx.Node], rank: int) -> Rows:
    """The common batch axis of values that are broadcast against each other."""
    found = None
    for n in nodes:
        rows = n.meta["rows"]
        if rows is None:
            continue
        here = Rows(rows.dim + rank - len(_shape(n)), rows.outer, rows.inner)
        if found is not None and here != found:
            raise Mixed("combines every row with every other")
        found = here
    return found


def _pointwise(node: fx.Node, batch: sympy.Symbol) -> Axis:
    return _aligned(_tensor_inputs(node), len(_shape(node)))


def _pointwise_tuple(node: fx.Node, batch: sympy.Symbol) -> tuple[Axis, ...]:
    value = node.meta["val"]
    rows = _aligned(_tensor_inputs(node), value[0].dim())
    return tuple(rows for _ in value)


def _dims(node: fx.Node, position: int = 1, name: str = "dim") -> list[int]:
    dims = node.args[position] if position < len(node.args) else node.kwargs.get(name)
    rank = len(_shape(node.args[0]))
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank))
    return [d % max(rank, 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


def _keepdim(node: fx.Node, position: int) -> bool:
    return bool(node.args[position] if position < len(node.args) else node.kwargs.get("keepdim", False))


def _reduction(linear: bool, dim_at: int = 1, keep_at: int = 2, results: int = 1) -> Callable:
    def rule(node: fx.Node, batch: sympy.Symbol) -> Axis | tuple[Axis, ...]:
        rows = node.args[0].meta["rows"]
        dims = _dims(node, dim_at)
        if rows.dim in dims:
            if not linear:
                raise Mixed("reduces over the rows of the batch")
            return CONTRACTED
        if not _keepdim(node, keep_at):
            rows = Rows(rows.dim - sum(d < rows.dim for d in dims), rows.outer, rows.inner)
        return rows if results == 1 else (rows,) * results

    return rule


def _along(dim_at: int = 1, name: str = "dim", results: int = 1, default: int | None = None) -> Callable:
    """Operations along one axis that keep the shape (softmax, cumsum, sort, ...)."""

    def rule(node: fx.Node, batch: sympy.Symbol) -> Axis | tuple[Axis, ...]:
        operands = [n for n in _tensor_inputs(node) if n.meta["rows"] is not None]
        rank = len(_shape(operands[0]))
        rows = _aligned(operands, rank)
        dims = node.args[dim_at] if dim_at < len(node.args) else node.kwargs.get(name, default)
        for dim in dims if isinstance(dims, (list, tuple)) else [dims]:
            if dim % rank == rows.dim:
                raise Mixed("works along the rows of the batch")
        return rows if results == 1 else (rows,) * results

    return rule


def _view(node: fx.Node, batch: sympy.Symbol) -> Axis:
    source, rows = _shape(node.args[0]), node.args[0].meta["rows"]
    before = sympy.Integer(1)
    for size in source[: rows.dim]:
        before *= size
    outer = before * rows.outer  # the value as (outer, B, inner)
    passed = sympy.Integer(1)
    for dim, size in enumerate(_shape(node)):
        if _has(size, batch):
            # The axes before this one must be part of `outer`, and what is left over stands inside this axis.
            left = sympy.simplify(outer / passed)
            right = sympy.simplify(size / (left * batch))
            if left.is_integer and left.is_number and _is_inner(right, batch):
                return Rows(dim, int(left), int(right) if right.is_number else right)
            raise Mixed("reshapes the batch together with other axes")
        passed *= size
    if not any(_has(s, batch) for s in _shape(node)):
        raise Mixed("reshapes the batch away")
    raise Mixed("reshapes the batch together with other axes")


def _permutation(order: Callable[[fx.Node, int], list[int]]) -> Callable:
    def rule(node: fx.Node, batch: sympy.Symbol) -> Axis:
        rows = node.args[0].meta["rows"]
        new = order(node, len(_shape(node.args[0])))
        return Rows(new.index(rows.dim), rows.outer, rows.inner)

    return rule


def _transpose_order(node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    a, b = node.args[1] % rank, node.args[2] % rank
    order[a], order[b] = order[b], order[a]
    return order


def _unsqueeze(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows, dim = node.args[0].meta["rows"], node.args[1] % len(_shape(node))
    return Rows(rows.dim + (dim <= rows.dim), rows.outer, rows.inner)


def _squeeze(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows, rank = node.args[0].meta["rows"], len(_shape(node.args[0]))
    dims = node.args[1] if len(node.args) > 1 else list(range(rank))
    dims = [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    gone = [d for d in dims if d < rows.dim and _shape(node.args[0])[d] == 1]
    return Rows(rows.dim - len(gone), rows.outer, rows.inner)


def _expand(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows = node.args[0].meta["rows"]
    return Rows(rows.dim + len(_shape(node)) - len(_shape(node.args[0])), rows.outer, rows.inner)


def _select(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows, dim = node.args[0].meta["rows"], node.args[1] % len(_shape(node.args[0]))
    if dim == rows.dim:
        raise Mixed("selects a row of the batch")
    return Rows(rows.dim - (dim < rows.dim), rows.outer, rows.inner)


def _slice(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows = node.args[0].meta["rows"]
    if (node.args[1] if len(node.args) > 1 else 0) % len(_shape(node.args[0])) == rows.dim:
        raise Mixed("slices the batch")
    return rows


def _pieces(node: fx.Node, batch: sympy.Symbol) -> tuple[Axis, ...]:
    rows = node.args[0].meta["rows"]
    dim = (node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)) % len(_shape(node.args[0]))
    if dim == rows.dim:
        raise Mixed("splits the batch")
    return (rows,) * len(node.meta["val"])


def _unbind(node: fx.Node, batch: sympy.Symbol) -> tuple[Axis, ...]:
    rows = node.args[0].meta["rows"]
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(_shape(node.args[0]))
    if dim == rows.dim:
        raise Mixed("unbinds the batch")
    return (Rows(rows.dim - (dim < rows.dim), rows.outer, rows.inner),) * len(node.meta["val"])


def _cat(node: fx.Node, batch: sympy.Symbol) -> Axis:
    parts = list(node.args[0])
    rows = _aligned(parts, len(_shape(node)))
    if any(p.meta["rows"] is None for p in parts):
        raise Mixed("joins values with and without a batch")
    if (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(_shape(node)) == rows.dim:
        raise Mixed("concatenates along the batch")
    return rows


def _stack(node: fx.Node, batch: sympy.Symbol) -> Axis:
    parts = list(node.args[0])
    if any(p.meta["rows"] is None for p in parts):
        raise Mixed("joins values with and without a batch")
    rows = _aligned(parts, len(_shape(parts[0])))
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(_shape(node))
    return Rows(rows.dim + (dim <= rows.dim), rows.outer, rows.inner)


def _mm(node: fx.Node, batch: sympy.Symbol) -> Axis:
    a, b = node.args[0].meta["rows"], node.args[1].meta["rows"]
    if a is not None and b is not None:
        if a.dim == 1 and b.dim == 0 and (a.outer, a.inner) == (b.outer, b.inner):
            return CONTRACTED
        raise Mixed("multiplies every row with every other")
    if a is not None:
        if a.dim != 0:
            raise Mixed("multiplies across the rows of the batch")
        return a
    if b.dim != 1:
        raise Mixed("multiplies across the rows of the batch")
    return b


def _addmm(node: fx.Node, batch: sympy.Symbol) -> Axis:
    bias, a, b = (n.meta["rows"] for n in node.args[:3])
    if b is None and a is not None and a.dim == 0:
        if bias is None or (bias == a and len(_shape(node.args[0])) == 2):
            return a
    raise Mixed("multiplies across the rows of the batch")


def _bmm(node: fx.Node, batch: sympy.Symbol) -> Axis:
    a, b = node.args[0].meta["rows"], node.args[1].meta["rows"]
    if a is not None and b is not None:
        if a.dim == b.dim == 0 and a == b:
            return a
        if a.dim == 2 and b.dim == 1 and (a.outer, a.inner) == (b.outer, b.inner):
            return CONTRACTED
        raise Mixed("multiplies every row with every other")
    rows, kept = (a, 1) if a is not None else (b, 2)
    if rows.dim != kept:
        raise Mixed("multiplies across the rows of the batch")
    return rows


def _matvec(node: fx.Node, batch: sympy.Symbol) -> Axis:
    a, b = node.args[0].meta["rows"], node.args[1].meta["rows"]
    if a is not None and b is not None and a.dim == 1 and b.dim == 0:
        return CONTRACTED
    if b is None and a.dim == 0:
        return a
    raise Mixed("multiplies across the rows of the batch")


def _first_axis(results: int = 1, also: tuple[int, ...] = ()) -> Callable:
    """Axis 0 is the batch of every operand that has rows; the results' too. `also`: operands that must have none."""

    def rule(node: fx.Node, batch: sympy.Symbol) -> Axis | tuple[Axis, ...]:
        found = {n.meta["rows"] for n in _tensor_inputs(node) if n.meta["rows"] is not None}
        if len(found) != 1 or next(iter(found)).dim != 0:
            raise Mixed("works across the rows of the batch")
        for position in also:
            operand = node.args[position] if position < len(node.args) else None
            if isinstance(operand, fx.Node) and operand.meta["rows"] is not None:
                raise Mixed("has weights with a batch axis")
        rows = found.pop()
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return rows
        return tuple(_leading(rows, v, batch) for v in value)

    return rule


def _leading(rows: Rows, value: Any, batch: sympy.Symbol) -> Axis:
    if not isinstance(value, Tensor) or value.dim() == 0 or not _has(expression(value.shape[0]), batch):
        return None
    return rows


def _layer_norm(node: fx.Node, batch: sympy.Symbol) -> tuple[Axis, ...]:
    rows, rank = node.args[0].meta["rows"], len(_shape(node.args[0]))
    if rows is None or rows.dim >= rank - len(node.args[1]) or any(
        isinstance(a, fx.Node) and a.meta["rows"] is not None for a in node.args[2:4]
    ):
        raise Mixed("normalises over the rows of the batch")
    return (rows, rows, rows)


def _layer_norm_backward(node: fx.Node, batch: sympy.Symbol) -> tuple[Axis, ...]:
    operands = [node.args[0], node.args[1], node.args[3], node.args[4]]
    rows = {n.meta["rows"] for n in operands}
    if len(rows) != 1 or None in rows or any(
        isinstance(a, fx.Node) and a.meta["rows"] is not None for a in node.args[5:7]
    ):
        raise Mixed("normalises over the rows of the batch")
    axes = (rows.pop(), CONTRACTED, CONTRACTED)
    return tuple(axis if wanted else None for axis, wanted in zip(axes, node.args[7]))


def _backward_in_three(count: int, mask_at: int, verb: str) -> Callable:
    """Gradients of an input with rows and of two parameters; the first `count` operands have rows in front."""

    def rule(node: fx.Node, batch: sympy.Symbol) -> tuple[Axis, ...]:
        rows = {n.meta["rows"] for n in node.args[:count]}
        others = [a for a in node.args[count:] if isinstance(a, fx.Node) and a.meta["rows"] is not None]
        if len(rows) != 1 or None in rows or next(iter(rows)).dim != 0 or others:
            raise Mixed(f"{verb} over the rows of the batch")
        axes = (rows.pop(), CONTRACTED, CONTRACTED)
        return tuple(axis if wanted else None for axis, wanted in zip(axes, node.args[mask_at]))

    return rule


def _batch_norm_backward(node: fx.Node, batch: sympy.Symbol) -> tuple[Axis, ...]:
    if node.args[7]:
        raise Mixed("normalises over the rows of the batch")
    return _backward_in_three(2, 9, "normalises")(node, batch)


def _embedding(node: fx.Node, batch: sympy.Symbol) -> Axis:
    weight, index = node.args[0].meta["rows"], node.args[1].meta["rows"]
    if weight is not None:
        raise Mixed("looks up rows of the batch")
    return index


def _embedding_backward(node: fx.Node, batch: sympy.Symbol) -> Axis:
    if node.args[0].meta["rows"] != node.args[1].meta["rows"] or len(node.args) > 4 and node.args[4]:
        raise Mixed("scales the gradient by how often a row occurs in the batch")
    return CONTRACTED


def _index_select(node: fx.Node, batch: sympy.Symbol) -> Axis:
    source, index = node.args[0].meta["rows"], node.args[2].meta["rows"]
    dim = node.args[1] % len(_shape(node.args[0]))
    if source is not None and (index is not None or source.dim == dim):
        raise Mixed("selects rows of the batch")
    return source if source is not None else Rows(dim, index.outer, index.inner)


def _gather(node: fx.Node, batch: sympy.Symbol) -> Axis:
    operands = [n for n in _tensor_inputs(node)]
    rows = _aligned(operands, len(_shape(node)))
    if node.args[1] % len(_shape(node)) == rows.dim:
        raise Mixed("gathers rows of the batch")
    if any(n.meta["rows"] is None for n in operands):
        raise Mixed("gathers from a value without a batch")
    return rows


def _index(node: fx.Node, batch: sympy.Symbol) -> Axis:
    """Advanced indexing of a value without a batch by indices of one common shape that have it."""
    source, indices = node.args[0], list(node.args[1])
    if source.meta["rows"] is not None:
        rows = source.meta["rows"]
        given = [d for d, i in enumerate(indices) if i is not None]
        plain = [indices[d] for d in given]
        if rows.dim in given or any(i.meta["rows"] is not None for i in plain):
            raise Mixed("indexes the rows of the batch")
        if any(d < rows.dim for d in given):
            raise Mixed("moves the batch axis by indexing")
        return rows
    given = [d for d, i in enumerate(indices) if i is not None]
    if given != list(range(given[0], given[0] + len(given))):
        raise Mixed("indexes axes that are not side by side")
    plain = [indices[d] for d in given]
    rank = max(len(_shape(i)) for i in plain)
    rows = _aligned(plain, rank)
    return Rows(rows.dim + given[0], rows.outer, rows.inner)


def _index_put(node: fx.Node, batch: sympy.Symbol) -> Axis:
    base, indices, values = node.args[:3]
    rows, written = base.meta["rows"], values.meta["rows"]
    given = [d for d, i in enumerate(indices) if i is not None]
    plain = [indices[d] for d in given]
    if not given or any(i.meta["val"].dtype == torch.bool for i in plain):
        raise Mixed("writes into rows by index")
    if rows is None and len(node.args) > 3 and node.args[3] and base.target in _ZEROS:
        return _summed_by_index(given, plain, written)
    if len(given) != 1:
        raise Mixed("writes into rows by index")
    (dim,), (index,) = given, plain
    rank = len(_shape(node)) - 1 + len(_shape(index))  # of what is written
    if written is not None:
        written = Rows(written.dim + rank - len(_shape(values)), written.outer, written.inner)
    if rows is None or rows.dim >= dim or index.meta["rows"] is not None or written not in (None, rows):
        raise Mixed("writes into rows by index")
    return rows


def _summed_by_index(given: list[int], plain: list[fx.Node], written: Rows | None) -> Axis:
    """Adding up values of all rows in zeros without rows: the gradient of `_index`."""
    together = given == list(range(given[0], given[-1] + 1))
    rows = _aligned(plain, max(len(_shape(i)) for i in plain)) if together else None
    if rows is None or written != Rows(rows.dim + given[0], rows.outer, rows.inner):
        raise Mixed("writes into rows by index")
    return CONTRACTED


_ZEROS = {aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default}


def _pad(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows, padding = node.args[0].meta["rows"], node.args[1]
    if rows.dim >= len(_shape(node)) - len(padding) // 2:
        raise Mixed("pads the batch")
    return rows


def _repeat(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows, counts = node.args[0].meta["rows"], node.args[1]
    shift = len(counts) - len(_shape(node.args[0]))
    if counts[rows.dim + shift] != 1:
        raise Mixed("repeats the batch")
    return Rows(rows.dim + shift, rows.outer, rows.inner)


def _grown(node: fx.Node, batch: sympy.Symbol) -> Axis:
    """select_backward and slice_backward: the batch axis is where the result has it."""
    rows = node.args[0].meta["rows"]
    dim = node.args[2] % len(_shape(node))
    if node.target is aten.select_backward.default:
        rows = Rows(rows.dim + (dim <= rows.dim), rows.outer, rows.inner)
    if rows.dim == dim:
        raise Mixed("selects rows of the batch")
    return rows


def _select_scatter(node: fx.Node, batch: sympy.Symbol) -> Axis:
    base, part = node.args[0].meta["rows"], node.args[1].meta["rows"]
    dim = node.args[2] % len(_shape(node))
    if part is not None:
        part = Rows(part.dim + (dim <= part.dim), part.outer, part.inner)
    if base is None or part is None or part != base or base.dim == dim:
        raise Mixed("writes into rows of the batch")
    return base


def _slice_scatter(node: fx.Node, batch: sympy.Symbol) -> Axis:
    base, part = node.args[0].meta["rows"], node.args[1].meta["rows"]
    dim = (node.args[2] if len(node.args) > 2 else 0) % len(_shape(node))
    if base is None or part != base or base.dim == dim:
        raise Mixed("writes into rows of the batch")
    return base


def _like(node: fx.Node, batch: sympy.Symbol) -> Axis:
    """zeros_like, new_zeros(sizes), bernoulli, ...: the batch axis is where the sizes have it."""
    dims = [d for d, s in enumerate(_shape(node)) if _has(s, batch)]
    if not dims:
        return None
    rows = node.args[0].meta["rows"]
    if rows is not None and rows.dim == dims[0] and _shape(node)[dims[0]] == _shape(node.args[0])[dims[0]]:
        return rows
    return _made_up(node, batch)


def _diagonal(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows, rank = node.args[0].meta["rows"], len(_shape(node.args[0]))
    a = (node.args[2] if len(node.args) > 2 else 0) % rank
    b = (node.args[3] if len(node.args) > 3 else 1) % rank
    if rows.dim in (a, b):
        raise Mixed("takes a diagonal of the batch")
    return Rows(rows.dim - sum(d < rows.dim for d in (a, b)), rows.outer, rows.inner)


def _diagonal_scatter(node: fx.Node, batch: sympy.Symbol) -> Axis:
    base, part = node.args[0].meta["rows"], node.args[1].meta["rows"]
    a, b = (d % len(_shape(node)) for d in (*node.args[3:], *(0, 1)[len(node.args[3:]) :]))
    if base is None or part is None or base.dim in (a, b):
        raise Mixed("writes into a diagonal of the batch")
    if part != Rows(base.dim - sum(d < base.dim for d in (a, b)), base.outer, base.inner):
        raise Mixed("writes into a diagonal of the batch")
    return base


def _unfold(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows = node.args[0].meta["rows"]
    if node.args[1] % len(_shape(node.args[0])) == rows.dim:
        raise Mixed("unfolds the batch")
    return rows


def _unfold_backward(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows, rank = node.args[0].meta["rows"], len(_shape(node))
    if rows.dim in (node.args[2] % rank, rank):
        raise Mixed("unfolds the batch")
    return rows


def _linalg(node: fx.Node, batch: sympy.Symbol) -> Axis | tuple[Axis, ...]:
    """Operations on the last two axes."""
    operands = [n for n in _tensor_inputs(node) if n.meta["rows"] is not None]
    rows = {n.meta["rows"] for n in operands}
    if len(rows) != 1 or any(next(iter(rows)).dim > len(_shape(n)) - 2 for n in operands):
        raise Mixed("works across the rows of the batch")
    found = rows.pop()
    if found.dim != 0:
        raise Mixed("works across the rows of the batch")
    value = node.meta["val"]
    return found if isinstance(value, Tensor) else tuple(_leading(found, v, batch) for v in value)


def _memory_operator(node: fx.Node, batch: sympy.Symbol) -> tuple[Axis, ...]:
    from . import memory_operator

    return memory_operator.rows_rule(node, batch)


def _leading_axes(node: fx.Node, batch: sympy.Symbol) -> Axis:
    """Operations that add or take away the last axis."""
    rows = node.args[0].meta["rows"]
    if rows.dim >= min(len(_shape(node)), len(_shape(node.args[0]))):
        raise Mixed("takes the batch axis apart")
    return rows


def _unreduced(reduction_at: int) -> Callable:
    """Losses: element by element with reduction="none", across the batch otherwise."""

    def rule(node: fx.Node, batch: sympy.Symbol) -> Axis:
        default = node.kwargs.get("reduction", 1)
        if (node.args[reduction_at] if reduction_at < len(node.args) else default) != 0:
            raise Mixed("reduces over the rows of the batch")
        return _pointwise(node, batch)

    return rule


def _diag_embed(node: fx.Node, batch: sympy.Symbol) -> Axis:
    rows, rank = node.args[0].meta["rows"], len(_shape(node.args[0]))
    if len(node.args) > 2 or node.kwargs or rows.dim == rank - 1:
        raise Mixed("spreads the batch over a diagonal")
    return rows


def _outer_axis(node: fx.Node, batch: sympy.Symbol) -> Axis:
    """Operations on inner axes that take values with and without a leading batch axis."""
    rows = node.args[0].meta["rows"]
    if rows.dim != 0 or len(_shape(node.args[0])) < 3:
        raise Mixed("works across the rows of the batch")
    return rows


def _loop_operator(node: fx.Node, batch: sympy.Symbol) -> tuple[Axis, ...]:
    from . import loop_operator

    return loop_operator.rows_rule(node, batch)


_PERMUTE = _permutation(lambda node, rank: [d % rank for d in node.args[1]])


def _history_product(node: fx.Node, batch: sympy.Symbol) -> Axis:
    """Rows stay apart in products with a history; axis 0 is the rows, and what goes with each."""
    return Rows(0, 1, int(_shape(node)[0] / batch))


RULES: dict[Any, Callable] = dict.fromkeys(PRODUCTS, _history_product)

PACKET_RULES: dict[str, Callable] = {
    **dict.fromkeys(["view", "reshape", "_unsafe_view"], _view),
    "sum": _reduction(linear=True),
    **dict.fromkeys(["mean", "nansum", "amax", "amin", "any", "all"], _reduction(False)),
    **dict.fromkeys(["argmax", "argmin", "logsumexp", "prod"], _reduction(False)),
    **dict.fromkeys(["var", "std"], _reduction(False, 1, 99)),
    "var_mean": _reduction(False, 1, 99, 2),
    "norm": _reduction(False, 2, 3),
    "linalg_vector_norm": _reduction(False, 2, 3),
    **dict.fromkeys(["max", "min", "median", "mode"], _reduction(False, 1, 2, 2)),
    "kthvalue": _reduction(False, 2, 3, 2),
    **dict.fromkeys(["cumsum", "cumprod", "logcumsumexp", "_softmax", "_log_softmax", "softmax", "log_softmax",
                     "_safe_softmax",
                     "flip"], _along()),
    **dict.fromkeys(["cummax", "cummin"], _along(results=2)),
    "sort": _along(1, "dim", 2, -1),
    "topk": _along(2, "dim", 2, -1),
    "roll": _along(2, "dims"),
    "_softmax_backward_data": _along(2),
    "_log_softmax_backward_data": _along(2),
    "permute": _PERMUTE,
    "transpose": _permutation(_transpose_order),
    "t": _permutation(lambda node, rank: list(range(rank))[::-1]),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "select": _select,
    "slice": _slice,
    "split": _pieces, "split_with_sizes": _pieces, "chunk": _pieces,
    "unbind": _unbind,
    "cat": _cat, "stack": _stack,
    "mm": _mm, "addmm": _addmm, "bmm": _bmm, "mv": _matvec,
    "native_layer_norm": _layer_norm, "native_layer_norm_backward": _layer_norm_backward,
    "native_group_norm": _first_axis(), "native_group_norm_backward": _backward_in_three(4, 9, "normalises"),
    "_native_batch_norm_legit_no_training": _first_axis(also=(1, 2, 3, 4)),
    "native_batch_norm_backward": _batch_norm_backward,
    "convolution": _first_axis(also=(1, 2)), "convolution_backward": _backward_in_three(2, 10, "convolves"),
    "embedding": _embedding, "embedding_dense_backward": _embedding_backward,
    "index_select": _index_select, "gather": _gather,
    "scatter": _gather, "scatter_add": _gather, "scatter_reduce": _gather,
    "index": _index, "index_put": _index_put, "_unsafe_index": _index,
    "constant_pad_nd": _pad, "repeat": _repeat,
    "select_backward": _grown, "slice_backward": _grown,
    "select_scatter": _select_scatter, "slice_scatter": _slice_scatter,
    "diagonal": _diagonal, "diagonal_scatter": _diagonal_scatter,
    "unfold": _unfold, "unfold_backward": _unfold_backward,
    **dict.fromkeys(["zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros",
                     "new_ones", "new_full", "new_empty", "bernoulli", "randint_like", "normal_functional",
                     "bernoulli_p", "exponential", "uniform", "geometric", "cauchy", "log_normal", "random",
                     "new_empty_strided"], _like),
    **dict.fromkeys(["native_dropout", "rrelu_with_noise_functional"], _pointwise_tuple),
    **dict.fromkeys(["normal", "poisson", "binomial", "_standard_gamma"], _pointwise),
    "native_dropout_backward": _pointwise,
    "multinomial": _first_axis(),
    "_to_copy": _pointwise, "copy": _pointwise, "clone": _pointwise, "where": _pointwise, "cumsum_": _pointwise,
    "triu": _linalg, "tril": _linalg, "linalg_inv_ex": _linalg, "linalg_cholesky_ex": _linalg,
    "linalg_solve_triangular": _linalg, "_linalg_solve_ex": _linalg, "linalg_lu_factor_ex": _linalg,
    "max_pool2d_with_indices": _first_axis(), "avg_pool2d": _first_axis(), "avg_pool1d": _first_axis(),
    "_adaptive_avg_pool2d": _first_axis(), "upsample_nearest2d": _first_axis(),
    "max_pool2d_with_indices_backward": _first_axis(), "avg_pool2d_backward": _first_axis(),
    "_scaled_dot_product_flash_attention_for_cpu": _first_axis(),
    "_scaled_dot_product_flash_attention_for_cpu_backward": _first_axis(),
    "_scaled_dot_product_efficient_attention": _first_axis(),
    "_scaled_dot_product_attention_math": _first_axis(),
    "fill": _pointwise, "masked_fill": _pointwise,
    **dict.fromkeys([  # element by element, though torch does not tag them so
        "softplus_backward", "log_sigmoid_backward", "elu_backward", "hardtanh_backward", "hardswish_backward",
        "leaky_relu_backward", "hardsigmoid_backward", "softshrink_backward", "hardshrink_backward",
        "_prelu_kernel", "complex", "polar", "_conj", "_neg_view", "floor_divide",
    ], _pointwise),
    "log_sigmoid_forward": _pointwise_tuple, "_prelu_kernel_backward": _pointwise_tuple,
    "view_as_real": _leading_axes, "view_as_complex": _leading_axes,
    **dict.fromkeys(["mse_loss", "huber_loss", "smooth_l1_loss"], _unreduced(2)),
    **dict.fromkeys(["mse_loss_backward", "smooth_l1_loss_backward", "huber_loss_backward"], _unreduced(3)),
    **dict.fromkeys(["binary_cross_entropy", "binary_cross_entropy_with_logits"], _unreduced(3)),
    **dict.fromkeys(["linalg_lu_solve", "_linalg_slogdet", "_linalg_det", "linalg_lu", "linalg_qr", "_linalg_eigh",
                     "_linalg_svd", "linalg_matrix_exp", "cholesky_solve", "triangular_solve",
                     "linalg_lu_factor"], _linalg),
    "diag_embed": _diag_embed, "linalg_cross": _along(2, default=-1),
    "_cdist_forward": _first_axis(), "_euclidean_dist": _first_axis(),
    **dict.fromkeys(["im2col", "col2im", "pixel_shuffle", "pixel_unshuffle", "grid_sampler_2d"], _first_axis()),
    **dict.fromkeys(["reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d",
                     "upsample_linear1d", "upsample_bilinear2d"], _outer_axis),
    "bucketize": _pointwise,
    "glu": _along(default=-1), "glu_backward": _along(2, default=-1),
    "loop": _loop_operator, "loop_backward": _loop_operator,
    "inner_loop": _loop_operator, "inner_loop_backward": _loop_operator,
    "memory": _memory_operator, "memory_backward": _memory_operator,
}  # fmt: skip
