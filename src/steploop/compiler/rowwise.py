"""The rows of one span as batched pieces see them: gathered, moved by a step, summed, folded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from .ir.graph import Rows
from .span import Span


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
        rows, steps, m, k = a.shape
        a = a.permute(0, 2, 1, 3).reshape(rows, m, steps * k)
        return torch.bmm(a, b.reshape(rows, steps * k, b.shape[3]))
