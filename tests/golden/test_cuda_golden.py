"""Kernels of the backend "cuda" compiled for real GPUs, for which NVRTC needs no GPU: what they take of one.

After a change on purpose: STEPLOOP_UPDATE_GOLDEN=1 pytest tests/golden/test_cuda_golden.py, and read the diff.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from emulated_gpu import Emulated, registered
from test_cpu_golden import CASES, plan_of

import steploop as sl
from steploop.backends.cuda import machine, nvrtc
from steploop.backends.cuda.headers import whole
from steploop.backends.native.emit import Printer, canonical

PAGE = Path(__file__).parent / "cuda" / "usage.md"
VERSION = "13.0"  # of NVRTC, whose numbers the page has
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
REGISTERS, SHARED = 255, 227 << 10
CELLS = {
    "LSTM": (sl.nn.LSTMCell, torch.float32), "GRU": (sl.nn.GRUCell, torch.float32),
    "layer-norm LSTM": (sl.nn.LayerNormLSTMCell, torch.float32), "LSTM in bfloat16": (sl.nn.LSTMCell, torch.bfloat16),
    "layer-norm LSTM in float16": (sl.nn.LayerNormLSTMCell, torch.float16),
}  # fmt: skip

pytestmark = pytest.mark.skipif(bool(nvrtc.problem()), reason='no NVRTC; pip install "steploop[cuda-check]" brings it')


def of_cell(make, dtype, monkeypatch) -> dict[str, str]:
    """The loops of a cell's forward and backward pass, as text."""
    texts: list[str] = []
    plain = Emulated.begin

    def begin(self, text, device):
        texts.append(text)
        return plain(self, text, device)

    monkeypatch.setattr(Emulated, "begin", begin)
    with registered() as backend:
        x = torch.randn(2, 2, 3, dtype=dtype, requires_grad=True)
        y = sl.Loop(make(3, 7).to(dtype), backend=backend.name)(x)[0]
        y.sum().backward()
    monkeypatch.setattr(Emulated, "begin", plain)
    return dict(zip(("forward", "backward"), texts, strict=True))


def texts(monkeypatch) -> dict[str, str]:
    found = {}
    for name in CASES:
        printer = Printer(plan_of(name)[0], False)
        found[name] = canonical(printer.text(), printer.names)
    for name, (make, dtype) in CELLS.items():
        found |= {f"{name}, {way}": text for way, text in of_cell(make, dtype, monkeypatch).items()}
    return found


def test_kernels_fit(monkeypatch):
    """No spills, at most 255 registers and 227 KB, on every architecture that this NVRTC knows."""
    lines = [f"NVRTC {VERSION}: registers, bytes of stack", "", f"| loop | {' | '.join(ARCHITECTURES)} |",
             f"| --- |{' ---: |' * len(ARCHITECTURES)}"]  # fmt: skip
    known = [a for a in ARCHITECTURES if a in nvrtc.architectures()]
    for name, text in texts(monkeypatch).items():
        cells = []
        for architecture in known:
            cubin, log = nvrtc.compile_cubin(whole(text), architecture)
            used = nvrtc.usage(log)
            assert cubin and used.spills == 0 and used.registers <= REGISTERS and used.shared <= SHARED, (name, used)
            cells.append(f"{used.registers}, {used.stack}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if nvrtc.version() != VERSION:
        pytest.skip(f"they fit; the page's numbers are those of NVRTC {VERSION}, this is {nvrtc.version()}")
    page = "\n".join(lines) + "\n"
    if os.environ.get("STEPLOOP_UPDATE_GOLDEN"):
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page)
    assert page == PAGE.read_text()


def test_what_does_not_compile_is_an_error_with_the_compilers_words():
    with pytest.raises(sl.BuildError, match="NVRTC gave .*\n.*undefined"):
        nvrtc.compile_cubin("__global__ void f() { nobody(); }", "sm_90")


def test_a_cubin_is_kept_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPLOOP_CACHE", str(tmp_path))
    printer = Printer(plan_of("lstm")[0], False)
    text = canonical(printer.text(), printer.names)
    first = machine.kept_cubin(text, "sm_90")
    assert sorted(p.suffix for p in tmp_path.iterdir() if p.is_file() and not p.name.startswith(".")) == [
        ".cu", ".cubin", ".sha256",
    ]  # fmt: skip
    monkeypatch.setattr(nvrtc, "compile_cubin", None)
    assert machine.kept_cubin(text, "sm_90") == first
