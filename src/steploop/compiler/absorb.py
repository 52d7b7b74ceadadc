"""Makes a loop wider: it takes in operations around it that do not stand on its recurrence.

Before the loop these are views, pointwise operations, reductions of rows, and products of sequences with weights, where
the loop alone reads what they give. After the loop they are the same operations on what the loop gives, but no products
with weights. Products of a row's own matrix with a vector are taken on both sides: outside, an outer product would be
written for all steps, and a matrix of every step would be kept to be read once.

Without this, such operations run for all steps at once. A native loop runs them as well, and reads their results while
they are in the cache, or in a register; it makes products with weights for some steps at a time. It takes rows from
where the caller has them, and it is one call instead of several. A view of a sequence costs a native loop nothing;
outside, as a sequence of its own, it may cost a copy.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from .extract import extract
from .ir.graph import Rows, expression, op_name
from .ops.table import is_view, operation_of
from .passes.repeats import repetition
from .problem import BatchedPart, LoopPart, Partition

WIDE = 16  # numbers of a row that are worth an operation inside: narrow ones are better off with all rows at once


def absorb(
    loop: LoopPart, result: Partition, earlier: set[fx.Node], products: bool, operations: bool
) -> LoopPart | None:
    """The wider loop, or None where it would be the same. The partition stays as it is.

    earlier: what loops before this one took.
    products, operations: whether to take those, and not only views. What is wanted of it all, the loop keeps.
    """
    problem = result.problem
    if problem.batch is None:
        return None
    for follow in (operations, False):
        late: set[fx.Node] = set()
        while True:
            finder = _Finder(loop, result, earlier, products, operations, late)
            taken = finder.run(follow)
            wider = _widened(loop, taken, finder.shared, result) if taken else None
            if wider is None:
                return None
            missing = {i for i in wider.inputs if not finder.there_before(i)}
            if not missing:
                return wider if _readable(wider) else None
            if not follow or missing <= late:
                break
            late |= missing  # what follows the loop and reads one of these is better off outside
    return None


def _widened(loop: LoopPart, taken: set[fx.Node], shared: set[fx.Node], result: Partition) -> LoopPart:
    order = {n: i for i, n in enumerate(result.problem.graph.nodes)}
    wider = LoopPart(sorted([*taken, *loop.nodes], key=order.__getitem__), loop.states)
    wider.also_outside = shared
    extract(wider, result.problem, result)
    return wider


def _readable(loop: LoopPart) -> bool:
    """Whether every sequence that a loop reads has its rows in front, as a row of it is read where it stands."""
    program: Any = loop.program
    return all(i.kind == "once" or i.rows in (None, Rows(0)) for i in program.inputs)


class _Finder:
    """late: values that are not there when the loop begins."""

    def __init__(
        self, loop: LoopPart, result: Partition, earlier: set[fx.Node], products: bool, operations: bool,
        late: set[fx.Node],
    ):  # fmt: skip
        self.products, self.operations, self.late = products, operations, late
        problem = result.problem
        at = result.segments.index(loop)
        self.before = {n for s in result.segments[:at] for n in s.nodes} | earlier
        batched = [[n for n in s.nodes if isinstance(s, BatchedPart) and n not in earlier] for s in result.segments]
        self.after = [n for nodes in batched[at + 1 :] for n in nodes]
        self.outside = [n for nodes in batched for n in nodes]
        self.calls = {n for s in result.segments for n in s.nodes}
        self.inside = {*loop.nodes, *(s.prev for s in loop.states)}
        self.wanted, self.delayed = set(problem.wanted), set(result.delayed)
        self.needed = {*problem.summed, *(s.next for s in problem.states), *self.delayed}
        self.taken: set[fx.Node] = set()
        self.shared: set[fx.Node] = set()  # views that others read as well: computing nothing, they are there twice
        self.lefts: set[fx.Node] = set()  # what products read must be a sequence that is there

    def run(self, follow: bool) -> set[fx.Node]:
        following = self._following() if follow else set()
        self.taken |= following
        for node in reversed(self.outside):
            if node in self.needed or node in self.lefts or node in self.taken:
                continue
            if self._is_view(node) and self._read_by_it(node):
                self.taken.add(node)
                if self._stands_outside(node):
                    self.shared.add(node)
            elif not self._alone(node):
                continue
            elif self._is_biased(node) or self._is_operation(node):
                self.taken.add(node)
            elif self._is_product(node):
                self.taken.add(node)
                self.lefts.add(node.args[0])
        self._drop_idle(following)
        self._drop_unreadable(following)
        return self.taken | self._repeats()

    def _repeats(self) -> set[fx.Node]:
        """Repetitions of constants that the loop alone reads: views of a row, where the constant has each row once."""
        found: set[fx.Node] = set()
        own = self.inside | self.taken
        for source in dict.fromkeys(i for n in own for i in n.all_input_nodes):
            chain = repetition(source) if source.op == "call_function" and not source.meta["varies"] else None
            if chain is not None and all(map(self._only_for, chain, [*([n] for n in chain[1:]), own])):
                found.update(chain)
        return found

    def _only_for(self, node: fx.Node, users: Any) -> bool:
        return node not in self.wanted | self.needed and all(u in users for u in node.users if u.op != "output")

    def there_before(self, node: fx.Node) -> bool:
        """Whether a value is known when the loop begins."""
        given = node.op == "placeholder" and node not in self.delayed
        return given or node in self.before or not node.meta["varies"]

    def _following(self) -> set[fx.Node]:
        """The operations after the loop that it takes in: they work on its values row by row, and what they give is
        wanted or narrower, so that the loop need not keep those values of every step."""
        known: set[fx.Node] = set()  # without this loop or a later one
        found: dict[fx.Node, None] = {}
        for node in self.after:
            sources = _sequences(node)
            if node in self.delayed or node in self.late:
                continue
            if all(self.there_before(i) or i in known for i in sources):
                if node not in self.needed and self._reads_a_matrix(node):
                    found[node] = None
                else:
                    known.add(node)
            elif node not in self.needed and self._comes_of(sources, {*found, *known}):
                if self._follows(node):
                    found[node] = None
        return self._worth_it(found, known)

    def _worth_it(self, found: dict[fx.Node, None], known: set[fx.Node]) -> set[fx.Node]:
        """Those of the operations that follow which save keeping something wide, and what they need."""
        count = None
        while count != len(found):
            count = len(found)
            for node in reversed(list(found)):
                inside = [u in found for u in node.users if u in self.calls]
                if _widest(node) < WIDE:
                    idle = not any(inside)  # it is here only for others
                else:  # it would have to be kept in place of what it is made of
                    idle = node not in self.wanted and not all(inside) and not _narrows(node)
                if idle:
                    del found[node]
            for node in list(found):
                if not self._comes_of(_sequences(node), {*found, *known}):
                    del found[node]
        return set(found)

    def _follows(self, node: fx.Node) -> bool:
        """Whether a loop that gives what an operation reads can do the operation as well."""
        sources = _sequences(node)
        if not all(_leads(n) for n in (node, *sources)) or not all(map(self._is_readable, sources)):
            return False
        if is_view(node):
            return True
        known = operation_of(node)
        if is_light_product(node):
            return self.operations
        return self.operations and (known.row_pass or known.selects or known.pointwise) and not known.random

    def _is_readable(self, source: fx.Node) -> bool:
        """Whether a loop can read a value: its own, or a sequence whose rows stand by themselves, or a view of one."""
        if not self.there_before(source) or _rows_in_front(source):
            return True
        seen_through = source.op == "call_function" and is_view(source) and _leads(source)
        return seen_through and all(map(self._is_readable, _sequences(source)))

    def _comes_of(self, sources: list[fx.Node], known: set[fx.Node]) -> bool:
        return all(i in self.inside or i in known or self.there_before(i) for i in sources)

    def _reads_a_matrix(self, node: fx.Node) -> bool:
        """Whether a product takes a vector of a matrix that is given at every step: the loop may well read it too."""
        return is_light_product(node) and self._follows(node) and _narrows(node)

    def _read_by_it(self, node: fx.Node) -> bool:
        return any(u in self.inside or u in self.taken for u in node.users)

    def _alone(self, node: fx.Node) -> bool:
        """Whether the loop alone reads it."""
        users = [u for u in node.users if u in self.calls]
        return bool(users) and all(u in self.inside or u in self.taken - self.shared for u in users)

    def _stands_outside(self, view: fx.Node) -> bool:
        """Whether a view that the loop takes in must be outside as well: it is wanted, or others read it."""
        return view in self.wanted or not self._alone(view)

    def _is_view(self, node: fx.Node) -> bool:
        return is_view(node) and all(map(_leads, [node, *node.all_input_nodes]))

    def _is_operation(self, node: fx.Node) -> bool:
        """Pointwise, or a reduction of every row, over rows that are wide enough."""
        known = operation_of(node)
        fits = known.row_pass or known.pointwise or is_light_product(node)
        if not self.operations or not fits or known.random or not _leads(node):
            return False
        return all(map(_leads, _sequences(node))) and _widest(node) >= WIDE

    def _is_product(self, node: Any) -> bool:
        if not self.products or op_name(node) != "mm" or not _rows_in_front(node):
            return False
        left, right = node.args
        plain = left.meta["rows"] == Rows(0) and left.meta["varies"] and right.meta["rows"] is None
        sizes = map(expression, right.meta["val"].shape)
        return plain and not right.meta["varies"] and all(isinstance(n, int) for n in sizes)

    def _is_biased(self, node: fx.Node) -> bool:
        """A product, of which nothing else is read, plus the same numbers in every row."""
        if op_name(node) != "add" or node.kwargs or len(node.args) != 2:
            return False
        for product, bias in (node.args, node.args[::-1]):
            if product in self.outside and self._is_product(product) and len(product.users) == 1:
                return isinstance(bias, fx.Node) and bias.meta["rows"] is None and not bias.meta["varies"]
        return False

    def _drop_idle(self, following: set[fx.Node]) -> None:
        """A sum before the loop stays outside if its product does, and a part of a result if that result does."""
        for node in self.outside:
            if node in self.taken - following and op_name(node) in ("add", "getitem"):
                if not any(i in self.taken for i in node.all_input_nodes):
                    self.taken.discard(node)

    def _drop_unreadable(self, following: set[fx.Node]) -> None:
        """A loop reads sequences with one row of numbers per row: what needs another stays outside."""
        before = None
        while before != (before := (len(self.taken), len(self.shared))):
            for node in self.taken - following:
                sources = [i for i in _sequences(node) if i not in self.taken and i not in self.inside]
                if not all(map(_rows_in_front, sources)) or not self._read_by_it(node):
                    self.taken.discard(node)
                    self.shared.discard(node)
                elif is_view(node) and self._stands_outside(node):
                    self.shared.add(node)
                elif not is_view(node) and not self._alone(node):
                    self.taken.discard(node)


def is_light_product(node: fx.Node) -> bool:
    """A product of two matrices of every row, one of them a vector: memory is what it takes, not arithmetic."""
    if op_name(node) != "bmm" or not all(i.meta["varies"] for i in node.args):
        return False
    (_, m, k), (_, _, n) = (map(expression, i.meta["val"].shape) for i in node.args)
    return 1 in (m, k, n)


def _width(node: fx.Node) -> int:
    """Numbers in a row; a size that is not known counts as wide."""
    value, rows = node.meta["val"], node.meta["rows"]
    value = value if isinstance(value, Tensor) else value[0]
    rows = rows if isinstance(rows, Rows) else rows[0]
    sizes = [rows.inner, *map(expression, value.shape[1:])]
    return math.prod(sizes) if all(isinstance(n, int) for n in sizes) else WIDE


def _narrows(node: fx.Node) -> bool:
    """Whether a row of a value has fewer numbers than one of what it is made of, by far."""
    return isinstance(node.meta["val"], Tensor) and any(
        2 * _width(node) <= _width(i) for i in _sequences(node)
    )


def _widest(node: fx.Node) -> int:
    return max(map(_width, [node, *_sequences(node)]))


def _sequences(node: fx.Node) -> list[fx.Node]:
    """What an operation reads that differs from step to step."""
    return [i for i in node.all_input_nodes if i.meta["varies"]]


def _leads(node: fx.Node) -> bool:
    """Whether the rows of a value stand in front, each some numbers together that are known to be so many."""
    rows = node.meta["rows"]
    if not node.meta["varies"]:
        return False
    found = rows if isinstance(rows, (tuple, list)) else [rows]
    return all(isinstance(r, Rows) and (r.dim, r.outer) == (0, 1) and isinstance(r.inner, int) for r in found)


def _rows_in_front(node: fx.Node) -> bool:
    value, rows = node.meta["val"], node.meta["rows"]
    if not node.meta["varies"]:
        return False
    if isinstance(value, Tensor):
        return rows == Rows(0)
    return isinstance(rows, (tuple, list)) and all(r == Rows(0) for r in rows)
