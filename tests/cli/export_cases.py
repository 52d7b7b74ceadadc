"""Models whose exported programs are loaded elsewhere. Each case: a model, the arguments of its calls (it is exported
with the first), and which of their axes are dynamic."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim

import steploop as sl

INPUT, HIDDEN = 2, 3
SIZES = [(5, 3), (1, 3), (6, 1), (1, 1), (2, 2), (9, 4), (0, 3), (5, 3)]  # T, B
T, B, S = Dim("T"), Dim("B"), Dim("S")
XS = ({0: T, 1: B},)


@dataclass
class Case:
    model: nn.Module
    calls: list[tuple]
    dynamic: Any
    training: bool = True
    strict: bool = False


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__] = make
    return make


def plain(model: nn.Module) -> nn.Module:
    """The same model, whose loops are plain Python loops."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"
    return model


def sequences(*features: int, sizes: list = SIZES, dtype: torch.dtype = torch.float32) -> list[tuple]:
    return [(torch.randn(t, b, *(features or (INPUT,)), dtype=dtype),) for t, b in sizes]


class Cell(sl.Step):
    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.w, self.h = nn.Linear(INPUT + HIDDEN, HIDDEN, dtype=dtype), sl.State(HIDDEN)

    def step(self, x):
        self.h.next = torch.tanh(self.w(torch.cat([x, self.h.prev], -1)))
        return {"h": self.h.next, "none": None, "more": (self.h.next * x.sum(-1, keepdim=True), self.h.prev.exp())}


class Calls(nn.Module):
    """A model that calls its loop with the argument names given here."""

    def __init__(self, loop: nn.Module, *names: str, **fixed: Any):
        super().__init__()
        self.loop, self.names, self.fixed = loop, names, fixed

    def forward(self, xs, first=None, second=None):
        named = {n.removeprefix("unbatched "): sl.unbatched(v) if n.startswith("unbatched ") else v
                 for n, v in zip(self.names, (first, second))}  # fmt: skip
        return self.loop(xs, **named, **self.fixed)


@case
def a_cell():
    return Case(Calls(sl.Loop(Cell())), sequences(), XS)


@case
def strictly():
    return Case(Calls(sl.Loop(Cell(), backend="eager")), sequences(), XS, strict=True)


@case
def values_alone():
    return Case(Calls(sl.Loop(Cell(), backend="eager")), sequences(), XS, training=False)


@case
def float64():
    model = Calls(sl.Loop(Cell(torch.float64), backend="eager"))
    return Case(model, sequences(dtype=torch.float64), XS)


@case
def bfloat16():
    model = Calls(sl.Loop(Flat(Cell(torch.bfloat16)), backend="eager"))
    return Case(model, sequences(dtype=torch.bfloat16), XS)


@case
def fixed_sizes():
    return Case(Calls(sl.Loop(Cell(), backend="eager")), sequences(sizes=[(4, 1)] * 2), None)


@case
def a_state():
    loop, calls = sl.Loop(Cell(), backend="eager"), sequences()
    calls = [(xs, {"h": torch.randn(xs.shape[1], HIDDEN)}) for (xs,) in calls]
    return Case(Calls(loop, "state"), calls, (*XS, {"h": {0: B}}))


@case
def lengths():
    calls = [(xs, torch.arange(xs.shape[1]).clamp(max=xs.shape[0])) for (xs,) in sequences()]
    model = Calls(sl.Loop(Cell(), backend="eager"), "lengths", on_masked="repeat")
    return Case(model, calls, (*XS, {0: B}))


@case
def mask_and_resets_reversed():
    calls = [(xs, torch.rand(xs.shape[:2]) < 0.6, torch.rand(xs.shape[:2]) < 0.3) for (xs,) in sequences()]
    model = Calls(sl.Loop(Cell(), backend="eager", reverse=True), "mask", "resets")
    return Case(model, calls, (*XS, {0: T, 1: B}, {0: T, 1: B}))


