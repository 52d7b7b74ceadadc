"""The contract between the compiler and backends, tried by a backend that the library does not know."""

from __future__ import annotations

import pytest
import torch
from agree import agree, situations
from torch import nn
from toy_backend import registered

import steploop as sl
from steploop.backends import BACKENDS, choose


class Cell(sl.Step):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(3 + 4, 8).double(), nn.Linear(4, 2).double()
        self.h, self.n = sl.State(4), sl.State(dtype=torch.int64)

    def step(self, x):
        gate, new = self.mix(torch.cat([x, self.h.prev], 1)).chunk(2, 1)
        self.h.next = torch.lerp(self.h.prev, new.tanh(), gate.sigmoid())
        self.n.next = torch.where(gate[:, 0] > 0, self.n.prev + 1, 0)
        return self.head(self.h.next), self.n.next


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


LENGTHS = torch.tensor([6, 1, 4])
SITUATIONS = situations(LENGTHS, torch.rand(6, 3) < 0.7, torch.rand(6, 3) < 0.3)


@pytest.fixture
def toy():
    with registered() as backend:
        yield backend


@pytest.mark.parametrize("call", SITUATIONS.values(), ids=SITUATIONS)
def test_it_gives_what_the_plain_loop_gives(toy, call):
    step = Cell()
    for batch in (3, 3):
        agree(step, double(6, batch, 3), backend="toy", **call)
    assert toy.made and any(runner.calls for runner in toy.made)


@pytest.mark.parametrize("cell", [sl.nn.LSTMCell, sl.nn.GRUCell, sl.nn.LayerNormLSTMCell])
def test_cells(toy, cell):
    agree(cell(3, 4).double(), double(5, 2, 3), backend="toy", save="all")
    agree(cell(3, 4).double(), double(5, 2, 3), backend="toy", save="states", loop={"reverse": True})


def test_the_plan_names_it(toy):
    plan = sl.Loop(Cell(), backend="toy").plan(double(6, 3, 3))
    assert {loop.backend for loop in plan.loops} == {"toy"}
    assert "phase 0" in plan.stages()


def test_auto_tries_it_in_its_turn(toy, monkeypatch):
    class Refuses:
        name, steps = "cpu", False

        def reasons_against(self, loop):
            return [("not today", "")]

    choose.backend_of("cpu")
    monkeypatch.setitem(choose._made, "cpu", Refuses())
    plan = sl.Loop(Cell()).plan(double(6, 3, 3))
    assert {loop.backend for loop in plan.loops} == {"toy"} and plan.loops[0].reasons == ["not today"]


def test_what_it_refuses_is_an_error_with_its_reason(toy):
    class Sorts(sl.Step):
        def __init__(self):
            super().__init__()
            self.h = sl.State(4)

        def step(self, x):
            self.h.next = (x + self.h.prev).sort(1).values
            return self.h.next

    with pytest.raises(sl.UnsupportedError, match='backend="toy" can\'t run this loop'):
        sl.Loop(Sorts(), backend="toy")(torch.randn(3, 2, 4))


def test_names_are_taken_once(toy):
    with pytest.raises(sl.InputError, match="Every backend has a name of its own"):
        choose.register(toy)


def test_it_is_gone_afterwards():
    assert "toy" not in BACKENDS
    with pytest.raises(sl.InputError, match="no such backend"):
        sl.Loop(Cell(), backend="toy")
    with pytest.raises(sl.UnsupportedError, match="there is no backend 'toy'"):
        choose.chosen("toy")
