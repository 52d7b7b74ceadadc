"""What the middle end of the compiler knows of every operation: one row of one table.

The rows stand in the files beside this one, each with the rules that it names. An operation without a row is known
by torch's own tags: element by element, or random. All else that nobody has written down is taken to mix the rows of
the batch, which is slower and never wrong. How a backend runs an operation is the backend's own table.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..ir.graph import packet_name
from .rules import Rule, pointwise


@dataclass(frozen=True)
class Operation:
    """One row.

    rows: where the batch axis of the result is. None: it mixes the rows of the batch.
    pointwise: every number of the result depends on one number of each input alone (inputs are broadcast).
    linear: groups of positions of arguments. A call is additive in the arguments of one group taken together, while
        all others stay as they are: f(a1 + a2, b1 + b2, c) = f(a1, b1, c) + f(a2, b2, c) for the group (0, 1).
    view: it computes nothing. "shape": all numbers of its first argument, in order (an axis may be repeated);
        "order": all of them, the axes in another order; "part": some of them.
    moves: it computes nothing either, but copies: numbers put together, or in another dtype.
    factory: it is made of sizes and numbers alone, so that it can be made again wherever it is used.
    row_pass: it goes over the numbers of a row once or twice: a native loop does that as fast as all rows at once.
    selects: it picks a few numbers of a row: worth doing in a native loop where the row need not be kept then.
    sizes: positions of arguments that are sizes of the result. Elsewhere a size is a number that is computed with.
    mask: the position of the flags that say which gradients a backward call gives.
    random: it draws numbers.
    written_as: a function that does the same with torch's operations; for operations that are not torch's own.
    """

    name: str
    rows: Rule | None = None
    pointwise: bool = False
    linear: tuple[tuple[int, ...], ...] = ()
    view: str = ""
    moves: bool = False
    factory: bool = False
    row_pass: bool = False
    selects: bool = False
    sizes: tuple[int, ...] = ()
    mask: int | None = None
    random: bool = False
    written_as: Callable[..., Any] | None = None

    @property
    def cheap(self) -> bool:
        """Whether doing it again costs less than keeping what it gave."""
        return bool(self.view) or self.moves or self.factory


# By the name of an ATen packet ("add"), of one overload ("div.Tensor_mode"), or by the function itself.
TABLE: dict[Any, Operation] = {}
_found: dict[Any, Operation] = {}


def add(names: str, **facts: Any) -> None:
    """Rows that say the same of several ATen packets; names: with spaces between them."""
    for name in names.split():
        put(name, Operation(name, **facts))


def put(key: Any, row: Operation) -> None:
    TABLE[key] = row
    _found.clear()


def operation_of(node: fx.Node) -> Operation:
    """What is known of the operation that a node calls."""
    found = _found.get(node.target)
    if found is None:
        found = _found[node.target] = _look_up(node.target)
    return found


def _look_up(target: Any) -> Operation:
    name = packet_name(target)
    overload = getattr(target, "_overloadname", "")
    row = TABLE.get(target) or TABLE.get(f"{name}.{overload}") or TABLE.get(name) or Operation(name)
    tags = getattr(target, "tags", ())
    row = replace(
        row,
        pointwise=row.pointwise or torch.Tag.pointwise in tags,
        random=torch.Tag.nondeterministic_seeded in tags,
    )
    return replace(row, rows=pointwise) if row.rows is None and row.pointwise else row


def is_random(node: fx.Node) -> bool:
    return operation_of(node).random


def is_view(node: fx.Node) -> bool:
    """Whether a call computes nothing; the parts of a result with several parts are taken by such calls too."""
    return node.target is operator.getitem or bool(operation_of(node).view)


def is_factory(node: fx.Node) -> bool:
    """Made from sizes alone (zeros, ones): made again where it is used rather than stored for every step."""
    return node.op == "call_function" and operation_of(node).factory and not operation_of(node).random


def is_zero(value: Any) -> bool:
    """Whether an argument is known to be zero, or absent."""
    if not isinstance(value, fx.Node):
        return value is None or (isinstance(value, (int, float)) and value == 0)
    if value.op != "call_function":
        return False
    name = packet_name(value.target)
    filled = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}.get(name)
    return name in ("zeros", "zeros_like", "new_zeros") or (filled is not None and is_zero(value.args[filled]))


def linear_groups(node: fx.Node) -> list[set[fx.Node]]:
    """The sets of inputs in which a call is additive together; what is known to be zero may be left out of a set.

    A number in a group is one that is added: x + 1 is not additive in x. An input that stands outside its group
    as well (x * x) is none of it.
    """
    found = []
    for group in operation_of(node).linear:
        values = [v for at in group for v in tree_leaves(_argument(node, at))]
        inside = {v for v in values if isinstance(v, fx.Node)}
        outside = {v for v in tree_leaves(_others(node, group)) if isinstance(v, fx.Node)}
        numbers = (v for v in values if not isinstance(v, fx.Node))
        if inside and not inside & outside and all(map(is_zero, numbers)) and _in_real_numbers(node):
            found.append(inside)
    return found


def linear_in(node: fx.Node, inputs: Sequence[fx.Node]) -> bool:
    """Whether a call is additive in exactly these inputs together, its others staying as they are."""
    wanted = set(inputs)
    return any(wanted <= g and all(map(is_zero, g - wanted)) for g in linear_groups(node))


def _argument(node: fx.Node, position: int) -> Any:
    return node.args[position] if position < len(node.args) else None


def _others(node: fx.Node, group: Sequence[int]) -> list[Any]:
    return [*(a for i, a in enumerate(node.args) if i not in group), *node.kwargs.values()]


def _in_real_numbers(node: fx.Node) -> bool:
    """Sums are not kept by a cast to whole numbers."""
    value = node.meta["val"]
    tensors = [v for v in tree_leaves(value) if isinstance(v, Tensor)]
    return all(t.dtype.is_floating_point or t.dtype.is_complex for t in tensors)
