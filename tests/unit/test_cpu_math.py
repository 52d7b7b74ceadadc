"""The vector math functions against float64, in units in the last place, over floats of every size."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch

from steploop.backends.cpu.build import build
from steploop.backends.cpu.headers import prelude

# name: (C++ function, float64 meaning, bound in ulp, lowest x, highest x)
FUNCTIONS = {
    "exp": ("exponential", torch.exp, 2.0, -103.9, 88.7),
    "tanh": ("hyperbolic_tangent", torch.tanh, 3.0, -30.0, 30.0),
    "sigmoid": ("sigmoid", torch.sigmoid, 3.0, -88.72, 100.0),
    "log": ("logarithm", torch.log, 2.0, 1e-45, math.inf),
    "log1p": ("logarithm_1p", torch.log1p, 3.0, -0.9999, math.inf),
    "erf": ("error_function", torch.erf, 3.0, -10.0, 10.0),
}
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 1e30, -1e30, 104.0, -104.0, 88.8, -88.8, -150.0]
SPECIAL += [1e-40, -1e-40]


@pytest.fixture(scope="module")
def library():
    text = prelude()
    for name, (function, *_) in FUNCTIONS.items():
        text += f"""
extern "C" __attribute__((visibility("default"))) void apply_{name}(const float* x, float* y, long n) {{
  span<16>(n, [&](long i, auto m) ALWAYS {{ store(y + i, {function}(load(x + i, m)), m); }});
}}"""
    return build(text)


def apply(library, name: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    function = getattr(library, f"apply_{name}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long]
    function(x.data_ptr(), y.data_ptr(), x.numel())
    return y


def floats(low: float, high: float, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Floats with uniformly random bits, and uniformly random ones, in a range."""
    bits = torch.from_numpy(rng.integers(0, 1 << 32, count, dtype=np.uint32).view(np.float32))
    even = torch.from_numpy(rng.uniform(max(low, -100.0), min(high, 100.0), count).astype(np.float32))
    denormal = bits.view(torch.int32).bitwise_and(-0x7F800001).view(torch.float32)  # no exponent
    x = torch.cat([bits, even, denormal[: count // 8]])
    return x[(x >= low) & (x <= high) & x.isfinite()]


def errors_in_ulp(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    magnitude = exact.abs().clamp_min(torch.finfo(torch.float32).tiny)  # below it the spacing stays
    ulp = 2.0 ** (magnitude.log2().floor() - 23)
    return (found.double() - exact).abs() / ulp


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_bound(library, name):
    check(library, name, 400_000, 1)


@pytest.mark.long
@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_bound_long(library, name):
    for seed in range(60):
        check(library, name, 4_000_000, seed)


def check(library, name: str, count: int, seed: int) -> None:
    _, meaning, bound, low, high = FUNCTIONS[name]
    x = floats(low, high, count, np.random.default_rng(seed))
    error = errors_in_ulp(apply(library, name, x), meaning(x.double()))
    worst = error.argmax()
    assert error[worst] <= bound, f"{name}({x[worst].item()!r}): {error[worst].item():.2f} ulp"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values(library, name):
    x = torch.tensor(SPECIAL * 3)
    wanted = FUNCTIONS[name][1](x)
    found = apply(library, name, x)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-44, equal_nan=True)
    zeros = x == 0
    if name in ("tanh", "erf", "log1p"):
        assert torch.equal(found[zeros].signbit(), wanted[zeros].signbit())
