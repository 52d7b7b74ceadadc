"""One row: captured as many rows are, and a step that does something else with one row is told from that."""

from __future__ import annotations

import pytest
import torch
from strangers import all_strangers
from test_strangers import AsStep, double  # noqa: F401  (a fixture)
from torch import nn

import steploop as sl
from steploop.compiler import making

STRANGERS = all_strangers()


@pytest.mark.parametrize("name", [n for n, s in STRANGERS.items() if s.rows and not s.random])
def test_a_first_call_with_one_row_is_captured_for_any_number(name, monkeypatch):
    """If it is with three. Else the step would be taken for one that mixes rows, and run several times slower."""
    made = []
    make = making.make
    monkeypatch.setattr(making, "make", lambda *given: made.append(make(*given)) or made[-1])
    fn, init, xs = STRANGERS[name].make()
    loop = sl.Loop(AsStep(fn, init(1)), backend="eager")
    with torch.no_grad():
        loop(xs(3, 1), carry=init(1))
        loop(xs(3, 3), carry=init(3))
    symbolic = [capture.symbolic for capture, _ in made]
    assert symbolic in ([True], [False, False])


def several(x):
    return x.shape[0] != 1


# What a step does with x (B, 12), m (B, 4, 4) and w (4, 4): with several rows, and with one. Views are not told apart,
# so what reads them must be.
OTHERWISE = {
    "broadcast along another axis": lambda x, m, w: m + (x[:, None, :4] if several(x) else x[:, :4, None]),
    "repeated along another axis": lambda x, m, w: (
        x[:, None, :4].expand(-1, 4, 4) if several(x) else x[:, :4, None].expand(-1, 4, 4)
    ).cumsum(1),
    "a sum over another axis": lambda x, m, w: m.sum(1 if several(x) else 2),
    "a sum of another view": lambda x, m, w: (
        x.view(-1, 6, 2).sum(1) if several(x) else x.view(-1, 2, 6).sum(1)[:, :2]
    ),
    "another view turned": lambda x, m, w: (
        x.view(-1, *((2, 6) if several(x) else (3, 4))).transpose(1, 2).reshape(-1, 12).cumsum(1)
    ),
    "turned or not": lambda x, m, w: (m.transpose(1, 2) if several(x) else m).reshape(-1, 16).cumsum(1),
    "a matrix of the row turned": lambda x, m, w: (
        (m if several(x) else m.transpose(1, 2)) @ x[:, :4, None]
    ).squeeze(2),
    "a vector on the other side": lambda x, m, w: (
        (m @ x[:, :4, None]).squeeze(2) if several(x) else (x[:, None, :4] @ m).squeeze(1)
    ),
    "a weight turned": lambda x, m, w: x[:, :4] @ (w if several(x) else w.T),
    "filled with another number": lambda x, m, w: x * (
        torch.zeros_like(x) if several(x) else torch.ones_like(x)
    ),
    "filled with more": lambda x, m, w: x + torch.full_like(x, 1.0 if several(x) else 1.5),
    "a softmax over another axis": lambda x, m, w: m.softmax(1 if several(x) else 2),
    "one read twice": lambda x, m, w: x.sin() * (x.sin() if several(x) else x.cos()),
    "another argument first": lambda x, m, w: (
        x[:, :4] - m[:, 0] if several(x) else m[:, 0] - x[:, :4]
    ),
    "a part of another axis": lambda x, m, w: m[:, 1] if several(x) else m[:, :, 1],
    "put elsewhere": lambda x, m, w: m.index_put(
        (torch.arange(len(m)), torch.tensor(0 if several(x) else 1)), x[:, :4]
    ),
}  # fmt: skip


class Otherwise(sl.Step):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(4, 4))
        self.m = sl.State((4, 4))

    def step(self, x):
        m = self.m.prev
        self.m.next = torch.tanh(m @ self.w + x[:, :4].unsqueeze(1) + torch.arange(4.0)[:, None])
        return self.function(x, m, self.w)


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("name", list(OTHERWISE))
def test_what_is_done_with_one_row_alone_is_seen(name, first):
    loop = sl.Loop(Otherwise(OTHERWISE[name]), backend="eager")
    for batch in (first, 4 - first, first):
        sl.verify(loop, torch.randn(3, batch, 12))


def puts(values, rows, places, new):
    values = values.clone()
    values[rows, places] = new
    return values


def adds(values, rows, places, new):
    values = values.clone()
    values[rows, places] += new
    return values


# How people write to, or read, one place of every row: rows are named by arange.
BY_ROW = {
    "assigned": puts,
    "added in place": adds,
    "index_put": lambda m, rows, places, new: m.index_put((rows, places), new),
    "index_put that adds": lambda m, rows, places, new: m.index_put((rows, places), new, accumulate=True),
    "index_put_": lambda m, rows, places, new: m.clone().index_put_((rows, places), new),
    "read": lambda m, rows, places, new: m + (m[rows, places] * new)[:, None],
    "one place": lambda m, rows, places, new: puts(m, rows, torch.tensor(2), new),
    "a negative place": lambda m, rows, places, new: puts(m, rows, torch.tensor(-1), new),
    "a number for all": lambda m, rows, places, new: puts(m, rows, places, 0.5),
    "one value for all rows": lambda m, rows, places, new: puts(m, rows, places, new[:1]),
    "every column": lambda m, rows, places, new: puts(m, slice(None), torch.tensor(1), new),
}


class ByRow(sl.Step):
    def __init__(self, function, count):
        super().__init__()
        self.function, self.count = function, count
        self.w = nn.Parameter(torch.randn(4, 4))
        self.m = sl.State((4, 4))

    def step(self, x):
        rows = torch.arange(len(x) if self.count is None else self.count)
        m = self.function(self.m.prev @ self.w, rows, x[:, 0].abs().long() % 4, x[:, :4])
        self.m.next = torch.tanh(m)
        return self.m.next.sum(1)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", list(BY_ROW))
def test_rows_named_by_arange(name, given):
    for sizes in ((3,), (1,)) if given else ((3, 1, 4, 3), (1, 3)):
        loop = sl.Loop(ByRow(BY_ROW[name], sizes[0] if given else None))
        for batch in sizes:
            sl.verify(loop, 3 * torch.randn(4, batch, 6))
