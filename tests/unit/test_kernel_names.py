"""Loops that differ in names alone share a kernel, whatever a user calls things."""

import re

import pytest
import torch
from torch import nn

import steploop as sl
from steploop.backends.cpu import runner as running
from steploop.backends.cpu.emit import canonical


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
