"""Loops that differ in names alone share a kernel, whatever a user calls things."""

import re

import pytest
import torch
from torch import nn

import steploop as sl
from steploop.backends.cpu import runner as running
from steploop.backends.native.emit import Printer, canonical
from steploop.backends.native.reserved import reserved, words


@pytest.fixture
def built(monkeypatch):
    """The texts that were given to the compiler."""
    texts = []
    begin = running.begin

    def noting(text):
        texts.append(text)
        return begin(text)

    monkeypatch.setattr(running, "begin", noting)
    return texts


def test_equal_layers_share_their_kernels(built):
    layers = sl.Loop(sl.nn.Stack(*[sl.nn.LayerNormLSTMCell(8, 8) for _ in range(4)]))
    outputs, _ = layers(torch.randn(5, 3, 8, requires_grad=True))
    outputs.sum().backward()
    assert len(built) == 8  # forward and backward of each layer
    assert len(set(built)) <= 3  # (no later layer gives the last one's backward a gradient)


def test_a_text_differs_from_its_canonical_form_in_names_alone():
    text = "float* h_tile = call.h;  // the state h\nlong n = h_tile[0] * 2e5f + h_2; // 3\n"
    plain = canonical(text, {"h", "h_tile", "h_2"})
    assert plain == "float* v0 = call.v1;\nlong n = v0[0] * 2e5f + v2;\n"
    assert canonical(plain, set(re.findall(r"v\d", plain))) == plain


class Named(sl.Step):
    """Gives its states and weights any names."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        for name in names:
            setattr(self, f"w_{name}", nn.Parameter(torch.randn(5, 5) * 0.3))
            setattr(self, name, sl.State(5))

    def step(self, x):
        total = x
        for name in self.names:
            state = getattr(self, name)
            state.next = torch.tanh(state.prev @ getattr(self, f"w_{name}") + total)
            total = total + state.next.softmax(-1)
        return total


@pytest.mark.parametrize(
    "names",
    [
        ("me", "share", "size", "wait"), ("next", "nearer", "parallel", "packed"), ("v0", "v1", "v2", "x"),
        ("prepare", "bytes", "padded", "store_mask"), ("h", "h_tile", "h_row", "in_h"), ("rows", "early", "here", "p"),
        ("pow", "sum", "value", "lanes"), ("count", "w", "f", "index"), ("weight0_h", "h_at", "x_2", "x_i"),
        ("C", "default", "extern", "visibility"), ("I", "NAN", "INFINITY", "E"),
    ],
    ids="-".join,
)  # fmt: skip
def test_names_that_kernels_use_themselves(names, built):
    step = Named(names)
    for batch in (3, 1):
        x = torch.randn(6, batch, 5)
        assert sl.verify(step, x).ok
    assert built
    assert {loop.backend for loop in sl.Loop(step).plan(x).loops} == {"cpu"}


@pytest.fixture
def printers(monkeypatch):
    """What printed every kernel."""
    found, text = [], Printer.text

    def noting(self):
        found.append((self, text(self)))
        return found[-1][1]

    monkeypatch.setattr(Printer, "text", noting)
    return found


class EveryKind(sl.Step):
    """Products made early and late, reductions both ways, scans, look-ups, writes at an index, linear algebra."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5) * 0.3)
        self.h, self.at = sl.State(5), sl.State((), dtype=torch.int64)
        self.table = sl.State((5, 5))

    def step(self, x):
        h = torch.tanh(x @ self.weight + self.h.prev @ self.weight)
        table = 0.9 * self.table.prev + h.unsqueeze(-1) * x.unsqueeze(-2)
        best = table.gather(1, self.at.prev.view(-1, 1, 1).expand(-1, 1, 5)).squeeze(1)
        spread = torch.linalg.solve(table + 5 * torch.eye(5), best.cumsum(-1).unsqueeze(-1)).squeeze(-1)
        self.h.next = h + table.sum(1) + table.amax(2) + spread
        self.table.next = table.scatter_add(2, self.at.prev.view(-1, 1, 1).expand(-1, 5, 1), h.unsqueeze(-1))
        self.at.next = self.h.next.argmax(-1)
        return self.h.next


def test_every_word_of_a_kernel_is_a_name_or_reserved(printers):
    """A word that is neither could be what a user calls a state."""
    for step, width in ((EveryKind(), 5), (sl.nn.LayerNormLSTMCell(8, 8), 8), (Named(["h", "c"]), 5)):
        for batch in (3, 1):
            x = torch.randn(6, batch, width, requires_grad=True)
            sl.Loop(step, backend="auto")(x, resets=torch.rand(6, batch) < 0.3)[0].sum().backward()
    assert len(printers) >= 5
    for printer, text in printers:
        free = {word for word in words(text) - printer.names - reserved() if not re.fullmatch(r"j\d+|v\d+", word)}
        assert not free
