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
from .ops.table import is_factory, is_random, linear_in
from .partition import State
from .printing import Source, call_text, fuse_addmm, last_uses, print_argument, print_size
from .schedule import Span

aten = torch.ops.aten


class Rowwise:
    """What a printed piece needs of the span it runs on."""

    def __init__(self, span: Span, current: dict[fx.Node, Tensor]):
        self.span, self.current = span, current
        self.batch = span.schedule.batch
        self.steps = span.stop - span.start
        self.reset_to: dict[fx.Node, Tensor] = {}
        self.down = False
        self.stacked = False
        self.long_product: Callable[..., Tensor | None] | None = None  # the backend's own, for float32 products

    def product(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """a @ b + bias for N rows, b the same for all of them."""
        found = self.long_product(a, b, bias) if self.long_product is not None else None
        if found is not None:
            return found
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)

    def gather(self, value: Tensor, rows: Rows) -> Tensor:
        """(B rows) -> (N rows): each packed row's own row of a value that is the same at every step."""
        if rows.plain and self.span.schedule.full:
            shape = list(value.shape)
            wide = value.unsqueeze(rows.dim).expand(*shape[: rows.dim], self.steps, *shape[rows.dim :])
            return wide.flatten(rows.dim, rows.dim + 1)
        if rows.plain:
            return value.index_select(rows.dim, self.span.row)
        inner = rows.inner if isinstance(rows.inner, int) else -1
        wide = value.unflatten(rows.dim, (rows.outer, self.batch, inner))
        return wide.index_select(rows.dim + 1, self.span.row).flatten(rows.dim, rows.dim + 2)

    def delay(self, prev: fx.Node, following: Tensor) -> Tensor:
        """The value of a state before each step, from its values after each step."""
        edge = self.current[prev]
        if self.stacked:
            edge = edge.unsqueeze(0)
        return self.span.delay(following, edge, self.reset_to.get(prev), self.down)

    def finish(self, prev: fx.Node, values: Tensor) -> Tensor:
        """The value of a state after the span."""
        edge = self.current[prev]
        if self.stacked:
            return self.span.finish(values, edge.unsqueeze(0), None, self.down)[0]
        return self.span.finish(values, edge, self.reset_to.get(prev), self.down)

    def spread(self, value: Tensor, node: fx.Node) -> Tensor:
        """A value that is the same at every step, as one value per step."""
        if self.stacked:
            return value.expand(self.steps, *value.shape)
        if node.meta["rows"] is None:
            return value.expand(self.span.total, *value.shape[1:])
        return self.gather(value, node.meta["rows"])

    def sum_rows(self, value: Tensor, inner: int = 1) -> Tensor:
        """(N * inner, ...) -> (B * inner, ...), summed over the steps of each row."""
        if self.span.schedule.full:
            return value.reshape(self.steps, self.batch * inner, *value.shape[1:]).sum(0)
        wide = value.reshape(self.span.total, inner, *value.shape[1:])
        total = wide.new_zeros(self.batch, *wide.shape[1:]).index_add_(0, self.span.row, wide)
        return total.reshape(self.batch * inner, *value.shape[1:])

    def fold(self, value: Tensor, inner: int) -> Tensor:
        """(N * inner, m, k) -> (B * inner, P, m, k), zero where a row has ended."""
        if not self.span.schedule.full:
            wide = value.reshape(self.span.total, inner, *value.shape[1:])
            dense = wide.new_zeros(self.steps * self.batch, *wide.shape[1:])
            value = dense.index_copy_(0, self.span.dense, wide)
        return value.reshape(self.steps, self.batch * inner, *value.shape[-2:]).transpose(0, 1)

    def unfold(self, value: Tensor, inner: int) -> Tensor:
        """The inverse of `fold`."""
        flat = value.transpose(0, 1).reshape(self.steps * self.batch, inner, *value.shape[2:])
        if not self.span.schedule.full:
            flat = flat.index_select(0, self.span.dense)
        return flat.reshape(flat.shape[0] * inner, *value.shape[2:])

    def product_with_constant(self, a: Tensor, b: Tensor, inner: int) -> Tensor:
        """bmm of packed (N * inner, m, k) and constant (B * inner, k, n)."""
        dense = self.fold(a, inner)
        shape = dense.shape
        result = torch.bmm(dense.reshape(shape[0], shape[1] * shape[2], shape[3]), b)
        return self.unfold(result.view(shape[0], shape[1], shape[2], b.shape[2]), inner)

    def constant_with_product(self, a: Tensor, b: Tensor, inner: int) -> Tensor:
        """bmm of constant (B * inner, m, k) and packed (N * inner, k, n)."""
        return self.product_with_constant(b.transpose(1, 2), a.transpose(1, 2), inner).transpose(1, 2)

    def summed_product(self, a: Tensor, b: Tensor, inner: int) -> Tensor:
        """The sum over steps of bmm(a, b), both packed: (B * inner, m, n)."""
        a, b = self.fold(a, inner), self.fold(b, inner)
        a = a.permute(0, 2, 1, 3).reshape(a.shape[0], a.shape[2], -1)
        return torch.bmm(a, b.reshape(b.shape[0], -1, b.shape[3]))


