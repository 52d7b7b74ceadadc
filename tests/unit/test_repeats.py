"""Constants whose rows are repeated: what is made of them is made once for each row, and no loop gets copies."""

from __future__ import annotations

import pytest
import torch
from agree import agree
from torch import nn

import steploop as sl
from steploop.compiler import execute
from steploop.compiler.ir.graph import op_name


class Shared(sl.Step):
    """Three walkers for every row, which all attend to the memory of their row, each through keys of its own."""

    def __init__(self, size=5, walkers=3):
        super().__init__()
        self.count = walkers
        self.key, self.query = nn.Linear(size, size, bias=False), nn.Linear(size, size)
        self.h = sl.State(walkers, size, init=0.1)

    def repeated(self, memory):
        return memory.repeat_interleave(self.count, 0)

    def step(self, x, *, memory):
        memory = self.repeated(memory)
        h = self.h.prev.flatten(0, 1)
        weights = torch.bmm(self.key(memory), self.query(h).unsqueeze(2)).softmax(1)
        context = torch.bmm(weights.transpose(1, 2), memory).squeeze(1)
        self.h.next = (context + h).tanh().view_as(self.h.prev) * x.unsqueeze(1)
        return self.h.next


class Expanded(Shared):
    def repeated(self, memory):
        return memory.unsqueeze(1).expand(-1, self.count, -1, -1).reshape(-1, *memory.shape[1:])


class Together(Shared):
    """Of rows that were repeated, those of one row are looked at together: this is not made row by row."""

    def repeated(self, memory):
        wide = super().repeated(memory).unflatten(0, (-1, self.count))
        return (wide + wide.cumsum(1)).flatten(0, 1)


class Kept(Shared):
    """The repeated memory is a result as well."""

    def step(self, x, *, memory):
        return super().step(x, memory=memory), self.repeated(memory)[:, 0].unflatten(0, (-1, self.count))


STEPS = [Shared, Expanded, Together, Kept]


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_sizes_one_after_the_other(kind, backend):
    step = kind().double()
    for batch, frames, steps in [(2, 4, 5), (1, 4, 3), (4, 1, 2), (3, 6, 0), (2, 4, 5)]:
        x = torch.randn(steps, batch, 5, dtype=torch.float64)
        memory = torch.randn(batch, frames, 5, dtype=torch.float64, requires_grad=True)
        lengths = torch.randint(0, steps + 1, (batch,))
        agree(step, x, backend=backend, memory=memory, lengths=lengths)
        agree(step, x, backend=backend, memory=memory, lengths=None)


def ran(monkeypatch, step, x, memory):
    """The executables of a call without gradients."""
    found = []
    plain = execute.Executable.__post_init__
    monkeypatch.setattr(execute.Executable, "__post_init__", lambda self: (plain(self), found.append(self))[0])
    with torch.no_grad():
        sl.Loop(step)(x, memory=memory)
    return found


@pytest.mark.parametrize("kind", [Shared, Expanded])
def test_keys_are_made_once_for_every_row(monkeypatch, kind):
    (found,) = ran(monkeypatch, kind(), torch.randn(4, 2, 5), torch.randn(2, 6, 5))
    (loop,) = found.widened.values()
    if found.runners[next(iter(found.widened))].__module__.endswith("cpu.runner"):
        assert not {"expand", "clone"} & set(map(op_name, found.once.nodes))  # the loop reads each row where it stands
    sizes = [n.meta["rows"].inner for n in found.once.nodes if op_name(n) == "mm" and n.meta["rows"] is not None]
    assert sizes == [6]  # frames of a row, not of three


def test_what_mixes_repeated_rows_stays_as_it_is(monkeypatch):
    (found,) = ran(monkeypatch, Together(), torch.randn(4, 2, 5), torch.randn(2, 6, 5))
    assert {"cumsum", "mm"} <= set(map(op_name, found.once.nodes))
