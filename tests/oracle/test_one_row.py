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

TABLE = torch.tensor([1.0, 2.0, -1.0, 0.5])
# The same for what a graph of calls does not show: which tensor is read, what a constant holds, what is detached, what
# stands inside a loop, and what the results are.
HIDDEN = {
    "another parameter": lambda s, x: x[:, :4] * (s.a if several(x) else s.b),
    "another buffer": lambda s, x: x[:, :4] + (s.c if several(x) else s.d),
    "another closed-over tensor": lambda s, x: x[:, :4] + (TABLE if several(x) else s.c),
    "another constant": lambda s, x: x[:, :2] * torch.tensor([1.0, 2.0] if several(x) else [3.0, 4.0]),
    "another list of places": lambda s, x: x[:, [0, 1, 2] if several(x) else [2, 1, 0]],
    "another float": lambda s, x: x * (s.more if several(x) else s.less),
    "detached": lambda s, x: (x if several(x) else x.detach()) * s.a[:1],
    "a detached state": lambda s, x: (s.m.prev if several(x) else s.m.prev.detach()).sum(1) * s.a,
    "another loop inside": lambda s, x: sl.scan(
        lambda c, u: (torch.sin(c * u), c) if several(x) else (torch.tanh(c + u), c),
        x[:, :4],
        x.view(-1, 3, 4).transpose(0, 1),
    )[0],
    "a loop inside that reads another parameter": lambda s, x: sl.scan(
        lambda c, u: (torch.tanh(c * (s.a if several(x) else s.b) + u), c), x[:, :4], x.view(-1, 3, 4).transpose(0, 1)
    )[0],
    "another shape of the result": lambda s, x: x.view(-1, 3, 4) if several(x) else x.view(-1, 4, 3),
    "another structure of the result": lambda s, x: {"many": x} if several(x) else {"one": x},
    "a list": lambda s, x: x if several(x) else [x],
    "squeezed": lambda s, x: torch.tanh(x * 2).squeeze().reshape(x.shape),
    "a squeezed state": lambda s, x: torch.tanh(s.m.prev.sum(1) + x[:, :4]).squeeze().reshape(x[:, :4].shape),
    "squeezed in front": lambda s, x: torch.tanh(x * 2).unsqueeze(1).squeeze(0).flatten(-2).reshape(x.shape),
}  # fmt: skip


class Hidden(sl.Step):
    def __init__(self, function):
        super().__init__()
        self.function, self.more, self.less = function, 1.5, 0.5
        self.a, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        self.register_buffer("c", torch.ones(4))
        self.register_buffer("d", torch.ones(4))
        self.m = sl.State((4, 4))

    def step(self, x):
        m = self.m.prev
        self.m.next = torch.tanh(m + x[:, :4].unsqueeze(1) + torch.arange(4.0)[:, None])
        return self.function(self, x)


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("name", list(HIDDEN))
def test_what_a_graph_does_not_show_is_seen(name, first):
    step = Hidden(HIDDEN[name])
    loop = sl.Loop(step, backend="eager")
    for _ in range(2):
        for batch in (first, 4 - first, first):
            for steps in (3, 1):  # one row of one step is one row for what stands outside the loop, too
                sl.verify(loop, torch.randn(steps, batch, 12, requires_grad=True))
        with torch.no_grad():  # parameters that were equal differ now
            for i, tensor in enumerate((step.a, step.b, step.c, step.d)):
                tensor.add_(i + 1)


# Steps in which rows see each other, by operations that do so only for some shapes.
MIXING = {
    "triu": lambda x: x.triu(1), "tril": lambda x: x.tril(), "cdist": lambda x: x + torch.cdist(x, x * 0.5).mean(),
    "cdist to others": lambda x: torch.cdist(x, torch.arange(12.0).view(3, 4)),
    "gram": lambda x: x + (x @ x.t()).sum(1, keepdim=True),
    "pairs": lambda x: (x[:, None] - x[None]).abs().sum(1), "a number for two rows": lambda x: x @ x.t(),
    "var": lambda x: x.var(0).expand_as(x), "std": lambda x: x / (x.std(0, correction=0) + 1),
    "var of all": lambda x: x + x.var(),
    "var_mean": lambda x: x * torch.var_mean(x, 0)[0], "half a correction": lambda x: x * x.var(0, correction=0.5),
    "cosine": lambda x: torch.cosine_similarity(x[:, None], x[None], -1),
    "outer": lambda x: (x.t() @ x).sum() + x, "divided by rows": lambda x: x * (2.0 / (x.shape[0] + 1)),
    "attention over rows": lambda x: torch.softmax(x @ x.t() / 2, -1) @ x,
    "attention without heads": lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
    "linear algebra": lambda x: torch.linalg.solve(x.t() @ x + torch.eye(4), x.t()).t(),
}  # fmt: skip


class Mixing(sl.Step):
    def __init__(self, function, where):
        super().__init__()
        self.function, self.where = function, where
        self.a, self.h = nn.Parameter(torch.ones(4)), sl.State(4)

    def step(self, x):
        seen = self.function(x * self.a) if self.where == "before" else x
        if self.where == "inside":
            seen = self.function(self.h.prev + x)
        self.h.next = torch.tanh(self.h.prev + seen.mean(-1, keepdim=True) + x)
        return self.function(self.h.next) if self.where == "after" else self.h.next


@pytest.mark.parametrize("where", ["before", "inside", "after"])
@pytest.mark.parametrize("name", list(MIXING))
def test_rows_that_see_each_other_by_the_shape_of_a_value(name, where):
    for sizes in ((3, 5, 4), (4, 2)):  # four features: square too
        loop = sl.Loop(Mixing(MIXING[name], where), backend="eager")
        for batch in sizes:
            sl.verify(loop, torch.randn(4, batch, 4, requires_grad=True))


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


@pytest.mark.parametrize("name", ["var", "std", "divided by rows", "gram", "pairs"])
def test_rows_that_see_each_other_and_end_one_by_one(name):
    """As the plain loop does, or an error: what the gradient computes with the number of rows is not known."""
    loop = sl.Loop(Mixing(MIXING[name], "before"), backend="eager")
    for batch in (3, 5, 3):
        x, lengths = torch.randn(4, batch, 4), torch.tensor([4, 3, 3, 4, 2][:batch])
        sl.verify(loop, x.clone().requires_grad_())
        for gradients in (False, True):
            refused = name == "divided by rows" or (gradients and name in ("var", "std"))
            with torch.set_grad_enabled(gradients):
                if refused:
                    with pytest.raises(sl.UnsupportedError, match="computes with how many rows there are"):
                        loop(x.clone().requires_grad_(gradients), lengths=lengths)
                else:
                    sl.verify(loop, x.clone().requires_grad_(gradients), lengths=lengths)
                sl.verify(loop, x.clone().requires_grad_(gradients), lengths=torch.full((batch,), 4))
