"""The pointwise operations of the loop language, one row each: how C++ writes it and what it means.

The C++ text works on vectors of the lanes' type (see kernels/math.h); a bool is a mask of int32 lanes.
An operation's arguments have one common type unless its row says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scalar:
    text: str
    meaning: Callable[..., Tensor]
    costly: bool = False


def _call(name: str, count: int = 1) -> str:
    return f"{name}({', '.join(f'{{{i}}}' for i in range(count))})"


def _inside(index: Tensor, size: Tensor, check: Tensor) -> Tensor:
    if ((index < 0) | (index >= size)).any():
        raise IndexError(f"an index is outside an axis of {int(size.flatten()[0])}")
    return index


def _inside_from_end(index: Tensor, size: Tensor, check: Tensor) -> Tensor:
    return _inside(torch.where(index < 0, index + size, index), size, check)


def _trunc_divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode="trunc")


SCALARS: dict[str, Scalar] = {
    "add": Scalar("{0} + {1}", torch.add),
    "sub": Scalar("{0} - {1}", torch.sub),
    "mul": Scalar("{0} * {1}", torch.mul),
    "div": Scalar("{0} / {1}", torch.div),
    "neg": Scalar("-{0}", torch.neg),
    "abs": Scalar(_call("absolute"), torch.abs),
    "reciprocal": Scalar(_call("reciprocal"), torch.reciprocal),
    "sqrt": Scalar(_call("square_root"), torch.sqrt),
    "rsqrt": Scalar(_call("reciprocal_root"), torch.rsqrt),
    "maximum": Scalar(_call("maximum", 2), torch.maximum),
    "minimum": Scalar(_call("minimum", 2), torch.minimum),
    "fmax": Scalar(_call("fmaximum", 2), torch.fmax),
    "fmin": Scalar(_call("fminimum", 2), torch.fmin),
    "floor_divide": Scalar(_call("floor_divide", 2), torch.floor_divide),
    "trunc_divide": Scalar(_call("trunc_divide", 2), _trunc_divide),
    "remainder": Scalar(_call("remainder_of", 2), torch.remainder),
    "fmod": Scalar(_call("fmod_of", 2), torch.fmod),
    "floor": Scalar(_call("lanes_floor"), torch.floor),
    "ceil": Scalar(_call("lanes_ceil"), torch.ceil),
    "trunc": Scalar(_call("lanes_trunc"), torch.trunc),
    "round": Scalar(_call("lanes_rint"), torch.round),
    "sign": Scalar(_call("sign_of"), torch.sign),
    "exp": Scalar(_call("exponential"), torch.exp, True),
    "exp2": Scalar(_call("lanes_exp2"), torch.exp2, True),
    "expm1": Scalar(_call("lanes_expm1"), torch.expm1, True),
    "log": Scalar(_call("logarithm"), torch.log, True),
    "log1p": Scalar(_call("logarithm_1p"), torch.log1p, True),
    "log2": Scalar(_call("lanes_log2"), torch.log2, True),
    "log10": Scalar(_call("lanes_log10"), torch.log10, True),
    "tanh": Scalar(_call("hyperbolic_tangent"), torch.tanh, True),
    "sigmoid": Scalar(_call("sigmoid"), torch.sigmoid, True),
    "erf": Scalar(_call("error_function"), torch.erf, True),
    "erfc": Scalar(_call("lanes_erfc"), torch.erfc, True),
    "lgamma": Scalar(_call("lanes_lgamma"), torch.lgamma, True),
    "sin": Scalar(_call("lanes_sin"), torch.sin, True),
    "cos": Scalar(_call("lanes_cos"), torch.cos, True),
    "tan": Scalar(_call("lanes_tan"), torch.tan, True),
    "asin": Scalar(_call("lanes_asin"), torch.asin, True),
    "acos": Scalar(_call("lanes_acos"), torch.acos, True),
    "atan": Scalar(_call("lanes_atan"), torch.atan, True),
    "sinh": Scalar(_call("lanes_sinh"), torch.sinh, True),
    "cosh": Scalar(_call("lanes_cosh"), torch.cosh, True),
    "asinh": Scalar(_call("lanes_asinh"), torch.asinh, True),
    "acosh": Scalar(_call("lanes_acosh"), torch.acosh, True),
    "atanh": Scalar(_call("lanes_atanh"), torch.atanh, True),
    "atan2": Scalar(_call("lanes_atan2", 2), torch.atan2, True),
    "hypot": Scalar(_call("lanes_hypot", 2), torch.hypot, True),
    "pow": Scalar(_call("lanes_pow", 2), torch.pow, True),
    "copysign": Scalar(_call("with_sign", 2), torch.copysign),
    "lt": Scalar(_call("less", 2), torch.lt),
    "le": Scalar(_call("less_equal", 2), torch.le),
    "gt": Scalar(_call("greater", 2), torch.gt),
    "ge": Scalar(_call("greater_equal", 2), torch.ge),
    "eq": Scalar(_call("equal", 2), torch.eq),
    "ne": Scalar(_call("not_equal", 2), torch.ne),
    "isnan": Scalar(_call("is_nan"), torch.isnan),
    "isinf": Scalar(_call("is_infinite"), torch.isinf),
    "where": Scalar(_call("choose", 3), torch.where),  # (bool, a, b)
    "bitwise_and": Scalar("{0} & {1}", torch.bitwise_and),
    "bitwise_or": Scalar("{0} | {1}", torch.bitwise_or),
    "bitwise_xor": Scalar("{0} ^ {1}", torch.bitwise_xor),
    "bitwise_not": Scalar("~{0}", torch.bitwise_not),
    "shift_left": Scalar(_call("shift_left", 2), torch.bitwise_left_shift),
    "inside": Scalar("inside({0}, {1}, {2}, call.fault, m)", _inside),  # (index, size, number of the check)
    "inside_from_end": Scalar("inside_from_end({0}, {1}, {2}, call.fault, m)", _inside_from_end),
    "round_bf16": Scalar("round_to<bf16>({0})", lambda x: x.to(torch.bfloat16).to(x.dtype)),
    "round_f16": Scalar("round_to<f16>({0})", lambda x: x.to(torch.float16).to(x.dtype)),
    "shift_right": Scalar(_call("shift_right", 2), torch.bitwise_right_shift),
}
