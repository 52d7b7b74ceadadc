"""Algebra on a step graph that frees work from the loop, and removes what nobody needs.

Every pass takes a StepGraph and edits it in place; `PASSES` lists them in order. Those at the end come after the
loops are known (`hoists.py`), take the nodes that are in one, and move parts of products and sums out of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils._python_dispatch import _disable_current_modes

from .forget import forget_shapes
from .graph import Size, StepGraph, expression, shape_of
from .ops.table import is_random, operation_of

aten = torch.ops.aten
_END = 2**63 - 1


def simplify(step: StepGraph) -> None:
    for one_pass in PASSES:
        one_pass(step)
    forget_shapes()


# -- helpers -------------------------------------------------------------------------------------------------


def sizes_of(shape: Iterable[Any]) -> list[Any]:
    """Sizes as they stand in a node's arguments."""
    return [e if isinstance(e, int) else Size(e) for e in map(expression, shape)]


def _value(argument: Any, mode: Any) -> Any:
    if isinstance(argument, fx.Node):
        return argument.meta["val"]
    if isinstance(argument, Size):
        return mode.shape_env.create_symintnode(argument.expr, hint=None)
    if isinstance(argument, (list, tuple)):
        return [_value(a, mode) for a in argument]
    return argument


def call(before: fx.Node, target: Any, *args: Any, line: str | None = None, **kwargs: Any) -> fx.Node:
    """A new call in front of a node, with its value's metadata."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    fake = next(v for v in _tensors(args) if hasattr(v, "fake_mode"))
    with _disable_current_modes(), enable_python_dispatcher(), fake.fake_mode, torch.no_grad():
        node.meta["val"] = target(*_value(args, fake.fake_mode), **kwargs)
    node.meta["line"] = before.meta.get("line", "") if line is None else line
    return node


def made(before: fx.Node, target: Any, *args: Any, like: Tensor) -> fx.Node:
    """A value made from sizes, in front of a node, with the metadata of another."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, {"dtype": like.dtype, "device": like.device})
    node.meta.update(val=like, line=before.meta.get("line", ""))
    return node


def _tensors(args: Iterable[Any]) -> Iterable[Tensor]:
    for a in args:
        if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), Tensor):
            yield a.meta["val"]
        elif isinstance(a, (list, tuple)):
            yield from _tensors(a)


def replace(step: StepGraph, old: fx.Node, new: fx.Node) -> None:
    """Puts `new` wherever `old` is used, in the roles of the step too."""
    old.replace_all_uses_with(new)
    for roles in (step.outputs, step.nexts, step.grad_xs, step.grad_constants, step.grad_prevs, step.grad_captured):
        for i, node in enumerate(roles):
            if node is old:
                roles[i] = new


def calls(step: StepGraph, *targets: Any) -> list[fx.Node]:
    return [n for n in step.graph.nodes if n.op == "call_function" and (not targets or n.target in targets)]


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


# -- passes --------------------------------------------------------------------------------------------------


def remove_identities(step: StepGraph) -> None:
    """Copies, full slices, views and casts that change nothing."""
    for node in calls(step):
        same = _same_as(node)
        if same is not None and same is not node:
            replace(step, node, same)
    remove_dead(step)


def _same_as(node: fx.Node) -> fx.Node | None:
    node.target = _PLAIN_FORMS.get(node.target, node.target)
    target, args = node.target, node.args
    if target is aten.copy.default:
        return _copied(node)
    if target in (aten.new_zeros.default, aten._efficientzerotensor.default):  # (the second holds no numbers)
        like = node.meta["val"]
        node.target, node.args = aten.zeros.default, (args[0] if target is not aten.new_zeros.default else args[1],)
        node.kwargs = {"dtype": like.dtype, "device": like.device}
        return None
    if target in (aten.view.default, aten.expand.default, aten.reshape.default, aten._unsafe_view.default):
        source = args[0]
        if shape_of(source) == shape_of(node):
            return source
        if target is not aten.expand.default:
            if -1 in args[1]:  # no rows at all leave it open what -1 stands for
                args = node.args = (source, [s if isinstance(s, int) else Size(s) for s in shape_of(node)])
            node.target = aten.view.default if target is not aten.reshape.default else target
            if source.target is aten.view.default and target is not aten.reshape.default:
                node.args = (source.args[0], args[1])
        return None
    if not args or not isinstance(args[0], fx.Node):
        return None
    if target is aten._to_copy.default:
        source = args[0].meta["val"]
        return args[0] if (source.dtype, source.device) == (node.meta["val"].dtype, node.meta["val"].device) else None
    if target is aten.slice.Tensor and shape_of(args[0]) == shape_of(node):
        return args[0] if argument(node, 4, "step", 1) == 1 else None
    if target is aten.slice_scatter.default and shape_of(args[0]) == shape_of(args[1]):
        return args[1]
    if target is aten.slice_backward.default and shape_of(args[0]) == shape_of(node):
        return args[0]
    if target is aten.t.default and isinstance(args[0], fx.Node) and args[0].target is aten.t.default:
        return args[0].args[0]
    if target in (aten.squeeze.dims, aten.squeeze.dim) and shape_of(args[0]) == shape_of(node):
        return args[0]
    return None


