"""Operations that read or write where numbers say: embeddings, gather, scatter, advanced indexing."""

from __future__ import annotations

import sympy
import torch
from torch import fx

from ..ir.graph import Rows, shape_of
from .rules import CONTRACTED, Axis, Mixed, aligned, tensor_inputs
from .table import add, is_zero

aten = torch.ops.aten


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
    dim = node.args[1] % len(shape_of(node.args[0]))
    if source is not None and (index is not None or source.dim == dim):
        raise Mixed("selects rows of the batch")
    return source if source is not None else Rows(dim, index.outer, index.inner)


def _gather(node: fx.Node, batch: sympy.Symbol) -> Axis:
    operands = [n for n in tensor_inputs(node)]
    rows = aligned(operands, len(shape_of(node)))
    if node.args[1] % len(shape_of(node)) == rows.dim:
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
    rank = max(len(shape_of(i)) for i in plain)
    rows = aligned(plain, rank)
    return Rows(rows.dim + given[0], rows.outer, rows.inner)


def _index_put(node: fx.Node, batch: sympy.Symbol) -> Axis:
    base, indices, values = node.args[:3]
    rows, written = base.meta["rows"], values.meta["rows"]
    given = [d for d, i in enumerate(indices) if i is not None]
    plain = [indices[d] for d in given]
    if not given or any(i.meta["val"].dtype == torch.bool for i in plain):
        raise Mixed("writes into rows by index")
    if rows is None and len(node.args) > 3 and node.args[3] and is_zero(base):
        return _summed_by_index(given, plain, written)
    if len(given) != 1:
        raise Mixed("writes into rows by index")
    (dim,), (index,) = given, plain
    rank = len(shape_of(node)) - 1 + len(shape_of(index))  # of what is written
    if written is not None:
        written = Rows(written.dim + rank - len(shape_of(values)), written.outer, written.inner)
    if rows is None or rows.dim >= dim or index.meta["rows"] is not None or written not in (None, rows):
        raise Mixed("writes into rows by index")
    return rows


def _summed_by_index(given: list[int], plain: list[fx.Node], written: Rows | None) -> Axis:
    """Adding up values of all rows in zeros without rows: the gradient of `_index`."""
    together = given == list(range(given[0], given[-1] + 1))
    rows = aligned(plain, max(len(shape_of(i)) for i in plain)) if together else None
    if rows is None or written != Rows(rows.dim + given[0], rows.outer, rows.inner):
        raise Mixed("writes into rows by index")
    return CONTRACTED


# -- the rows of the table -----------------------------------------------------------------------------------

add("embedding", rows=_embedding, linear=((0,),))
add("embedding_dense_backward", rows=_embedding_backward, linear=((0,),))
add("index_select", rows=_index_select, linear=((0,),))
add("gather", rows=_gather, selects=True, linear=((0,),))
add("scatter scatter_reduce", rows=_gather)
add("scatter_add", rows=_gather, linear=((0, 3),))
add("index _unsafe_index", rows=_index, linear=((0,),))
add("index_put", rows=_index_put)
