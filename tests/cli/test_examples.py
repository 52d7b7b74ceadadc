"""The programs of examples/ that the documentation tells of learn what they should, in fewer updates than they take."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import steploop as sl
from steploop import dispatch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch):
    """Their loops are small: compiling them would take longer than running them."""
    monkeypatch.setenv("STEPLOOP_CXX", "no-compiler-for-examples")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


pytestmark = pytest.mark.filterwarnings("ignore:steploop runs loops without native code")


def fell(losses, to):
    assert sum(losses[-3:]) / 3 < to * losses[0], (losses[0], losses[-3:])


def test_recall():
    right = importlib.import_module("recall").train(60, rows=16)
    assert sum(right[-10:]) > sum(right[:10]) + 1, right


def test_ctc():
    losses, rate = importlib.import_module("ctc").train(40, rows=12)
    fell(losses, 0.6)
    assert 0 <= rate < 1


def test_kalman():
    step, losses = importlib.import_module("kalman").train(25, steps=40)
    assert losses[-1] < losses[0] - 0.05 and step.log_q.exp() < 0.5


def test_spiking():
    losses, right = importlib.import_module("spiking").train(50)
    fell(losses, 0.5)
    assert right > 0.8


def test_state_space():
    fell(importlib.import_module("state_space").train(40, steps=40, rows=8), 0.4)


@pytest.fixture
def _by_the_plain_loop(monkeypatch):
    run = dispatch.run
    monkeypatch.setattr(dispatch, "run", lambda program, call, *_: run(program, call, "reference"))


@pytest.mark.usefixtures("_by_the_plain_loop")
def test_beam():
    model, losses = importlib.import_module("beam").train(40, rows=16)
    fell(losses, 0.7)


@pytest.mark.usefixtures("_by_the_plain_loop")
def test_minimum_risk():
    _, costs = importlib.import_module("minimum_risk").train(60, words_at_once=16)
    fell(costs, 0.75)


@pytest.mark.usefixtures("_by_the_plain_loop")
@pytest.mark.parametrize("name", ["beam", "ctc", "kalman", "recall", "spiking", "state_space"])
def test_what_explain_shows_of_it_runs(name):
    step, inputs, *constants = importlib.import_module(name).example()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    first = [x[:2] for x in inputs]
    sl.Loop(step)(*first, **(constants[0] if constants else {}))