_PLAIN_FORMS = {
    aten.unsafe_split.Tensor: aten.split.Tensor,
    aten.unsafe_split_with_sizes.default: aten.split_with_sizes.default,
}


def _copied(node: fx.Node) -> fx.Node:
    """copy(a, b) is b in a's shape and dtype."""
    source, like = node.args[1], node.meta["val"]
    if source.meta["val"].dtype != like.dtype:
        source = call(node, aten._to_copy.default, source, dtype=like.dtype)
    if shape_of(source) != tuple(expression(s) for s in like.shape):
        sizes = [Size(e) if not isinstance(e, int) else e for e in map(expression, like.shape)]
        source = call(node, aten.expand.default, source, sizes)
    return source


def expose_products(step: StepGraph) -> None:
    """addmm and baddbmm as a product and a sum, so that each can go its own way."""
    for node in calls(step, aten.addmm.default, aten.baddbmm.default):
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1 or len(node.args) > 3:
            continue
        bias, a, b = node.args
        product = aten.mm.default if node.target is aten.addmm.default else aten.bmm.default
        product = call(node, product, a, b)
        replace(step, node, call(node, aten.add.Tensor, product, bias))
    for node in calls(step, aten.linear.default):
        if len(shape_of(node.args[0])) == 2:
            result = call(node, aten.mm.default, node.args[0], call(node, aten.t.default, node.args[1]))
            bias = argument(node, 2, "bias", None)
            replace(step, node, result if bias is None else call(node, aten.add.Tensor, result, bias))
    remove_dead(step)


def split_products(step: StepGraph, in_loop: set[fx.Node]) -> bool:
    """linear(cat(a, b)) = linear_a(a) + linear_b(b) where only b is in the loop, and the transpose of that: a
    product of which one slice is needed in the loop and another outside becomes two products."""
    changed = False
    for node in calls(step, aten.mm.default):
        if node not in in_loop or node.args[1] in in_loop:
            continue
        changed |= _split_sum(step, node, in_loop) or _split_result(step, node, in_loop)
    remove_dead(step)
    return changed


def _split_sum(step: StepGraph, node: fx.Node, in_loop: set[fx.Node]) -> bool:
    left, right = node.args
    parts = _columns(left)
    if parts is None or all(p in in_loop for p in parts):
        return False
    total, start = None, 0
    for _, run in groupby(parts, key=in_loop.__contains__):
        run = list(run)
        width = sum(shape_of(p)[1] for p in run)
        joined = run[0] if len(run) == 1 else call(node, aten.cat.default, run, 1)
        weight = call(node, aten.slice.Tensor, right, 0, start, start + width)
        product = call(node, aten.mm.default, joined, weight)
        total = product if total is None else call(node, aten.add.Tensor, total, product)
        start += width
    replace(step, node, total)
    return True


def _split_result(step: StepGraph, node: fx.Node, in_loop: set[fx.Node]) -> bool:
    users = list(node.users)
    if len(users) < 2 or node in _results(step) or not all(_is_column_slice(u, node) for u in users):
        return False
    if len({u in in_loop for u in users}) < 2:
        return False
    for user in users:
        right = call(user, aten.slice.Tensor, node.args[1], 1, *user.args[2:4])
        replace(step, user, call(user, aten.mm.default, node.args[0], right))
    return True