class Piece:
    """Nodes printed as one function of the values they read."""

    def __init__(
        self, nodes: Sequence[fx.Node], results: Sequence[fx.Node], summed: set[fx.Node], batch: Any,
        delayed: dict[fx.Node, State],
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
    def __init__(self, piece: Piece, summed: set[fx.Node], batch: Any, delayed: dict[fx.Node, State]):
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
        inputs = {i for n in passing for i in self._linear_inputs(n)}
        self.piece.row_sums = demanded | {i for i in inputs if only_as_sum(i)}

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


class StackedPiece:
    """Calls of a step without a known batch axis, for all steps: one `vmap` over T."""

    def __init__(self, nodes: Sequence[fx.Node], results: Sequence[fx.Node], delayed: dict[fx.Node, State]):
        self.results = list(results)
        self.delays = [n for n in nodes if n in delayed]
        self.runs = _runs(nodes, delayed)
        inside = set(nodes)
        self.delayed = delayed
        self.reads = list(dict.fromkeys(
            s for n in nodes for s in ([delayed[n].next] if n in delayed else n.all_input_nodes) if s not in inside
        ))  # fmt: skip
        self.functions = [run if isinstance(run, fx.Node) else _stacked_function(run) for run in self.runs]

    def __call__(self, rowwise: Rowwise, sizes: dict[str, int], values: Sequence[Tensor]) -> Sequence[Tensor]:
        known = dict(zip(self.reads, values))
        for run in self.functions:
            if isinstance(run, fx.Node):
                state = self.delayed[run]
                following = known[state.next]
                if not state.next.meta["varies"]:
                    following = rowwise.spread(following, state.next)
                known[run] = rowwise.delay(state.prev, following)
                continue
            reads, made, drawn_from, function = run
            in_dims = tuple(0 if n.meta["varies"] or n in drawn_from else None for n in reads)
            # A draw in the shape of something that does not vary would be drawn once for all steps by vmap.
            arguments = [
                rowwise.spread(known[n], n) if n in drawn_from and not n.meta["varies"] else known[n] for n in reads
            ]
            if rowwise.steps == 0:
                outputs = [_empty_stack(n, sizes) for n in made]
            elif any(d == 0 for d in in_dims):
                outputs = _mapped(lambda *a: function(sizes, a), in_dims, arguments)
            else:  # random numbers from nothing
                dummy = torch.empty(rowwise.steps, device="cpu")
                outputs = _mapped(lambda _, *a: function(sizes, a), (0, *in_dims), [dummy, *arguments])
            known.update(zip(made, outputs))
        return [known[n] for n in self.results]


def _mapped(function: Callable[..., Any], in_dims: tuple[int | None, ...], arguments: Sequence[Tensor]) -> Any:
    """vmap over the steps. Where torch has no rule for an operation, it runs the steps one by one, and would warn: the
    caller can do nothing about it. Of some operations it says instead that they need a rule."""
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)
    try:
        return torch.func.vmap(function, in_dims, randomness="different")(*arguments)
    except RuntimeError as error:
        if "atching rule" not in str(error):
            raise
        steps = next(len(a) for a, dim in zip(arguments, in_dims) if dim == 0)
        parts = [function(*(a if d is None else a[t] for a, d in zip(arguments, in_dims))) for t in range(steps)]
        return [torch.stack(p) for p in zip(*parts)]
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(True)


def _parts(node: fx.Node) -> Sequence[Any]:
    value = node.meta["val"]
    return value if isinstance(value, (tuple, list)) else (value,)


def _empty_stack(node: fx.Node, sizes: dict[str, int]) -> Any:
    def empty(value: Tensor) -> Tensor:
        return torch.empty((0, *shape_at(value, sizes)), dtype=value.dtype, device=value.device)

    return tree_map_only(Tensor, empty, node.meta["val"])


def _runs(nodes: Sequence[fx.Node], delayed: dict[fx.Node, State]) -> list[Any]:
    runs: list[Any] = []
    for node in nodes:
        if node in delayed:
            runs.append(node)
        elif runs and isinstance(runs[-1], list):
            runs[-1].append(node)
        else:
            runs.append([node])
    return runs


def _stacked_function(
    nodes: list[fx.Node],
) -> tuple[list[fx.Node], list[fx.Node], set[fx.Node], Callable[..., Any]]:
    """What a run of calls reads and makes, what its draws read, and the function of one step."""
    inside = set(nodes)
    drawn_from = {i for n in nodes if is_random(n) for i in n.all_input_nodes}
    reads = list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside))
    made = [n for n in nodes if all(isinstance(v, Tensor) for v in _parts(n))]
    source = Source()
    source.add("def stacked(sizes, values):", 0)
    if reads:
        source.add(f"{', '.join(n.name for n in reads)}, = values")
    for symbol in sorted({s for n in [*nodes, *reads] for s in symbols_of(n)}, key=str):
        source.add(f"{symbol} = sizes['{symbol}']")
    for node in nodes:
        source.add(f"{node.name} = {call_text(source, node, lambda n: n.name)}")
    source.add(f"return ({', '.join(n.name for n in made)}{',' if made else ''})")
    return reads, made, drawn_from, source.build("stacked")
