"""Kernels for CPUs of other widths than this one's: they run where they can, and compile in any case."""

from __future__ import annotations

import platform
import subprocess

import pytest
import torch
from cpu_loops import assert_same, make_case
from torch.nn import functional as F

from steploop.backends import cpu
from steploop.backends.cpu import build, products
from steploop.backends.cpu.headers import whole

ARCHITECTURES = {
    "x86-64": [], "sandybridge": ["avx"], "haswell": ["avx2", "fma", "bmi2", "movbe", "f16c"],
    "skylake-avx512": ["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "adx", "clwb"],
}  # fmt: skip

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or build.compiler() is None, reason="kernels of x86-64"
)


def compiles(text: str, folder) -> None:
    """With the very flags: a build that fails goes on without the one for the CPU."""
    source, using = folder / "kernel.cpp", build.compiler()
    source.write_text(text)
    command = [using.path, *using.flags(""), "-c", "-o", str(folder / "kernel.o"), str(source)]
    made = subprocess.run(command, capture_output=True)
    assert made.returncode == 0, made.stderr.decode()[:2000]


def gated(batch: int, time: int, depth: int, hidden: int, dtype: torch.dtype):
    """Products, a reduction, a mask, and columns by number."""
    weights = [torch.randn(hidden, d, dtype=dtype) * 0.3 for d in (depth, depth, hidden)]

    def step(xs, constants, states):
        (x,), (h,) = xs, states
        gate = (F.linear(x, weights[0]) + F.linear(h, weights[2])).sigmoid()
        h = gate * h + F.layer_norm(F.linear(x, weights[1]), (hidden,)).tanh() * (h > 0.1)
        return [h.cumsum(1), h.amax(1), h.argmin(1)], [h]

    return make_case(step, [torch.randn(time, batch, depth, dtype=dtype)], [torch.randn(batch, hidden, dtype=dtype)])


@pytest.fixture(params=ARCHITECTURES)
def runs_here(request, monkeypatch) -> bool:
    """Kernels are built for this architecture; whether this CPU has all of its instructions."""
    monkeypatch.setenv("STEPLOOP_ARCH", f"-march={request.param}")
    return set(ARCHITECTURES[request.param]) <= set(build.cpu().split())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels(runs_here, dtype, tmp_path):
    case = gated(13, 9, 70, 150, dtype)
    if runs_here:
        assert_same(case, torch.randint(0, 10, (13,)), rtol=1e-4, atol=1e-4)
    else:
        compiles(whole(cpu.compile(case.loop).text), tmp_path)
        compiles(products.text(dtype), tmp_path)


@pytest.mark.parametrize("size", [1, 3, 4, 7, 9, 17, 31])
def test_partial_vectors(runs_here, size):
    """Axes that fill no vector, or some and a part of one."""
    if not runs_here:
        pytest.skip("this CPU has not all of its instructions")
    assert_same(gated(3, 4, 2 * size + 1, size, torch.float32), rtol=1e-4, atol=1e-4)