def _columns(node: Any) -> list[fx.Node] | None:
    """The parts of a concatenation along axis 1 of matrices, all of known width."""
    if not isinstance(node, fx.Node) or node.target is not aten.cat.default:
        return None
    if argument(node, 1, "dim", 0) not in (1, -1) or len(shape_of(node)) != 2:
        return None
    parts = list(node.args[0])
    ok = all(len(shape_of(p)) == 2 and isinstance(shape_of(p)[1], int) for p in parts)
    # Weight gradients multiply a transposed cotangent from the left: there the concatenation stays whole.
    return parts if ok and len(parts) > 1 else None


def _is_column_slice(user: fx.Node, node: fx.Node) -> bool:
    if user.target is not aten.slice.Tensor or user.args[0] is not node or len(user.args) != 4:
        return False
    return user.args[1] in (1, -1) and all(isinstance(a, int) for a in user.args[2:4])


def _results(step: StepGraph) -> set[fx.Node]:
    roles = (step.outputs, step.nexts, step.grad_xs, step.grad_constants, step.grad_prevs, step.grad_captured)
    return {n for role in roles for n in role if n is not None}


def free_of_buffers(step: StepGraph) -> None:
    """The gradient of log_sigmoid from its input: what the forward leaves for it is something on the CPU alone."""
    for node in calls(step, aten.log_sigmoid_backward.default):
        grad, x, _ = node.args
        if x.meta["val"].device.type != "cpu":
            slope = call(node, aten.sigmoid.default, call(node, aten.neg.default, x))
            replace(step, node, call(node, aten.mul.Tensor, grad, slope))
    remove_dead(step)


def expose_fixed_statistics(step: StepGraph) -> None:
    """The gradient of a batch norm in eval mode as arithmetic: it is one of a product and a sum."""
    for node in calls(step, aten.native_batch_norm_backward.default):
        if node.args[7] or any(u.target is not operator.getitem for u in node.users):
            continue
        for user in list(node.users):
            replace(step, user, _of_fixed_statistics(node, user.args[1]))
    remove_dead(step)


def _of_fixed_statistics(node: fx.Node, which: int) -> fx.Node:
    """The gradient of input, weight or bias."""
    grad, x, weight, mean, variance = node.args[:5]
    rank = len(shape_of(grad))

    def wide(value: fx.Node) -> fx.Node:
        return call(node, aten.view.default, value, [-1, *[1] * (rank - 2)])

    inverse = call(node, aten.rsqrt.default, call(node, aten.add.Tensor, variance, node.args[8]))
    if which == 0:
        scale = inverse if weight is None else call(node, aten.mul.Tensor, inverse, weight)
        return call(node, aten.mul.Tensor, grad, wide(scale))
    if which == 1:
        normal = call(node, aten.mul.Tensor, call(node, aten.sub.Tensor, x, wide(mean)), wide(inverse))
        grad = call(node, aten.mul.Tensor, grad, normal)
    return call(node, aten.sum.dim_IntList, grad, [0, *range(2, rank)])


def split_backward_calls(step: StepGraph) -> None:
    """A backward call that gives the gradients of input and weights becomes two: one may have to stay in the
    loop, the other never."""
    for node in calls(step):
        where = operation_of(node).mask
        if where is None or where >= len(node.args):
            continue
        mask = list(node.args[where])
        items = [u for u in node.users if u.target is operator.getitem]
        if len(items) != len(node.users) or not mask[0] or not any(mask[1:]):
            continue
        groups = {True: [True, False, False], False: [False, *mask[1:]]}
        for is_input, wanted in groups.items():
            chosen = [u for u in items if (u.args[1] == 0) == is_input]
            if not chosen:
                continue
            args = (*node.args[:where], wanted, *node.args[where + 1 :])
            with node.graph.inserting_before(node):
                part = node.graph.call_function(node.target, args, node.kwargs)
            part.meta.update(val=tuple(v if w else None for v, w in zip(node.meta["val"], wanted)),
                             line=node.meta.get("line", ""))  # fmt: skip
            for item in chosen:
                item.update_arg(0, part)
    remove_dead(step)


def remove_duplicates(step: StepGraph) -> None:
    """Common subexpressions."""
    known: dict[Any, fx.Node] = {}
    for node in calls(step):
        if is_random(node):
            continue
        key = (node.target, _key(node.args), _key(tuple(sorted(node.kwargs.items()))))
        try:
            first = known.setdefault(key, node)
        except TypeError:
            continue
        if first is not node:
            replace(step, node, first)
    remove_dead(step)


