"""torch's attention inside a loop equals the plain loop's, in values and gradients, and runs natively."""

from __future__ import annotations

import devices
import pytest
import torch
import torch.nn.functional as F
from agree import agree
from torch import nn

import steploop as sl

T, B, S, H, HEADS = 4, 3, 5, 8, 2
MASKS = {
    "none": lambda: None,
    "bool": lambda: torch.rand(B, 1, 1, S) < 0.6,
    "nothing to look at": lambda: torch.tensor([True, False, True])[:, None, None, None].expand(B, 1, 1, S),
    "added": lambda: torch.randn(B, HEADS, 1, S, dtype=torch.float64),
}


class Looking(sl.Step):
    """A state that looks at a memory and, where that is not given, at its own parts."""

    def __init__(self, **options):
        super().__init__()
        self.query, self.h = nn.Linear(H, H).double(), sl.State(H)
        self.options = options

    def step(self, x, *, memory=None, allowed=None):
        q = self.query(self.h.prev).view(-1, HEADS, 1, H // HEADS)
        if memory is None:
            parts = torch.stack([self.h.prev, x, self.h.prev * x], 1)
        else:
            parts = memory
        keys = parts.view(-1, parts.shape[1], HEADS, H // HEADS).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, keys, torch.sin(keys), attn_mask=allowed, **self.options)
        self.h.next = torch.tanh(y.transpose(1, 2).reshape(x.shape) + x)
        return self.h.next


def sequence():
    return torch.randn(T, B, H, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("mask", MASKS)
def test_at_a_memory(mask):
    memory = torch.randn(B, S, H, dtype=torch.float64, requires_grad=True)
    given = dict(memory=memory, lengths=torch.tensor([4, 0, 2]))
    if mask != "none":
        given["allowed"] = MASKS[mask]()
    agree(Looking(), sequence(), backend=devices.compiled(), **given)


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}])
def test_at_parts_of_the_state(options):
    agree(Looking(**options), sequence(), backend=devices.compiled(), resets=torch.rand(T, B) < 0.3)


def test_a_causal_one_runs_too():
    class Causal(sl.Step):
        def __init__(self):
            super().__init__()
            self.h = sl.State(HEADS, S, 4)

        def step(self, x):
            h = self.h.prev + x
            self.h.next = F.scaled_dot_product_attention(h, h, h, is_causal=True)
            return self.h.next

    agree(Causal(), torch.randn(T, B, HEADS, S, 4, dtype=torch.float64, requires_grad=True), backend="auto")
    with pytest.raises(sl.UnsupportedError, match="flash_attention" if devices.here().type == "cpu" else ""):
        sl.Loop(Causal(), backend="cpu")(torch.randn(T, B, HEADS, S, 4))


def test_a_transformer_layer_as_a_step():
    class Layer(sl.Step):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(H, HEADS, 16, dropout=0.0, batch_first=True).double()
            self.h = sl.State(S, H)

        def step(self, x):
            self.h.next = self.layer(self.h.prev + x)
            return self.h.next

    xs = torch.randn(T, B, S, H, dtype=torch.float64, requires_grad=True)
    agree(Layer(), xs, backend=devices.compiled(), lengths=torch.tensor([2, 4, 0]))
