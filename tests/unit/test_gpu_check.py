"""What scripts/gpu-check measures with, as far as a CPU can run it: the programs, the cost model, the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import __main__ as program  # noqa: E402
from benchmarks.gpu import cost_model, report, suite, timing  # noqa: E402
from benchmarks.gpu.steps import CELLS, Problem, data_of, module_of  # noqa: E402
from benchmarks.gpu.ways import Blank, CuDNN, Graphed, Plain, Steploop  # noqa: E402


@pytest.mark.parametrize("cell", CELLS)
def test_every_program_is_the_same_by_every_way(cell):
    problem = Problem(cell, 5, 2, 16)
    module, (xs, constants) = module_of(problem, "cpu"), data_of(problem, "cpu")
    results = []
    for way in (Plain(), Steploop("steploop", "reference"), CuDNN()):
        try:
            forward = way.make(problem, module, xs, constants, "forward")()
            gradients = [g for g in way.make(problem, module, xs, constants, "training")() if g is not None]
        except Blank as why:
            assert cell not in ("lstm", "gru") and "no such cell" in str(why)
            continue
        results.append(forward)
        assert len(gradients) == len(list(way.parameters(module)))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(Blank, match="whole sequences only"):
        Graphed().make(problem, module, xs, constants, "training")
    if cell != "decoder":
        stream = Steploop("steploop", "eager").make(problem, module, xs, constants, "stream")
        torch.testing.assert_close(stream(), results[0], rtol=1e-4, atol=1e-5)


def test_a_row_says_what_has_no_number_and_what_is_wrong(monkeypatch):
    class Broken(Plain):
        name = "broken"

        def forward(self, *_):
            raise ValueError("no way")

    class Wrong(Plain):
        name = "wrong"

        def forward(self, *given):
            run = super().forward(*given)
            return lambda: run() + 1

    monkeypatch.setattr(program, "WAYS", (Plain(), Broken(), Wrong(), Steploop("steploop", "eager")))
    monkeypatch.setattr(timing, "MOST", 3)
    row = program.measured(Problem("gru", 4, 2, 8), "forward", 4.0, 1, "cpu", True)
    assert set(row["seconds"]) == {"plain loop", "wrong", "steploop"}
    assert row["blank"] == {"broken": "ValueError: no way"}
    assert len(row["wrong"]) == 1 and row["wrong"][0].startswith("wrong differs")
    text = "\n".join(report._times([row]))
    assert "| gru | float32 | 8 | 2 | 4 |" in text and "broken: ValueError: no way (gru)" in text and "x)" in text


def results_of(product):
    micro = {
        "op": 7e-6, "node": 1.3e-6, "replay": 3e-6, "grid_barrier": 1e-6, "grid_exchange": 1.2e-6,
        "block_barrier": 6e-8, "l2_bandwidth": 7e12, "memory_bandwidth": 4e12,
        "product": dict.fromkeys(("fp32", "tf32", "bf16"), product),
    }  # fmt: skip
    tests = suite.summary("FAILED tests/a.py::test_b[c] - d\n== 1 failed, 7 passed, 2 skipped in 3.50s ==")
    machine = {"gpu": "A GPU (40 GB)", "sms": 100}
    suite_ = {**tests, "ended": ""}
    return {"quick": True, "machine": machine, "micro": micro, "suite": suite_, "times": [], "seconds": 9}


def test_the_page(tmp_path):
    page = report.write(results_of({"64 512": 1e-5}), tmp_path)
    assert page.name == "a-gpu-40-gb.md"
    text = page.read_text()
    assert "7 passed, 1 failed, 2 skipped." in text and "`tests/a.py::test_b[c]`" in text
    assert "| 512 | 64 | 10.0 (13.4) |" in text and "1.30 us" in text
    assert json.loads(page.with_suffix(".json").read_text())["machine"]["sms"] == 100


def test_the_cost_model_follows_what_was_measured():
    on = cost_model.measured(results_of({"64 512": 1e-5, "256 2048": 2e-4}))
    assert on.rate["fp32"] == pytest.approx(8 * 256 * 2048**2 / 2e-4) and on.sms == 100
    lstm = cost_model.step(cost_model.CELLS["lstm"], 64, 512, "fp32", on)
    operations = cost_model.CELLS["lstm"].operations
    assert lstm["graph"] == pytest.approx((operations - 1) * 1.3e-6 + 1e-5)
    assert lstm["eager"] == pytest.approx(operations * 7e-6)
    assert lstm["grid"] < lstm["graph"] < lstm["eager"]
    large = cost_model.step(cost_model.CELLS["lstm"], 64, 2048, "fp32", on)
    assert large["grid"] is None  # the weights fill 67 MB
    assert len(cost_model.table(cost_model.GUESSED, "bf16")) == 2 + 12 * len(cost_model.CELLS)


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main(["--quick"]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_problems_fit_into_both_sizes():
    quick, full = program.problems(True), program.problems(False)
    assert len(quick) < 20 < len(full)
    assert {p.cell for p, _ in quick} == {p.cell for p, _ in full} == set(CELLS)
