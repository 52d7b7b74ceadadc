"""Operations on every number by itself. Torch's own tag says so of most; these rows say more, or stand in for it."""

from __future__ import annotations

from .rules import pointwise
from .table import add

add("add sub rsub", linear=((0, 1),))
add("neg positive", linear=((0,),))
add("mul", linear=((0,), (1,)))
add("div", linear=((0,),))
add("div.Tensor_mode div.Scalar_mode")  # these round
add("lerp", linear=((0, 1),))
add("addcmul", linear=((0, 1), (0, 2)))
add("addcdiv", linear=((0, 1),))
add("where", pointwise=True, linear=((1, 2),))
add("masked_fill", pointwise=True, linear=((0, 2),))
add("fill copy complex polar bucketize floor_divide", pointwise=True)
add("_to_copy", pointwise=True, moves=True, linear=((0,),))
add("_conj", pointwise=True, linear=((0,),))
add("_neg_view", pointwise=True)

# Gradients are linear in the gradient that they are given. Torch does not tag all of them.
add("sigmoid_backward tanh_backward threshold_backward silu_backward gelu_backward", linear=((0,),))
add(
    "softplus_backward elu_backward leaky_relu_backward hardtanh_backward log_sigmoid_backward",
    pointwise=True,
    linear=((0,),),
)
add("native_dropout_backward", pointwise=True, linear=((0,),))
add("hardswish_backward hardsigmoid_backward softshrink_backward hardshrink_backward", pointwise=True)
add("_prelu_kernel hardswish", pointwise=True)
add("log_sigmoid_forward _prelu_kernel_backward", rows=pointwise)
