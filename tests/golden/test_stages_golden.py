"""Every stage of three steps, as text: a reviewer sees what a change to the compiler does.

After a change on purpose: STEPLOOP_UPDATE_GOLDEN=1 pytest tests/golden/test_stages_golden.py, and read the diff.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from stage_steps import LSTM, Decoder, TwoLoops

import steploop as sl
from steploop.compiler.passes import manager

HERE = Path(__file__).parent / "stages"


def plans():
    x, memory = torch.zeros(3, 2, 3), torch.zeros(2, 6, 5)
    return {
        "lstm": lambda: sl.Loop(LSTM()).plan(x),
        "decoder": lambda: sl.Loop(Decoder()).plan(torch.zeros(3, 2, 4), memory=memory),
        "two_loops": lambda: sl.Loop(TwoLoops()).plan(torch.zeros(3, 2, 4)),
    }


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="another torch may trace other operations")
@pytest.mark.parametrize("name", plans())
def test_stages(name):
    found, path = plans()[name]().stages(), HERE / f"{name}.txt"
    if os.environ.get("STEPLOOP_UPDATE_GOLDEN"):
        path.write_text(found)
    assert found == path.read_text()


def test_printed_as_they_come(capfd, monkeypatch):
    monkeypatch.setenv("STEPLOOP_SHOW", "passes")
    sl.Loop(LSTM())(torch.zeros(3, 2, 3))
    shown = capfd.readouterr().err
    assert "== capture\n" in shown and "== split_products\n" in shown and "== loops of forward\n" in shown


def test_a_copied_plan_has_no_stages():
    import pickle

    plan = pickle.loads(pickle.dumps(sl.Loop(LSTM()).plan(torch.zeros(3, 2, 3))))
    assert "loop 1" in str(plan)
    with pytest.raises(sl.InputError, match="only the plan that Loop.plan gave"):
        plan.stages()


# -- every pass is watched -----------------------------------------------------------------------------------


def renamed(step):
    """A result that is not in the graph."""
    step.outputs[0] = torch.fx.Graph().placeholder("elsewhere")


def mistyped(step):
    node = next(n for n in step.graph.nodes if n.op == "call_function" and isinstance(n.meta["val"], torch.Tensor))
    node.meta["val"] = node.meta["val"].double()


def out_of_order(step):
    first, *_, last = [n for n in step.graph.nodes if n.op == "call_function"]
    first.args = (last, *first.args[1:])


PASSES = list(dict.fromkeys(p.name for p in (*manager.SIMPLIFY, *manager.HOIST)))


@pytest.mark.parametrize("harm", [renamed, mistyped, out_of_order])
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_that_breaks_the_graph_is_named(name, harm, monkeypatch):
    def broken(group):
        def after(run):
            def harmed(step, *in_loop):
                run(step, *in_loop)
                harm(step)

            harmed.__name__ = run.__name__
            return harmed

        return tuple(manager.Pass(after(p.run)) if p.name == name else p for p in group)

    monkeypatch.setattr(manager, "SIMPLIFY", broken(manager.SIMPLIFY))
    monkeypatch.setattr(manager, "HOIST", broken(manager.HOIST))
    with pytest.raises(AssertionError, match=f"after {name}: ") as found, torch.no_grad():
        sl.Loop(TwoLoops(), backend="eager")(torch.zeros(3, 2, 4))
    assert "report it" in str(found.value)
