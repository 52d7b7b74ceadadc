"""The steps of the benchmarks in PyTorch.

Each is a `steploop.Step`, written as a user would, and offers the same formula to peers that loop by hand:
`project(x)` is the part that needs no state, `advance(projected, states, **constants)` the rest of one step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steploop as sl

from . import matrix
from .data import Workload, state_shapes

States = tuple[Tensor, ...]


class LSTM(sl.nn.LSTMCell):
    """steploop's own LSTM cell."""

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_ih, self.bias_ih)

    def advance(self, projected: Tensor, states: States) -> tuple[States, Tensor]:
        h, c = states
        i, f, g, o = (projected + F.linear(h, self.weight_hh, self.bias_hh)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h, c), h


class GRU(sl.nn.GRUCell):
    """steploop's own GRU cell."""

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_ih, self.bias_ih)

    def advance(self, projected: Tensor, states: States) -> tuple[States, Tensor]:
        (h,) = states
        x_r, x_z, x_n = projected.chunk(3, -1)
        h_r, h_z, h_n = F.linear(h, self.weight_hh, self.bias_hh).chunk(3, -1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        h = n + z * (h - n)
        return (h,), h


class Stranger(sl.Step):
    """An LSTM that nobody wrote as a layer: peepholes, gates permuted, GELU for tanh, a third state.

    o, g, f, i = split(W x + b + U h);  i, f see c through peepholes;  c' = f c + i gelu(g);
    m' = a m + (1 - a) c' with a learned;  o sees m';  h' = o gelu(c').
    """

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.input_gates = nn.Linear(input_size, 4 * hidden_size)
        self.hidden_gates = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.peep_i = nn.Parameter(torch.full((hidden_size,), 0.1))
        self.peep_f = nn.Parameter(torch.full((hidden_size,), -0.1))
        self.peep_o = nn.Parameter(torch.full((hidden_size,), 0.2))
        self.decay = nn.Parameter(torch.ones(hidden_size))
        self.h, self.c, self.m = sl.State(hidden_size), sl.State(hidden_size), sl.State(hidden_size)

    def project(self, x: Tensor) -> Tensor:
        return self.input_gates(x)

    def advance(self, projected: Tensor, states: States) -> tuple[States, Tensor]:
        h, c, m = states
        o, g, f, i = (projected + self.hidden_gates(h)).chunk(4, -1)
        i = torch.sigmoid(i + self.peep_i * c)
        f = torch.sigmoid(f + self.peep_f * c)
        c = f * c + i * F.gelu(g)
        a = torch.sigmoid(self.decay)
        m = a * m + (1 - a) * c
        h = torch.sigmoid(o + self.peep_o * m) * F.gelu(c)
        return (h, c, m), h

    def step(self, x: Tensor) -> Tensor:
        states = self.h.prev, self.c.prev, self.m.prev
        (self.h.next, self.c.next, self.m.next), y = self.advance(self.project(x), states)
        return y


class LayerNormLSTM(sl.Step):
    """The LSTM of Ba et al. 2016 (equations 20-22), as a user writes it.

    The recurrent gain starts at 0.1 as in Cooijmans et al. 2017 (section 4.2): with gains of 1 and random weights the
    recurrence is chaotic, and after some hundred steps no two float32 implementations agree.
    """

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.input_gates = nn.Linear(input_size, 4 * hidden_size)
        self.hidden_gates = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.norm_x = nn.LayerNorm(4 * hidden_size)
        self.norm_h = nn.LayerNorm(4 * hidden_size)
        self.norm_c = nn.LayerNorm(hidden_size)
        nn.init.constant_(self.norm_h.weight, 0.1)
        self.h, self.c = sl.State(hidden_size), sl.State(hidden_size)

    def project(self, x: Tensor) -> Tensor:
        return self.norm_x(self.input_gates(x))

    def advance(self, projected: Tensor, states: States) -> tuple[States, Tensor]:
        h, c = states
        i, f, g, o = (projected + self.norm_h(self.hidden_gates(h))).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(self.norm_c(c))
        return (h, c), h

    def step(self, x: Tensor) -> Tensor:
        (self.h.next, self.c.next), y = self.advance(self.project(x), (self.h.prev, self.c.prev))
        return y


class Decoder(sl.Step):
    """An attention decoder with input feeding (Luong et al. 2015): an LSTM over [word, last attention].

    Constants: memory (B, S, H), memory_mask (B, S) bool, True = a word. Returns the attentional vector
    (B, H); the output layer over the vocabulary is left out, since it belongs after the loop for everyone.
    """

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.word_gates = nn.Linear(input_size, 4 * hidden_size)
        self.fed_gates = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.hidden_gates = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.combine = nn.Linear(2 * hidden_size, hidden_size)
        self.h, self.c, self.fed = sl.State(hidden_size), sl.State(hidden_size), sl.State(hidden_size)

    def project(self, x: Tensor) -> Tensor:
        return self.word_gates(x)

    def advance(
        self, projected: Tensor, states: States, memory: Tensor, memory_mask: Tensor
    ) -> tuple[States, Tensor]:
        h, c, fed = states
        i, f, g, o = (projected + self.fed_gates(fed) + self.hidden_gates(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        scores = torch.bmm(memory, self.query(h).unsqueeze(2)).squeeze(2)
        weights = torch.softmax(scores.masked_fill(~memory_mask, float("-inf")), -1)
        context = torch.bmm(weights.unsqueeze(1), memory).squeeze(1)
        fed = torch.tanh(self.combine(torch.cat([context, h], -1)))
        return (h, c, fed), fed

    def step(self, x: Tensor, *, memory: Tensor, memory_mask: Tensor) -> Tensor:
        states = self.h.prev, self.c.prev, self.fed.prev
        (self.h.next, self.c.next, self.fed.next), y = self.advance(
            self.project(x), states, memory, memory_mask
        )
        return y


MODELS: dict[str, type[sl.Step]] = {
    "lstm": LSTM,
    "gru": GRU,
    "stranger": Stranger,
    "lnlstm": LayerNormLSTM,
    "decoder": Decoder,
    "linear attention": matrix.LinearAttention,
    "delta rule": matrix.Delta,
    "mLSTM": matrix.MLSTM,
    "fast weights": matrix.FastWeights,
}


def zero_states(work: Workload, like: Tensor) -> States:
    """For the rows of a sequence (T, B, ...)."""
    return tuple(like.new_zeros(like.shape[1], *shape) for shape in state_shapes(work.kind, work.H))


def make_model(work: Workload) -> sl.Step:
    """The workload's step, with the same weights whoever asks."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MODELS[work.kind](work.I, work.H)