def _key(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return tuple(_key(a) for a in argument)
    if isinstance(argument, float):
        return ("float", repr(argument))
    return (type(argument), argument)


def remove_dead(step: StepGraph) -> None:
    """Calls whose value nobody uses. Nothing in a captured step has side effects."""
    results = list(dict.fromkeys(_results(step)))
    output = next((n for n in step.graph.nodes if n.op == "output"), None)
    if output is not None:
        output.args = (results,)
    else:
        step.graph.output(results)
    for node in reversed(list(step.graph.nodes)):
        if node.op == "call_function" and not node.users:
            step.graph.erase_node(node)


def free_constants(step: StepGraph) -> None:
    """new_zeros, ones_like and the like of known sizes depend on no value: they are the same at every step."""
    for node in calls(step):
        target = _FROM_SIZES.get(node.target)
        if target is None or not all(isinstance(size, int) for size in shape_of(node)):
            continue
        like = node.meta["val"]
        filled = node.args[2:3] if node.target is aten.new_full.default else node.args[1:2]
        args = (sizes_of(like.shape), *(filled if target is aten.full.default else ()))
        replace(step, node, made(node, target, *args, like=like))
    remove_dead(step)


_FROM_SIZES = {
    **dict.fromkeys([aten.new_zeros.default, aten.zeros_like.default], aten.zeros.default),
    **dict.fromkeys([aten.new_ones.default, aten.ones_like.default], aten.ones.default),
    **dict.fromkeys([aten.new_full.default, aten.full_like.default], aten.full.default),
}  # fmt: skip


PASSES: list[Callable[[StepGraph], None]] = [
    remove_identities,
    free_constants,
    remove_duplicates,
    expose_products,
    expose_fixed_statistics,
    free_of_buffers,
    split_backward_calls,
    remove_identities,
    remove_duplicates,
]


# -- once the loops are known --------------------------------------------------------------------------------


def distribute(step: StepGraph, in_loop: set[fx.Node]) -> bool:
    """W(a + b) = W a + W b where only b is in the loop: the product of a leaves it."""
    changed = False
    for node in calls(step, aten.mm.default):
        left, right = node.args
        if node not in in_loop or right in in_loop or left not in in_loop or not _plain_sum(left):
            continue
        a, b = left.args
        if (a in in_loop) == (b in in_loop) or not shape_of(a) == shape_of(b) == shape_of(left):
            continue
        parts = [call(node, aten.mm.default, part, right) for part in (a, b)]
        replace(step, node, call(node, aten.add.Tensor, *parts))
        changed = True
    remove_dead(step)
    return changed


def gather_sums(step: StepGraph, in_loop: set[fx.Node]) -> bool:
    """In a sum of several terms, those from outside the loop are added up outside."""
    changed = False
    for node in reversed(calls(step, aten.add.Tensor)):
        if node not in in_loop or not _plain_sum(node) or _continues(node, in_loop):
            continue
        terms = _terms(node, in_loop)
        outside = [t for t in terms if t not in in_loop]
        inside = [t for t in terms if t in in_loop]
        if len(outside) < 2 or not inside:
            continue
        # Small terms (biases) first: the large array is then gone over once.
        first, *rest = sorted(outside, key=lambda t: len(shape_of(t)))
        total = first
        for term in rest:
            total = call(node, aten.add.Tensor, term, total)
        result = inside[0]
        for term in inside[1:]:
            result = call(node, aten.add.Tensor, result, term)
        result = call(node, aten.add.Tensor, result, total)
        if shape_of(result) == shape_of(node) and result.meta["val"].dtype == node.meta["val"].dtype:
            replace(step, node, result)
            changed = True
    remove_dead(step)
    return changed


def _plain_sum(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return False
    if not all(isinstance(a, fx.Node) for a in node.args):
        return False
    dtypes = {a.meta["val"].dtype for a in node.args}
    return len(dtypes) == 1 and node.meta["val"].dtype.is_floating_point


def _continues(node: fx.Node, in_loop: set[fx.Node]) -> bool:
    """Whether the only use of a sum is a larger sum."""
    users = list(node.users)
    return len(users) == 1 and _plain_sum(users[0]) and users[0] in in_loop


def _terms(node: fx.Node, in_loop: set[fx.Node]) -> list[fx.Node]:
    terms = []
    for part in node.args:
        inner = _plain_sum(part) and len(part.users) == 1 and part.args[0] is not part.args[1]
        terms.extend(_terms(part, in_loop) if inner else [part])
    return terms
