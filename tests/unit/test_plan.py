"""What a plan says: as a table, as data, as one line, and with the times of a profile."""

from __future__ import annotations

import json
import linecache

import pytest
import torch
from torch import nn

import steploop as sl

T, B = 6, 3
SOURCE = """\
import torch
from torch import nn
import steploop as sl

class Tagger(sl.Step):
    def __init__(self, **options):
        super().__init__()
        self.mix, self.head = nn.Linear(4 + 5, 5, **options), nn.Linear(5, 2, **options)
        self.cell = sl.nn.GRUCell(5, 5, **options)
        self.h = sl.State(5)

    def step(self, x):
        mixed = self.mix(torch.cat([x, self.h.prev], -1))
        self.h.next = torch.tanh(mixed)
        return self.head(self.cell(self.h.next))
"""


def from_source(text, name, file):
    """A class from source that has a file name of its own, as a module of the user's has."""
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    scope = {"__name__": "made"}
    exec(compile(text, file, "exec"), scope)
    return scope[name]


@pytest.fixture(scope="module")
def plan():
    step = from_source(SOURCE, "Tagger", "/somewhere/my_tagger.py")(dtype=torch.float64)
    return sl.Loop(step, backend="eager").plan(torch.randn(T, B, 4, dtype=torch.float64))


TABLE = """\
Tagger forward: 2 loops with 15 operations per step, 6 operations outside
before
  my_tagger.py:13  mm, add                           batched                       (T*B, 4) @ (4, 5)
  my_tagger.py:15  mm, add                           uses loop 1                   (T*B, 5) @ (5, 15)
loop 1  [eager]  states: h
  my_tagger.py:13  mm, add                           h -> line 13 -> h             (B, 5) @ (5, 5)
  my_tagger.py:14  tanh                              h -> line 14 -> h             (B, 5)
loop 2  [eager]  states: cell.h
  my_tagger.py:15  mm, add x5, sigmoid x2, mul x2, tanh, sub  cell.h -> line 15 -> cell.h  (B, 5) @ (5, 15)
after
  my_tagger.py:15  mm, add                           uses loop 2                   (T*B, 5) @ (5, 2)
"""


def test_the_table(plan):
    """One row per line of the user's, views hidden, the reason in one hop, the sizes of products."""
    found = [line.split() for line in str(plan).split("\nkept")[0].splitlines()]
    assert found == [line.split() for line in TABLE.splitlines()], str(plan)
    backward = str(plan).split("\n\n")[1]
    assert backward.startswith("Tagger backward: 2 loops") and "gradients of: cell.h" in backward


def test_the_whole_way_is_told_on_demand(plan):
    assert "<-" not in str(plan) and "slice" not in str(plan)
    text = plan.text(full=True)
    assert "gru.py:" in text and "slice" in text
    assert "h.next <- tanh line 14 <- add line 13 <- mm line 13 <- h.prev" in text


def test_one_line(plan):
    assert repr(plan) == "<Plan of Tagger forward: 2 loops with 15 operations per step, 6 operations outside>"


def test_ops_know_the_users_line_and_those_below_it(plan):
    inner = [op for op in plan.loops[1].ops if not op.view]
    assert all(op.line.startswith("gru.py:") and op.caller == "my_tagger.py:15" for op in inner)
    names = [source.name for source in plan.sources]
    (number,) = {place[0] for op in inner for place in op.places if place[1] == 15}
    assert names[number] == "Tagger.step" and not plan.sources[number].library
    assert plan.sources[number].lines[15 - plan.sources[number].first] == SOURCE.splitlines()[14]
    (product,) = [op for op in inner if op.name == "mm"]
    assert product.product == "(B, 5) @ (5, 15)" and product.hop == "cell.h -> line 15 -> cell.h"


def test_as_data(plan):
    data = json.loads(plan.to_json())
    assert data == plan.to_dict() and data["backward"]["backward"] is None
    assert "/somewhere" not in plan.to_json()  # a plan that is sent to somebody names no folder of this machine
    assert data["loops"][0]["states"] == ["h"] and data["profile"] is None


def test_a_native_kernel_comes_with_its_source():
    plan = sl.Loop(sl.nn.GRUCell(3, 4)).plan(torch.randn(T, B, 3))
    (loop,) = plan.loops
    assert bool(loop.kernel) == (loop.backend == "cpu")


def test_lines_without_a_file_still_make_a_plan():
    step = from_source(SOURCE, "Tagger", "/somewhere/gone.py")()
    del linecache.cache["/somewhere/gone.py"]
    plan = sl.Loop(step, backend="eager").plan(torch.randn(T, B, 4))
    assert "gone.py:13" in str(plan) and all(source.file == "gru.py" for source in plan.sources)
    assert "gone.py:13" in plan._repr_html_()


# -- profiles ------------------------------------------------------------------------------------------------


def add_up(profile):
    return 0 < sum(profile.pieces.values()) <= profile.seconds


def test_a_profile_times_every_piece_forward_and_backward():
    step = from_source(SOURCE, "Tagger", "/somewhere/my_tagger.py")()
    loop, xs = sl.Loop(step, backend="eager"), torch.randn(T, B, 4)
    plan = loop.profile(xs, lengths=torch.tensor([6, 0, 3]))
    assert {"before loop 1", "loop 1", "before loop 2", "loop 2", "after the loops"} <= set(plan.profile.pieces)
    assert {"loop 1", "loop 2", "after the loops"} <= set(plan.backward.profile.pieces)
    assert add_up(plan.profile) and add_up(plan.backward.profile)
    assert all(op.piece in plan.profile.pieces for op in [*plan.before, *plan.after] if not op.view)
    assert all(parameter.grad is None for parameter in step.parameters())
    table = str(plan).split("\n\n")[-1]
    assert table.startswith("time: ") and "loop 2" in table and " %" in table
    assert not loop.plan(xs).profile


def test_a_profile_leaves_nothing_behind():
    """No clock stays in what runs the calls after it, also where a run fails."""
    from steploop.compiler import execute

    clocks = []
    step = from_source(SOURCE, "Tagger", "/somewhere/my_tagger.py")()
    loop, xs = sl.Loop(step, backend="eager"), torch.randn(T, B, 4)
    loop.profile(xs)
    run = execute.Executable.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute.Executable, "run", lambda self, *a, **k: clocks.append(self.clock) or run(self, *a, **k))
        loop(xs)[0].sum().backward()
    assert clocks and set(clocks) == {None}


def test_a_step_without_a_loop_has_a_profile_too():
    loop, xs = sl.Loop(sl.nn.Stack(nn.Linear(3, 4), nn.Tanh()), backend="eager"), torch.randn(T, B, 3)
    with torch.no_grad():
        plan = loop.profile(xs)
    assert list(plan.profile.pieces)[-1] == "all steps at once"
    assert add_up(plan.profile) and add_up(plan.backward.profile) and plan.profile.runs >= 3


def test_a_profile_without_gradients():
    plan = sl.Loop(sl.nn.GRUCell(3, 4).requires_grad_(False), backend="eager").profile(torch.randn(T, B, 3))
    assert plan.backward is None and add_up(plan.profile)
    assert "backward" not in str(plan)


def test_a_loop_that_ends_by_itself():
    class Until(sl.Step):
        def __init__(self):
            super().__init__()
            self.n, self.done = sl.State(), sl.State(dtype=torch.bool)

        def step(self):
            self.n.next = self.n.prev + 1
            self.done.next = self.n.next > 3
            return self.n.next

    plan = sl.Loop(Until(), until="done", backend="eager").profile(steps=9, batch_size=B)
    assert add_up(plan.profile)
