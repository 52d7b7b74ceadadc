"""Lowerings of pointwise ATen operations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from .checks import DIVISION
from .language import Expr
from .lowering import Lowering, Unsupported, lowers

_ARITHMETIC = {
    "add": "add", "sub": "sub", "mul": "mul", "maximum": "maximum", "minimum": "minimum", "fmax": "fmax",
    "fmin": "fmin", "remainder": "remainder", "fmod": "fmod", "atan2": "atan2", "hypot": "hypot",
    "pow": "pow", "copysign": "copysign",
    "bitwise_and": "bitwise_and", "bitwise_or": "bitwise_or", "bitwise_xor": "bitwise_xor",
    "__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor",
    "bitwise_left_shift": "shift_left", "bitwise_right_shift": "shift_right",
    "__lshift__": "shift_left", "__rshift__": "shift_right",
}  # fmt: skip
_TO_INTEGERS = ("floor", "ceil", "trunc", "round")
_DIVISIONS = ("floor_divide", "trunc_divide", "remainder", "fmod")
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_UNARY = (
    "neg", "abs", "reciprocal", "sqrt", "rsqrt", "sign", "exp", "exp2", "expm1",
    "log", "log1p", "log2", "log10", "tanh", "sigmoid", "erf", "erfc", "lgamma", "sin", "cos", "tan",
    "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "bitwise_not",
)  # fmt: skip


class Point:
    """Builds the value of one pointwise node: arguments broadcast to its shape, operations as methods.

    node: None where shape and dtype are given.
    """

    def __init__(self, low: Lowering, node: Any, shape: Any = None, dtype: torch.dtype | None = None):
        self.low, self.node = low, node
        self.shape = low.shape(node) if shape is None else shape
        self.dtype = node.meta["val"].dtype if dtype is None else dtype

    def __call__(self, value: Any, dtype: torch.dtype | None = None) -> Expr:
        return self.low.as_expr(value, self.shape, dtype or self.dtype)

    def op(self, name: str, *args: Any, dtype: torch.dtype | None = None) -> Expr:
        """Arguments of the common type `dtype` (the node's)."""
        return self.low.make.op(name, [self(a, dtype) for a in args], dtype or self.dtype)

    def test(self, name: str, *args: Any, dtype: torch.dtype | None = None) -> Expr:
        return self.low.make.op(name, [self(a, dtype) for a in args], torch.bool)

    def where(self, mask: Expr, a: Any, b: Any) -> Expr:
        return self.low.make.op("where", [self(mask, torch.bool), self(a), self(b)], self.dtype)

    def add(self, a: Any, b: Any) -> Expr:
        return self.op("add", a, b)

    def sub(self, a: Any, b: Any) -> Expr:
        return self.op("sub", a, b)

    def mul(self, a: Any, b: Any) -> Expr:
        return self.op("mul", a, b)

    def div(self, a: Any, b: Any) -> Expr:
        return self.op("div", a, b)


def _common(node: fx.Node) -> torch.dtype:
    """The type in which the arguments of a node are compared."""
    first, second = node.args[:2]
    return torch.result_type(_plain(first), _plain(second))


def _plain(arg: Any) -> Any:
    """A stand-in for result_type: an empty tensor of the same rank class and type, or the number."""
    if not isinstance(arg, fx.Node):
        return arg if isinstance(arg, (bool, int, float)) else 0
    val = arg.meta["val"]
    return torch.empty((1,) if val.dim() else (), dtype=val.dtype)


def _register_plain() -> None:
    for name in _UNARY:
        lowers(name)(lambda low, node, op=name: Point(low, node).op(op, node_arg(low, node, 0)))
    for name in _TO_INTEGERS:
        lowers(name)(lambda low, node, op=name: _to_integers(low, node, op))
    for name, op in _ARITHMETIC.items():
        lowers(name)(lambda low, node, op=op: _arithmetic(low, node, op))
    for name in _COMPARISONS:
        lowers(name)(lambda low, node, op=name: _comparison(low, node, op))


def node_arg(low: Lowering, node: fx.Node, index: int, default: Any = None) -> Any:
    """Positional argument of a node, lowered."""
    return low.argument(node.args[index]) if len(node.args) > index else default


def option(low: Lowering, node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name, lowered."""
    if len(node.args) > index:
        return low.argument(node.args[index])
    return low.argument(node.kwargs[name]) if name in node.kwargs else default


def _arithmetic(low: Lowering, node: fx.Node, op: str) -> Expr:
    point = Point(low, node)
    a, b = low.args(node)[:2]
    alpha = low.argument(node.kwargs.get("alpha", 1))
    if alpha != 1:
        b = point.mul(b, alpha)
    if point.dtype == torch.bool:
        op = {
            "add": "bitwise_or",
            "mul": "bitwise_and",
            "maximum": "bitwise_or",
            "minimum": "bitwise_and",
        }.get(op, op)
        if op not in ("bitwise_or", "bitwise_and", "bitwise_xor"):
            raise Unsupported(f"{op} on bools")
    if op == "pow":
        return _power(point, a, b)
    return _divided(point, op, a, b) if op in _DIVISIONS else point.op(op, a, b)


def _divided(point: Point, op: str, a: Any, b: Any) -> Expr:
    """A division of whole numbers: the kernel tells when it finds a zero below, see `Check`."""
    if point.dtype.is_floating_point or (isinstance(b, int) and b != 0):
        return point.op(op, a, b)
    low, below = point.low, point(b)
    zeros = low.make.cast(point.test("eq", below, 0), torch.int64)
    fine = low.make.cast(low.inside(zeros, 1, DIVISION), point.dtype)
    return point.op(op, a, point.add(below, fine))  # (`fine` is 0: added, so that the check is not left out)


def _to_integers(low: Lowering, node: fx.Node, op: str) -> Expr:
    if node.kwargs.get("decimals"):
        raise Unsupported("round to decimals")
    point, (value, *_) = Point(low, node), low.args(node)
    return point.op(op, value) if point.dtype.is_floating_point else point(value)


def _power(point: Point, base: Any, exponent: Any) -> Expr:
    if not point.dtype.is_floating_point:
        if isinstance(exponent, int) and 0 <= exponent <= 8:
            return _repeated(point, base, exponent)
        raise Unsupported("pow of integers")
    if isinstance(exponent, (int, float)):
        if exponent in (1, 2, 3, 4):
            return _repeated(point, base, int(exponent))
        if exponent == 0.5:
            return point.op("sqrt", base)
        if exponent == -0.5:
            return point.op("rsqrt", base)
        if exponent in (-1, -2):
            return point.op("reciprocal", _repeated(point, base, -int(exponent)))
    return point.op("pow", base, exponent)


def _repeated(point: Point, base: Any, count: int) -> Expr:
    if count == 0:
        return point(1)
    value = base = point(base)
    for _ in range(count - 1):
        value = point.mul(value, base)
    return value


def _comparison(low: Lowering, node: fx.Node, op: str) -> Expr:
    point = Point(low, node)
    a, b = low.args(node)[:2]
    common = _common(node)
    if common == torch.bool:
        a, b, common = point(a, torch.bool), point(b, torch.bool), torch.int32
    return point.test(op, a, b, dtype=common)


@lowers("rsub")
def _rsub(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    a, b = low.args(node)[:2]
    alpha = node_arg(low, node, 2, node.kwargs.get("alpha", 1))
    return point.sub(b, point.mul(a, alpha) if alpha != 1 else a)


@lowers("div", "true_divide")
def _div(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    a, b = low.args(node)[:2]
    mode = node.kwargs.get("rounding_mode")
    if mode is None:
        if isinstance(b, (int, float)) and b != 0 and math.frexp(b)[0] in (0.5, -0.5):
            return point.mul(a, 1.0 / b)  # exact
        return point.div(a, b)
    return _divided(point, "floor_divide" if mode == "floor" else "trunc_divide", a, b)


@lowers("floor_divide")
def _floor_divide(low: Lowering, node: fx.Node) -> Expr:
    return _divided(Point(low, node), "floor_divide", *low.args(node)[:2])


@lowers("special_expm1", "special_erf", "special_log1p")
def _special(low: Lowering, node: fx.Node) -> Expr:
    return Point(low, node).op(
        node.target.overloadpacket.__name__.removeprefix("special_"), low.args(node)[0]
    )


@lowers("square")
def _square(low: Lowering, node: fx.Node) -> Expr:
    return _repeated(Point(low, node), low.args(node)[0], 2)


@lowers("relu")
def _relu(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    return point.op("maximum", low.args(node)[0], 0)


@lowers("logical_not")
def _logical_not(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    return point.op("bitwise_not", as_bool(low, low.args(node)[0], point.shape))


@lowers("logical_and", "logical_or", "logical_xor")
def _logical(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    a, b = (as_bool(low, v, point.shape) for v in low.args(node)[:2])
    return point.op(node.target.overloadpacket.__name__.replace("logical", "bitwise"), a, b)


def as_bool(low: Lowering, value: Any, shape: Any) -> Expr:
    """value != 0."""
    return low.as_expr(value, shape, torch.bool)


@lowers("isnan", "isinf")
def _is_special(low: Lowering, node: fx.Node) -> Expr:
    point, value = Point(low, node), low.args(node)[0]
    if not value.dtype.is_floating_point:
        return point(False)
    return point.test(node.target.overloadpacket.__name__, value, dtype=value.dtype)


@lowers("isfinite")
def _isfinite(low: Lowering, node: fx.Node) -> Expr:
    point, value = Point(low, node), low.args(node)[0]
    if not value.dtype.is_floating_point:
        return point(True)
    bad = point.op(
        "bitwise_or",
        point.test("isnan", value, dtype=value.dtype),
        point.test("isinf", value, dtype=value.dtype),
    )
    return point.op("bitwise_not", bad)


@lowers("where")
def _where(low: Lowering, node: fx.Node) -> Expr:
    mask, a, b = low.args(node)
    return Point(low, node).where(mask, a, b)


@lowers("masked_fill")
def _masked_fill(low: Lowering, node: fx.Node) -> Expr:
    value, mask, fill = low.args(node)
    return Point(low, node).where(mask, fill, value)


@lowers("clamp", "clamp_min", "clamp_max", "clip", "hardtanh")
def _clamp(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    packet = node.target.overloadpacket.__name__
    value = low.args(node)[0]
    low_end = option(low, node, 1, "min") if packet != "clamp_max" else None
    high_end = option(low, node, 2, "max") if packet != "clamp_min" else None
    if packet == "clamp_max":
        high_end = option(low, node, 1, "max")
    if packet == "hardtanh":
        low_end, high_end = option(low, node, 1, "min_val", -1), option(low, node, 2, "max_val", 1)
    if low_end is not None:
        value = point.op("maximum", value, low_end)
    if high_end is not None:
        value = point.op("minimum", value, high_end)
    return point(value)


@lowers("_to_copy", "to")
def _to_copy(low: Lowering, node: fx.Node) -> Expr:
    return low.make.cast(low.args(node)[0], node.meta["val"].dtype)


@lowers("convert_element_type")
def _convert(low: Lowering, node: fx.Node) -> Expr:
    return low.make.cast(low.args(node)[0], node.args[1])


@lowers("clone", "contiguous", "alias", "detach", "lift_fresh_copy", "lift_fresh", "positive")
def _same(low: Lowering, node: fx.Node) -> Expr:
    return low.args(node)[0]


@lowers("copy")
def _copy(low: Lowering, node: fx.Node) -> Expr:
    return Point(low, node)(low.args(node)[1])


@lowers("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full",
        "scalar_tensor", "empty_like", "new_empty", "empty", "fill", "zero", "new_empty_strided")  # fmt: skip
def _constant(low: Lowering, node: fx.Node) -> Expr:
    packet = node.target.overloadpacket.__name__
    value: Any = 0
    if "ones" in packet:
        value = 1
    elif packet == "new_full":
        value = low.args(node)[2]
    elif "full" in packet or packet == "fill":
        value = low.args(node)[1]
    elif packet == "scalar_tensor":
        value = low.args(node)[0]
    return Point(low, node)(value)


@lowers("arange")
def _arange(low: Lowering, node: fx.Node) -> Expr:
    overload = node.target._overloadname
    args = low.args(node)
    start, step = (args[0] if overload != "default" else 0), 1
    if overload == "start_step" and len(args) > 2:
        step = args[2]
    if isinstance(start, float) or isinstance(step, float):
        raise Unsupported("arange with fractions")
    return low.make.cast(low.make.iota(low.shape(node), (step,), start), node.meta["val"].dtype)


# Activations


@lowers("softplus")
def _softplus(low: Lowering, node: fx.Node) -> Expr:
    point, x = Point(low, node), node_arg(low, node, 0)
    beta, threshold = option(low, node, 1, "beta", 1), option(low, node, 2, "threshold", 20)
    scaled = point.mul(x, beta) if beta != 1 else point(x)
    soft = point.op("log1p", point.op("exp", scaled))
    soft = point.div(soft, beta) if beta != 1 else soft
    return point.where(point.test("gt", scaled, threshold), x, soft)


@lowers("softplus_backward")
def _softplus_backward(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    grad, x, beta, threshold = low.args(node)[:4]
    z = point.op("exp", point.mul(x, beta))
    soft = point.div(point.mul(grad, z), point.add(z, 1))
    return point.where(point.test("gt", point.mul(x, beta), threshold), grad, soft)


@lowers("gelu")
def _gelu(low: Lowering, node: fx.Node) -> Expr:
    point, x = Point(low, node), node_arg(low, node, 0)
    if node.kwargs.get("approximate", "none") == "tanh":
        inner = _gelu_inner(point, x)
        return point.mul(point.mul(0.5, x), point.add(1, point.op("tanh", inner)))
    return point.mul(point.mul(x, 0.5), point.add(1, point.op("erf", point.mul(x, math.sqrt(0.5)))))


def _gelu_inner(point: Point, x: Any) -> Expr:
    cube = _repeated(point, x, 3)
    return point.mul(math.sqrt(2 / math.pi), point.add(x, point.mul(0.044715, cube)))


@lowers("gelu_backward")
def _gelu_backward(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    grad, x = low.args(node)[:2]
    if node.kwargs.get("approximate", "none") == "tanh":
        tanh = point.op("tanh", _gelu_inner(point, x))
        left = point.mul(0.5, point.add(1, tanh))
        slope = point.sub(1, point.mul(tanh, tanh))
        inner = point.mul(math.sqrt(2 / math.pi), point.add(1, point.mul(3 * 0.044715, point.mul(x, x))))
        right = point.mul(point.mul(point.mul(0.5, x), slope), inner)
        return point.mul(grad, point.add(left, right))
    cdf = point.mul(0.5, point.add(1, point.op("erf", point.mul(x, math.sqrt(0.5)))))
    pdf = point.mul(1 / math.sqrt(2 * math.pi), point.op("exp", point.mul(-0.5, point.mul(x, x))))
    return point.mul(grad, point.add(cdf, point.mul(x, pdf)))


@lowers("silu")
def _silu(low: Lowering, node: fx.Node) -> Expr:
    point, x = Point(low, node), node_arg(low, node, 0)
    return point.mul(x, point.op("sigmoid", x))


@lowers("silu_backward")
def _silu_backward(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    grad, x = low.args(node)[:2]
    s = point.op("sigmoid", x)
    return point.mul(grad, point.mul(s, point.add(1, point.mul(x, point.sub(1, s)))))


@lowers("tanh_backward")
def _tanh_backward(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    grad, y = low.args(node)
    return point.mul(grad, point.sub(1, point.mul(y, y)))


@lowers("sigmoid_backward")
def _sigmoid_backward(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    grad, y = low.args(node)
    return point.mul(grad, point.mul(point.sub(1, y), y))


@lowers("threshold_backward")
def _threshold_backward(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    grad, x, threshold = low.args(node)
    return point.where(point.test("le", x, threshold), 0, grad)


@lowers("threshold")
def _threshold(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    x, threshold, value = low.args(node)
    return point.where(point.test("le", x, threshold), value, x)


@lowers("hardtanh_backward")
def _hardtanh_backward(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    grad, x, lowest, highest = low.args(node)
    tests = point.test("gt", x, lowest), point.test("lt", x, highest)
    return point.where(point.op("bitwise_and", *tests, dtype=torch.bool), grad, 0)  # (0 for NaN, as torch)


@lowers("leaky_relu")
def _leaky_relu(low: Lowering, node: fx.Node) -> Expr:
    point, x = Point(low, node), node_arg(low, node, 0)
    return point.where(point.test("gt", x, 0), x, point.mul(x, option(low, node, 1, "negative_slope", 0.01)))


@lowers("leaky_relu_backward")
def _leaky_relu_backward(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    grad, x, slope = low.args(node)[:3]
    return point.where(point.test("gt", x, 0), grad, point.mul(grad, slope))


@lowers("elu")
def _elu(low: Lowering, node: fx.Node) -> Expr:
    point, x = Point(low, node), node_arg(low, node, 0)
    alpha, scale = option(low, node, 1, "alpha", 1), option(low, node, 2, "scale", 1)
    inner = option(low, node, 3, "input_scale", 1)
    soft = point.mul(point.op("expm1", point.mul(x, inner)), alpha * scale)
    return point.where(point.test("le", x, 0), soft, point.mul(x, scale))


@lowers("elu_backward")
def _elu_backward(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    grad, alpha, scale, inner, is_result, x = low.args(node)
    negative, positive = inner * alpha * scale, scale
    if is_result:
        soft = point.mul(grad, point.mul(point.add(x, alpha * scale), inner))
    else:
        soft = point.mul(grad, point.mul(negative, point.op("exp", point.mul(x, inner))))
    return point.where(point.test("le", x, 0), soft, point.mul(grad, positive))


@lowers("hardsigmoid")
def _hardsigmoid(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    shifted = point.add(node_arg(low, node, 0), 3)
    return point.div(point.op("minimum", point.op("maximum", shifted, 0), 6), 6)


@lowers("hardsigmoid_backward")
def _hardsigmoid_backward(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    grad, x = low.args(node)
    inside = point.op("bitwise_and", point.test("gt", x, -3), point.test("lt", x, 3), dtype=torch.bool)
    return point.where(inside, point.div(grad, 6), 0)


@lowers("log_sigmoid_forward")
def _log_sigmoid_forward(low: Lowering, node: fx.Node) -> list[Expr]:
    val = node.meta["val"][0]
    point, x = Point(low, node, low.sizes(val.shape), val.dtype), node_arg(low, node, 0)
    small = point.op("exp", point.op("neg", point.op("abs", x)))
    # torch's backward reads the second result, and may run where this forward did not
    return [point.sub(point.op("minimum", x, 0), point.op("log1p", small)), small]


@lowers("log_sigmoid_backward")
def _log_sigmoid_backward(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    grad, x = low.args(node)[:2]
    return point.mul(grad, point.op("sigmoid", point.op("neg", x)))


@lowers("addcmul", "addcdiv")
def _addc(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    base, a, b = low.args(node)[:3]
    value = low.argument(node.kwargs.get("value", 1))
    scaled = point.mul(a, value) if value != 1 else a
    inner = point.mul(scaled, b) if node.target.overloadpacket.__name__ == "addcmul" else point.div(scaled, b)
    return point.add(base, inner)


@lowers("lerp")
def _lerp(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    start, end, weight = (point(v) for v in low.args(node))
    gap = point.sub(end, start)
    near = point.add(start, point.mul(weight, gap))
    far = point.sub(end, point.mul(gap, point.sub(1, weight)))
    return point.where(point.test("lt", point.op("abs", weight), 0.5), near, far)


@lowers("nan_to_num")
def _nan_to_num(low: Lowering, node: fx.Node) -> Expr:
    point, x = Point(low, node), node_arg(low, node, 0)
    limits = torch.finfo(point.dtype) if point.dtype.is_floating_point else torch.iinfo(point.dtype)
    nan = option(low, node, 1, "nan") or 0.0
    top, bottom = option(low, node, 2, "posinf"), option(low, node, 3, "neginf")
    if not point.dtype.is_floating_point:
        return point(x)
    value = point.where(point.test("isnan", x), nan, x)
    value = point.where(point.test("eq", value, math.inf), limits.max if top is None else top, value)
    return point.where(point.test("eq", value, -math.inf), limits.min if bottom is None else bottom, value)


@lowers("logaddexp")
def _logaddexp(low: Lowering, node: fx.Node) -> Expr:
    point = Point(low, node)
    a, b = (point(v) for v in low.args(node))
    tail = point.op("log1p", point.op("exp", point.op("neg", point.op("abs", point.sub(a, b)))))
    spread = point.add(point.op("maximum", a, b), tail)
    return point.where(point.test("eq", a, b), point.add(a, math.log(2.0)), spread)


@lowers("_fused_dropout", "native_dropout", "bernoulli", "rand", "randn", "rand_like", "randn_like",
        "normal", "uniform",
        "randint", "randint_like", "multinomial")  # fmt: skip
def _random(low: Lowering, node: fx.Node) -> Expr:
    raise Unsupported("random numbers are drawn outside the native loop")


_register_plain()
