"""Operations of neural networks: normalisation, convolution, pooling, attention, losses."""

from __future__ import annotations

import sympy
from torch import fx

from ..ir.graph import shape_of
from .rules import CONTRACTED, Axis, Mixed, Rule, along, first_axis, pointwise
from .table import add


def _layer_norm(node: fx.Node, batch: sympy.Symbol) -> tuple[Axis, ...]:
    rows, rank = node.args[0].meta["rows"], len(shape_of(node.args[0]))
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


def _backward_in_three(count: int, mask_at: int, verb: str) -> Rule:
    """Gradients of an input with rows and of two parameters; the first `count` operands have rows in front."""

    def rule(node: fx.Node, batch: sympy.Symbol) -> tuple[Axis, ...]:
        rows = {n.meta["rows"] for n in node.args[:count]}
        others = [a for a in node.args[count:] if isinstance(a, fx.Node) and a.meta["rows"] is not None]
        if len(rows) != 1 or None in rows or next(iter(rows)).dim != 0 or others:
            raise Mixed(f"{verb} over the rows of the batch")
        axes = (rows.pop(), CONTRACTED, CONTRACTED)
        return tuple(axis if wanted else None for axis, wanted in zip(axes, node.args[mask_at]))

    return rule


def _batch_norm_backward(node: fx.Node, batch: sympy.Symbol) -> Axis | tuple[Axis, ...]:
    if node.args[7]:
        raise Mixed("normalises over the rows of the batch")
    return _backward_in_three(2, 9, "normalises")(node, batch)


def _unreduced(reduction_at: int) -> Rule:
    """Losses: element by element with reduction="none", across the batch otherwise."""

    def rule(node: fx.Node, batch: sympy.Symbol) -> Axis | tuple[Axis, ...]:
        default = node.kwargs.get("reduction", 1)
        if (node.args[reduction_at] if reduction_at < len(node.args) else default) != 0:
            raise Mixed("reduces over the rows of the batch")
        return pointwise(node, batch)

    return rule


def _outer_axis(node: fx.Node, batch: sympy.Symbol) -> Axis:
    """Operations on inner axes that take values with and without a leading batch axis."""
    rows = node.args[0].meta["rows"]
    if rows.dim != 0 or len(shape_of(node.args[0])) < 3:
        raise Mixed("works across the rows of the batch")
    return rows


# -- the rows of the table -----------------------------------------------------------------------------------

add("native_layer_norm", rows=_layer_norm, row_pass=True)
add("native_layer_norm_backward", rows=_layer_norm_backward, mask=7, row_pass=True)
add("native_group_norm", rows=first_axis(), sizes=(3,))
add("native_group_norm_backward", rows=_backward_in_three(4, 9, "normalises"), sizes=(5,), mask=9)
add("_native_batch_norm_legit_no_training", rows=first_axis(also=(1, 2, 3, 4)))
add("native_batch_norm_backward", rows=_batch_norm_backward, mask=9)
add("convolution", rows=first_axis(also=(1, 2)))
add("convolution_backward", rows=_backward_in_three(2, 10, "convolves"), mask=10)

add("_softmax _log_softmax", rows=along(), row_pass=True)
add("softmax log_softmax _safe_softmax", rows=along())
add("_softmax_backward_data", rows=along(2), row_pass=True, linear=((0,),))
add("_log_softmax_backward_data", rows=along(2), linear=((0,),))
add("glu", rows=along(default=-1), row_pass=True)
add("glu_backward", rows=along(2, default=-1), linear=((0,),))

add("max_pool2d_with_indices avg_pool2d avg_pool1d _adaptive_avg_pool2d upsample_nearest2d", rows=first_axis())
add("max_pool2d_with_indices_backward avg_pool2d_backward", rows=first_axis())
add("col2im", rows=first_axis(least=3))
add("im2col grid_sampler_2d", rows=first_axis(least=4))
add("reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d", rows=_outer_axis)
add("upsample_linear1d upsample_bilinear2d", rows=_outer_axis)
add("_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math", rows=first_axis(least=3))
add("_scaled_dot_product_flash_attention_for_cpu_backward", rows=first_axis())
add("_scaled_dot_product_efficient_attention", rows=first_axis())

add("mse_loss huber_loss smooth_l1_loss", rows=_unreduced(2))
add("mse_loss_backward smooth_l1_loss_backward huber_loss_backward", rows=_unreduced(3))
add("binary_cross_entropy binary_cross_entropy_with_logits", rows=_unreduced(3))