class Attends(sl.Step):
    """Constants with and without a batch, and a memory of any size."""

    def __init__(self):
        super().__init__()
        self.query, self.cell = nn.Linear(HIDDEN, INPUT), sl.nn.GRUCell(2 * INPUT, HIDDEN)
        self.start, self.h = nn.Linear(INPUT, HIDDEN), sl.State(HIDDEN, init=None)

    def begin(self, memory):
        self.h.prev = self.start(memory.mean(1))

    def step(self, x, memory, scale):
        weights = torch.softmax(torch.einsum("bi,bsi->bs", self.query(self.h.prev), memory) * scale, -1)
        self.h.next = self.cell(torch.cat([x, torch.einsum("bs,bsi->bi", weights, memory)], -1))
        return self.h.next, weights


@case
def constants():
    sizes = [4, 1, 2, 4, 1, 7, 3, 4]
    calls = [(xs, torch.randn(xs.shape[1], s, INPUT), torch.tensor(0.5)) for (xs,), s in zip(sequences(), sizes)]
    model = Calls(sl.Loop(Attends(), backend="eager"), "memory", "unbatched scale")
    return Case(model, calls, (*XS, {0: B, 1: S}, None))


class Scans(nn.Module):
    def __init__(self, backend: str = "eager"):
        super().__init__()
        self.w, self.backend = nn.Linear(HIDDEN + INPUT, HIDDEN), backend

    def forward(self, xs, start):
        def fn(carry, x):
            h = torch.tanh(self.w(torch.cat([carry["h"], x], -1)))
            return {"h": h, "n": carry["n"] + 1}, (h * 2, carry["n"].expand(h.shape[0]))

        return sl.scan(fn, {"h": start, "n": torch.zeros((), dtype=torch.int64)}, xs, backend=self.backend)


@case
def a_scan():
    calls = [(xs, torch.randn(xs.shape[1], HIDDEN)) for (xs,) in sequences()]
    return Case(Scans(), calls, (*XS, {0: B}))


class Remembers(sl.Step):
    def __init__(self):
        super().__init__()
        self.attention, self.conv = sl.memory.CausalSelfAttention(1, INPUT), sl.memory.CausalConv1d(INPUT, INPUT, 2)
        self.index, self.cell = sl.memory.StepIndex(), sl.nn.RNNCell(INPUT, INPUT)

    def step(self, x):
        return self.cell(self.attention(x) + self.index().unsqueeze(-1)) + self.conv(x)


@case
def memory_operations():
    return Case(Calls(sl.Loop(Remembers(), backend="eager")), sequences(), XS)


class Nests(sl.Step):
    """An inner sequence over an axis of each step's input."""

    def __init__(self):
        super().__init__()
        self.inner, self.w = sl.Loop(Cell(), backend="eager"), nn.Linear(2 * HIDDEN, HIDDEN)
        self.h = sl.State(HIDDEN)

    def step(self, x):  # (B, S, INPUT)
        outputs, state = self.inner(x.transpose(0, 1), state={"h": self.h.prev})
        self.h.next = torch.tanh(self.w(torch.cat([state["h"], outputs["h"].sum(0)], -1)))
        return self.h.next


@case
def a_loop_in_a_step():
    return Case(
        Calls(sl.Loop(Nests(), backend="eager")), sequences(4, INPUT, sizes=[(5, 3), (1, 3), (3, 4), (2, 2)]),
        XS,
    )  # fmt: skip


@case
def both_directions():
    cells = Cell(), Cell()
    calls = [(xs, torch.arange(xs.shape[1]).clamp(max=xs.shape[0])) for (xs,) in sequences()]
    model = Calls(sl.nn.Bidirectional(*map(Flat, cells), backend="eager"), "lengths")
    return Case(model, calls, (*XS, {0: B}))


class Flat(sl.Step):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def step(self, x):
        return self.cell(x)["h"]


@case
def an_lstm_of_two_layers():
    model = sl.nn.LSTM(INPUT, HIDDEN, num_layers=2, bidirectional=True)
    return Case(Calls(model), sequences(sizes=[s for s in SIZES if s[0]]), XS)


