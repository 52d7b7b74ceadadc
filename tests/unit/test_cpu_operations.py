"""Every operation of the native loop against torch, on ordinary and on special values."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cpu_loops import assert_same, make_case

T, B, N = 5, 7, 19
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    math.inf,
    -math.inf,
    math.nan,
    1e-3,
    -1e-3,
    30.0,
    -30.0,
    100.0,
    -100.0,
    0.5,
    2.5,
]

PLACES = torch.tensor([5, 0, 18, 7])

UNARY = {
    "neg": torch.neg,
    "abs": torch.abs,
    "reciprocal": torch.reciprocal,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "round": torch.round,
    "sign": torch.sign,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "log2": torch.log2,
    "log10": torch.log10,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "atan": torch.atan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "asinh": torch.asinh,
    "relu": torch.relu,
    "softplus": F.softplus,
    "softplus_beta": lambda x: F.softplus(x, 2.0, 5.0),
    "gelu": lambda x: F.gelu(x.clamp(-200, 200)),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "leaky_relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "logsigmoid": F.logsigmoid,
    "log_sigmoid_forward": lambda x: sum(torch.ops.aten.log_sigmoid_forward(x)),  # of two results
    "tanhshrink": F.tanhshrink,
    "softsign": F.softsign,
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "threshold": lambda x: F.threshold(x, 0.1, 20.0),
    "square": torch.square,
    "pow3": lambda x: x**3,
    "pow_half": lambda x: x**0.5,
    "pow_2.5": lambda x: x**2.5,
    "pow_-2": lambda x: x**-2,
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "clamp_max": lambda x: x.clamp(max=0.1),
    "nan_to_num": torch.nan_to_num,
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "isfinite": torch.isfinite,
    "rsub": lambda x: 1 - x,
    "add": lambda x: x + 2,
    "div": lambda x: x / 3,
    "div4": lambda x: x / 4,
    "rdiv": lambda x: 2 / x,
    "long": lambda x: x.nan_to_num(0, 3, -3).long(),
    "bool": lambda x: x.bool(),
    "double": lambda x: x.double() * 2,
    "frac": torch.frac,
    "lt": lambda x: x < 0.25,
    "ge": lambda x: x >= 0,
    "eq": lambda x: x == 0,
    "ne": lambda x: x != 0.5,
    "logical_not": torch.logical_not,
    "zeros_like": torch.zeros_like,
    "full_like": lambda x: torch.full_like(x, 2.5) + x,
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 0.3, -7.0),
    "remainder": lambda x: x.remainder(0.7),
    "fmod": lambda x: x.fmod(0.7),
    "floor_divide": lambda x: x // 0.7,
    "logit": lambda x: torch.logit(x, 1e-3),
    "deg2rad": torch.deg2rad,
    "sinc": torch.sinc,
    "xlogy": lambda x: torch.xlogy(x, x.abs()),
    "tril": lambda x: x,
    "lerp": lambda x: torch.lerp(x, x * 2, 0.3),
}

BINARY = {
    "add_alpha": lambda a, b: torch.add(a, b, alpha=3),
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "fmax": torch.fmax,
    "fmin": torch.fmin,
    "atan2": torch.atan2,
    "hypot": torch.hypot,
    "pow": lambda a, b: a.abs().pow(b),
    "copysign": torch.copysign,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "eq": torch.eq,
    "ne": torch.ne,
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.3),
    "addcdiv": lambda a, b: torch.addcdiv(a, a, b),
    "lerp": lambda a, b: torch.lerp(a, b, b.sigmoid()),
    "logaddexp": torch.logaddexp,
    "where": lambda a, b: torch.where(a > b, a, b * 2),
    "logical": lambda a, b: (a > 0) & (b > 0) | ((a < -1) ^ (b < -1)),
    "floor_div": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "trunc_div": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "remainder": torch.remainder,
    "fmod": torch.fmod,
    "mixed": lambda a, b: a + b.double() + (a > b),
    "heaviside": torch.heaviside,
    "dist": lambda a, b: (a - b).square().sum(-1).sqrt(),
}

FEATURES = {
    "sum": lambda x: x.sum(-1),
    "sum_keep": lambda x: x.sum(-1, keepdim=True) * x,
    "mean": lambda x: x.mean(-1),
    "amax": lambda x: x.amax(-1),
    "amin": lambda x: x.amin(-1),
    "max": lambda x: x.max(-1).values,
    "max_index": lambda x: x.max(-1).indices,
    "argmin": lambda x: x.argmin(-1),
    "argmax": lambda x: x.argmax(-1, keepdim=True),
    "prod": lambda x: x.prod(-1),
    "any": lambda x: (x > 1).any(-1),
    "all": lambda x: (x > -1).all(-1),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "var": lambda x: x.var(-1),
    "std": lambda x: x.std(-1, unbiased=False),
    "var_mean": lambda x: torch.var_mean(x, -1)[0],
    "layer_norm": lambda x: F.layer_norm(x, (x.shape[-1],)),
    "rms_norm": lambda x: F.rms_norm(x, (x.shape[-1],)),
    "norm": lambda x: x.norm(dim=-1),
    "cumsum": lambda x: x.cumsum(-1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "chunk": lambda x: x[:, :18].chunk(3, -1)[1] * 2,
    "slice": lambda x: x[:, 3:11] + 1,
    "slice_step": lambda x: x[:, 1:12:3] * 2,
    "cat": lambda x: torch.cat([x[:, 5:], x * 2, x[:, :2]], -1),
    "stack": lambda x: torch.stack([x, x + 1, x * 2], 1),
    "stack_last": lambda x: torch.stack([x, x + 1], -1),
    "view": lambda x: x[:, :18].reshape(-1, 3, 6).sum(1),
    "transpose": lambda x: x[:, :18].reshape(-1, 3, 6).transpose(1, 2) + 1,
    "sum_mid": lambda x: x[:, :18].reshape(-1, 3, 6).sum(1),
    "sum_both": lambda x: x[:, :18].reshape(-1, 3, 6).sum((1, 2)),
    "softmax_mid": lambda x: x[:, :18].reshape(-1, 3, 6).softmax(1),
    "expand": lambda x: x[:, :, None].expand(-1, -1, 3).exp(),
    "repeat": lambda x: x.repeat(1, 2),
    "flip": lambda x: x.flip(-1) * 2,
    "roll": lambda x: x.roll(3, -1),
    "pad": lambda x: F.pad(x, (2, 3), value=1.5),
    "pad that leaves nothing": lambda x: F.pad(x[:, :2], (-1, -1)).sum(1),
    "unbind": lambda x: x[:, :18].view(-1, 3, 6).unbind(1)[2] + 1,
    "select": lambda x: x[:, 4] * 2,
    "outer": lambda x: x[:, :5, None] * x[:, None, 5:12],
    "bmm": lambda x: torch.bmm(x[:, :6].reshape(-1, 2, 3), x[:, 6:18].reshape(-1, 3, 4)),
    "matmul": lambda x: x[:, :18].reshape(-1, 3, 6) @ x[:, :18].reshape(-1, 3, 6).transpose(1, 2),
    "einsum": lambda x: torch.einsum(
        "bij,bkj->bik", x[:, :18].reshape(-1, 3, 6), x[:, :18].reshape(-1, 3, 6)
    ),
    "tril": lambda x: x[:, :16].reshape(-1, 4, 4).tril(),
    "triu": lambda x: x[:, :16].reshape(-1, 4, 4).triu(1),
    "cumprod": lambda x: x.cumprod(-1),
    "diff": lambda x: x.diff(dim=-1),
    "scatter": lambda x: torch.zeros_like(x).scatter(1, (x[:, :4].abs() * 3).long().clamp(max=18), x[:, 2:6]),
    "gather": lambda x: x.gather(1, (x[:, :5].abs() * 3).long().clamp(max=18)),
    "unfold": lambda x: x.unfold(1, 4, 2).sum(-1),
    "unfold_backward": lambda x: torch.ops.aten.unfold_backward(x[:, :18].view(-1, 6, 3), [x.shape[0], 8], 1, 3, 1),
    "unfold_backward in the middle": lambda x: torch.ops.aten.unfold_backward(
        x[:, :16].view(-1, 4, 2, 2), [x.shape[0], 5, 2], 1, 2, 1
    ),
    "unfold_backward of one frame": lambda x: torch.ops.aten.unfold_backward(
        x[:, :8].view(-1, 2, 1, 4), [x.shape[0], 2, 4], 2, 4, 1
    ),
    "glu": lambda x: F.glu(x[:, :18], -1),
    "triangle": lambda x: x[:, :16].view(-1, 4, 4).diagonal(dim1=1, dim2=2) * 2,
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(
        1, (x[:, :9].abs() * 3).long().clamp(max=18), x[:, 2:11]
    ),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[:, :4] * 9, 1, 3, 7),
    "slice_scatter with a step": lambda x: torch.slice_scatter(x, x[:, :5] * 9, 1, 2, 16, 3),
    "slice_scatter to the end": lambda x: torch.slice_scatter(x, x[:, :9] * 9, 1, 1, step=2),
    "slice_backward with a step": lambda x: torch.ops.aten.slice_backward(x[:, :5], [x.shape[0], N], 1, 2, 16, 3),
    "slice_backward from the start": lambda x: torch.ops.aten.slice_backward(x[:, :4], [x.shape[0], N], 1, 0, N, 5),
    "index_put": lambda x: torch.ops.aten.index_put(x, [None, PLACES], x[:, 3:7] * 9),
    "index_put of one value": lambda x: torch.ops.aten.index_put(x, [None, PLACES], torch.tensor(2.0, dtype=x.dtype)),
    "index_put adds": lambda x: torch.ops.aten.index_put(x, [None, PLACES % 3], x[:, 3:7], True),
    "index_put in the middle": lambda x: torch.ops.aten.index_put(
        x[:, :18].view(-1, 3, 6), [None, torch.tensor([2, 0])], x[:, :6].unsqueeze(1)
    ),
    "mean_all_but": lambda x: x[:, :18].view(-1, 3, 6).mean((1, 2)),
    "where_row": lambda x: torch.where(x[:, :1] > 0, x, -x),
    "ones": lambda x: x * torch.ones(x.shape[-1]),
    "arange": lambda x: x * torch.arange(N),
    "select_scatter": lambda x: torch.select_scatter(x, x[:, 0] * 9, 1, 5),
    "min": lambda x: x.min(-1)[0],
    "minmax": lambda x: x.aminmax(dim=-1)[1],
    "cosine": lambda x: F.cosine_similarity(x, x.flip(-1), dim=-1),
    "masked_softmax": lambda x: x.masked_fill(x < 0, -math.inf).softmax(-1),
}


def values(special: bool, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(T, B, N, dtype=dtype) * 1.5
    if special:
        picks = torch.tensor(SPECIAL, dtype=dtype)[torch.randint(0, len(SPECIAL), x.shape)]
        x = torch.where(torch.rand(x.shape) < 0.5, picks, x)
    return x


def together(functions, special, dtype, two=False):
    """All functions in one loop, each on one step input, beside a small state."""

    def step(xs, constants, states):
        results = []
        for function in functions:
            results.append(function(*xs) if two else function(xs[0]))
        return [r.clone() for r in results], [states[0] * 0.5 + xs[0]]

    xs = [values(special, dtype) for _ in range(2 if two else 1)]
    return make_case(step, xs, [torch.zeros(B, N, dtype=dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("special", [False, True])
def test_unary(special, dtype):
    assert_same(together(UNARY.values(), special, dtype), rtol=3e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("special", [False, True])
def test_binary(special, dtype):
    assert_same(together(BINARY.values(), special, dtype, two=True), rtol=3e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features(dtype):
    lengths = torch.tensor([5, 0, 3, 5, 1, 2, 4])
    assert_same(together(FEATURES.values(), False, dtype), lengths, rtol=2e-5, atol=1e-5)
