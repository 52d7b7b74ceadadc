"""Pieces of a step outside its loops, run for all steps of a span at once.

Rows are independent there, so a piece simply runs with the rows of all steps in place of the batch: its graph
is symbolic in B, and B becomes N. Three things are not that simple and have a rule each:
    a value with a batch axis that is the same at every step meets packed rows: its rows are gathered, except
        that a batched product with it (attention over a memory) folds the steps into its row axis;
    a sum over rows (a gradient of something without a batch) over N rows is the sum over all steps as well;
    a gradient of something with a batch axis is summed over the steps of each row; products inside such sums
        contract over the steps directly.
Where no batch axis is known the pieces run under `torch.func.vmap` over T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from .history_products import PRODUCTS
from .ir.graph import Rows, shape_at, symbols_of
from .ops.table import is_factory, linear_in
from .printing import Source, call_text, fuse_addmm, last_uses, print_argument, print_size
from .problem import StateNodes
from .rowwise import Rowwise

aten = torch.ops.aten


class Piece:
    """Nodes printed as one function of the values they read."""

    def __init__(
        self, nodes: Sequence[fx.Node], results: Sequence[fx.Node], summed: set[fx.Node], batch: Any,
        delayed: dict[fx.Node, StateNodes],
    ):  # fmt: skip
        self.nodes = list(nodes)
        self.results = list(results)
        self.row_sums: set[fx.Node] = set()
        self.batch = batch
        self.printer = _Printer(self, summed, batch, delayed)
        self.reads = self.printer.reads
        self.function = self.printer.build()

    def __call__(self, rowwise: Rowwise, sizes: dict[str, int], values: Sequence[Tensor]) -> Sequence[Tensor]:
        if rowwise.span.total == 0:
            return [self._of_no_rows(n, rowwise, sizes) for n in self.results]
        return self.function(rowwise, sizes, values)

    def _of_no_rows(self, node: fx.Node, rowwise: Rowwise, sizes: dict[str, int]) -> Any:
        """A result where no step is valid; sums are zero. (Some of torch's operations can't take no rows.)"""
        rows = rowwise.batch if node in self.row_sums else 0
        known = {**sizes, str(self.batch): rows}

        def empty(value: Tensor) -> Tensor:
            return torch.zeros(shape_at(value, known), dtype=value.dtype, device=value.device)

        return tree_map_only(Tensor, empty, node.meta["val"])


class _Printer:
    def __init__(self, piece: Piece, summed: set[fx.Node], batch: Any, delayed: dict[fx.Node, StateNodes]):
        self.piece, self.batch, self.delayed = piece, batch, delayed
        self.inside = set(piece.nodes)
        self.source = Source()
        self.names = {n: n.name for n in piece.nodes}
        self.constants: dict[fx.Node, str] = {}
        self.gathered: dict[fx.Node, str] = {}
        self.summed_up: dict[fx.Node, str] = {}
        self.reads: list[fx.Node] = []
        self._find_row_sums(summed)
        self._find_reads()

    def _find_reads(self) -> None:
        found: dict[fx.Node, None] = {}
        for node in self.piece.nodes:
            sources = [self.delayed[node].next] if node in self.delayed else node.all_input_nodes
            for source in sources:
                if source not in self.inside:
                    found[source] = None
        self.reads = list(found)
        for node in self.reads:
            self.names[node] = node.name

    def _find_row_sums(self, summed: set[fx.Node]) -> None:
        """Values only wanted as a sum over the steps of each row: linear operations are run on the sums."""
        results = set(self.piece.results) - summed
        demanded = {
            n for n in self.piece.nodes
            if n in summed and n.meta["rows"] is not None and not any(u in self.inside for u in n.users)
        }
        passing = set(demanded)
        for node in reversed(self.piece.nodes):
            if node in passing:
                passing.update(i for i in self._linear_inputs(node) if i in self.inside)

        def only_as_sum(node: fx.Node) -> bool:
            users = [u for u in node.users if u in self.inside]
            return node in self.inside and node not in results and all(u in passing for u in users)

        changed = True
        while changed:
            changed = False
            for node in list(passing):
                kept = node in demanded or all(u in passing for u in node.users if u in self.inside)
                inputs = self._linear_inputs(node)
                # A product is worth a sum of its own, a view is not.
                clear = _is_product(node) or all(map(only_as_sum, inputs))
                if not (kept and clear and inputs):
                    passing.discard(node)
                    changed = True
        self.passing = passing
        read = {i for n in passing for i in self._linear_inputs(n)}
        self.piece.row_sums = demanded | {i for i in read if only_as_sum(i)}

    def _linear_inputs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs whose row sums give the row sum of a call, the others being the same at every step; [] where
        they do not. Rows are in front in all of them."""
        if node in self.delayed or not _in_front(node):
            return []
        linear = [i for i in node.all_input_nodes if i.meta["varies"]]
        fixed = [i for i in node.all_input_nodes if not i.meta["varies"]]
        if not linear or not all(map(_in_front, linear)) or not linear_in(node, linear):
            return []
        if not fixed:
            return linear if all(i in self.inside for i in linear) else []
        rows = node.meta["rows"]
        fits = len(linear) == 1 and linear[0].meta["rows"] == rows
        return linear if fits and all(i.meta["rows"] in (None, rows) for i in fixed) else []

    # -- printing ------------------------------------------------------------------------------------------

    def build(self) -> Callable[..., Any]:
        add = self.source.add
        add("def piece(rowwise, sizes, values):", 0)
        if self.reads:
            add(f"{', '.join(self.names[n] for n in self.reads)}, = values")
        self._bind_symbols()
        keep = set(self.piece.results) | set(self.reads)
        nodes = self.piece.nodes
        plain = [n for n in nodes if n not in self.piece.row_sums]
        sums = fuse_addmm(plain, keep | self.piece.row_sums)
        sums = {n: p for n, p in sums.items() if all(self._direct(i) for i in (*p[0].args, p[1]))}
        skipped = {product for product, _ in sums.values()}
        dying = last_uses(nodes, keep, sums)
        for node in nodes:
            if node in skipped:
                continue
            if node in sums:
                product, other = sums[node]
                a, b = (self.names[i] for i in product.args)
                text = f"{self.source.hold(torch.addmm, 'f')}({self.names[other]}, {a}, {b})"
                if _is_long(product) and other.meta["val"].dim() == 1:
                    text = f"rowwise.product({a}, {b}, {self.names[other]})"
            else:
                text = self._text(node)
            add(f"{self.names[node]} = {text}")
            gone = [self.names[d] for d in dying.get(node, []) if d is not node and d in self.inside]
            if gone:
                add(f"del {', '.join(gone)}")
        results = [self.names[n] for n in self.piece.results]
        add(f"return ({', '.join(results)}{',' if results else ''})")
        return self.source.build("piece")

    def _direct(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and (node.meta["varies"] or node.meta["rows"] is None)

    def _bind_symbols(self) -> None:
        symbols = {s for n in [*self.piece.nodes, *self.reads] for s in symbols_of(n)}
        for symbol in sorted(symbols, key=str):
            if symbol != self.batch:
                self.source.add(f"{symbol} = sizes['{symbol}']")
        if self.batch is not None:
            self.source.add(f"{self.batch} = rowwise.span.total")

    def _text(self, node: fx.Node) -> str:
        if node in self.piece.row_sums:
            return self._sum_text(node)
        if node in self.delayed:
            return self._text_of_delay(node)
        if node.target in PRODUCTS:
            arguments = [print_argument(self.source, a, self._rows_name) for a in node.args]
            return f"{self.source.hold(node.target, 'f')}(rowwise, {', '.join(arguments)})"
        if _is_long(node) and all(map(self._direct, node.args)):
            a, b = (self.names[i] for i in node.args)
            return f"rowwise.product({a}, {b})"
        special = self._product_text(node) or self._contracted_text(node)
        return special or call_text(self.source, node, self._rows_name)

    def _rows_name(self, node: fx.Node) -> str:
        """The name of a value with N rows (or with none)."""
        if node in self.piece.row_sums:
            raise AssertionError(f"{node} is only known as a sum")
        rows = node.meta["rows"]
        if node.meta["varies"] or rows is None or isinstance(rows, tuple):
            return self.names[node]
        if node not in self.gathered:
            name = f"{node.name}_rows"
            if is_factory(node) and not node.all_input_nodes:
                self.source.add(f"{name} = {call_text(self.source, node, self._rows_name)}")
            else:
                self.source.add(f"{name} = rowwise.gather({self.names[node]}, {self.source.hold(rows)})")
            self.gathered[node] = name
        return self.gathered[node]

    def _product_text(self, node: fx.Node) -> str | None:
        if node.target is not aten.bmm.default:
            return None
        (a, b), rows = node.args, node.meta["rows"]
        if rows is None or rows.dim != 0 or rows.outer != 1:
            return None
        constant = [n.meta["rows"] is not None and not n.meta["varies"] for n in (a, b)]
        if constant == [False, True] and a.meta["rows"] == rows:
            return f"rowwise.product_with_constant({self.names[a]}, {self.names[b]}, {print_size(rows.inner)})"
        if constant == [True, False] and b.meta["rows"] == rows:
            return f"rowwise.constant_with_product({self.names[a]}, {self.names[b]}, {print_size(rows.inner)})"
        return None

    def _contracted_text(self, node: fx.Node) -> str | None:
        """A product over the rows of all steps, with something that is the same at every step: of their sum."""
        if node.target is not aten.mm.default:
            return None
        a, b = node.args
        if a.meta["rows"] is None or b.meta["rows"] is None or a.meta["varies"] == b.meta["varies"]:
            return None
        left, right = a.meta["rows"], b.meta["rows"]
        if (left.dim, left.outer, right.dim, right.outer) != (1, 1, 0, 1) or left.inner != right.inner:
            return None
        if b.meta["varies"]:
            return f"torch.mm({self.names[a]}, {self._sum_of(b, self.names[b])})"
        source = a.args[0] if a.target is aten.t.default else a
        return f"torch.mm({self._sum_of(source, f'{self.names[a]}.t()', left)}.t(), {self.names[b]})"

    def _sum_name(self, node: fx.Node) -> str:
        """The name of the row sum of a value that varies, or of one that is the same at every step."""
        if node in self.piece.row_sums or not node.meta["varies"]:
            return self.names[node]
        return self._sum_of(node, self.names[node])

    def _sum_of(self, node: fx.Node, text: str, rows: Rows | None = None) -> str:
        """The name of the row sum of a value that is there with N rows as well: `text` in front."""
        if node in self.piece.row_sums:
            return self.names[node]
        if node not in self.summed_up:
            self.summed_up[node] = f"{node.name}_sum"
            inner = print_size((rows or node.meta["rows"]).inner)
            self.source.add(f"{self.summed_up[node]} = rowwise.sum_rows({text}, {inner})")
        return self.summed_up[node]

    def _sum_text(self, node: fx.Node) -> str:
        rows = node.meta["rows"]
        if node in self.passing:
            text = call_text(self.source, node, self._sum_name)
            # On sums the batch is B again, not N.
            self.source.add(f"{self.batch} = rowwise.batch")
            self.source.add(f"{self.names[node]} = {text}")
            self.source.add(f"{self.batch} = rowwise.span.total")
            return self.names[node]
        if node.target is aten.bmm.default and rows.dim == 0 and rows.outer == 1:
            a, b = node.args
            if a.meta["rows"] == rows == b.meta["rows"]:
                return f"rowwise.summed_product({self._rows_name(a)}, {self._rows_name(b)}, {print_size(rows.inner)})"
        if node in self.delayed:
            text = self._text_of_delay(node)
        else:
            text = self._product_text(node) or call_text(self.source, node, self._rows_name)
        if rows.dim == 0 and rows.outer == 1:
            return f"rowwise.sum_rows({text}, {print_size(rows.inner)})"
        order = f"movedim({rows.dim}, 0)"
        return f"rowwise.sum_rows(({text}).{order}, {print_size(rows.inner)}).movedim(0, {rows.dim})"

    def _text_of_delay(self, node: fx.Node) -> str:
        state = self.delayed[node]
        return f"rowwise.delay({self.source.hold(state.prev, 'n')}, {self._rows_name(state.next)})"


def _is_long(node: fx.Node) -> bool:
    """A product of many rows with a weight."""
    if node.target is not aten.mm.default:
        return False
    a, b = node.args
    return a.meta["rows"] is not None and a.meta["rows"].dim == 0 and a.meta["varies"] and b.meta["rows"] is None


def _is_product(node: fx.Node) -> bool:
    """Whether a call multiplies what varies by something that does not."""
    return any(not i.meta["varies"] for i in node.all_input_nodes)


def _in_front(node: fx.Node) -> bool:
    rows = node.meta["rows"]
    return rows is not None and not isinstance(rows, tuple) and (rows.dim, rows.outer) == (0, 1)


class OncePiece:
    """Calls that do not depend on the step, run once per call with all B rows."""

    def __init__(self, nodes: Sequence[fx.Node], batch: Any):
        self.nodes = list(nodes)
        self.inside = set(nodes)
        self.reads = list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in self.inside))
        self.function = self._print(batch)

    def _print(self, batch: Any) -> Callable[..., Any]:
        source = Source()
        source.add("def once(sizes, values):", 0)
        names = {n: n.name for n in [*self.nodes, *self.reads]}
        if self.reads:
            source.add(f"{', '.join(names[n] for n in self.reads)}, = values")
        for symbol in sorted({s for n in [*self.nodes, *self.reads] for s in symbols_of(n)}, key=str):
            source.add(f"{symbol} = sizes['{symbol}']")
        for node in self.nodes:
            source.add(f"{names[node]} = {call_text(source, node, names.__getitem__)}")
        source.add(f"return ({', '.join(names[n] for n in self.nodes)}{',' if self.nodes else ''})")
        return source.build("once")

    def __call__(self, sizes: dict[str, int], values: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.function(sizes, values)