class Tied(sl.Step):
    """One embedding for the labels read and the labels scored."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(6, HIDDEN), nn.Linear(HIDDEN, 6)
        self.out.weight = self.embed.weight
        self.cell = sl.nn.GRUCell(HIDDEN, HIDDEN)
        self.again = sl.share(self.cell)

    def step(self, label):
        return self.out(self.again(self.cell(self.embed(label))))


@case
def tied_weights():
    calls = [(torch.randint(0, 6, size),) for size in SIZES]
    return Case(Calls(sl.Loop(Tied(), backend="eager")), calls, XS)


class Drops(sl.Step):
    """Another function in training; a buffer."""

    def __init__(self):
        super().__init__()
        self.w, self.h = nn.Linear(INPUT + HIDDEN, HIDDEN), sl.State(HIDDEN)
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.norm.running_mean.normal_()

    def step(self, x):
        h = self.w(torch.cat([x, self.h.prev], -1))
        self.h.next = torch.sigmoid(h) if self.training else self.norm(h)
        return nn.functional.dropout(self.h.next, 0.5, self.training)


@case
def in_evaluation():
    model = Calls(sl.Loop(Drops(), backend="eager")).eval()
    return Case(model, sequences(), XS)


class Twice(nn.Module):
    """Two loops of the same signature, one of them called twice."""

    def __init__(self):
        super().__init__()
        self.one, self.other = sl.Loop(Flat(Cell()), backend="eager"), sl.Loop(Sums(), backend="eager")

    def forward(self, xs):
        a, b = self.one(xs)[0], self.other(xs)[0]
        return a * b, self.one(xs.flip(0))[0]


class Sums(sl.Step):
    def __init__(self):
        super().__init__()
        self.w, self.h = nn.Linear(INPUT + HIDDEN, HIDDEN), sl.State(HIDDEN)

    def step(self, x):
        self.h.next = self.h.prev * 0.5 + self.w(torch.cat([x, self.h.prev], -1)).sin()
        return self.h.next


@case
def two_loops():
    return Case(Twice(), sequences(), XS)


class Centres(sl.Step):
    """Rows are mixed; without a batch of its own."""

    def __init__(self):
        super().__init__()
        self.cell = Sums()

    def step(self, x):
        y = self.cell(x)
        return y - y.mean(0, keepdim=True) + y.shape[0]


@case
def mixed_rows():
    return Case(Calls(sl.Loop(Centres(), backend="eager")), sequences(), XS)


class Untidy(sl.Step):
    """In-place writes, a dictionary carried, integers, a tensor closed over."""

    def __init__(self):
        super().__init__()
        self.w = nn.Linear(INPUT, INPUT)
        self.h, self.seen = sl.State(INPUT), sl.State(dtype=torch.int64, init=7)
        self.table = torch.linspace(-1, 1, 8)

    def step(self, x):
        h = self.h.prev.clone()
        h[:, 0] += self.table[self.seen.prev % 8]
        h.mul_(0.5).add_(self.w(x))
        h[x.sum(-1) > 0] = 0.25
        self.h.next = h
        self.seen.next = self.seen.prev * 3 + (x > 0).sum(-1)
        return h.relu_() * 2, self.seen.next


@case
def untidy():
    return Case(Calls(sl.Loop(Untidy(), backend="eager")), sequences(), XS)


class Solves(sl.Step):
    """A matrix state, an outer product, and a system of equations that is looked at when it is solved."""

    def __init__(self):
        super().__init__()
        self.w, self.S = nn.Linear(INPUT, INPUT), sl.State((INPUT, INPUT))

    def step(self, x):
        x = self.w(x)
        self.S.next = 0.5 * self.S.prev + x.unsqueeze(-1) * x.unsqueeze(-2)
        return torch.linalg.solve(self.S.next + torch.eye(INPUT, dtype=x.dtype), x)


@case
def a_system_of_equations():
    return Case(Calls(sl.Loop(Solves(), backend="eager")), sequences(), XS)
