"""States that are matrices: their products with vectors run in the loop, and nothing as wide as they are is kept for
all steps where narrow values say as much."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agree import agree, situations
from torch import nn

import steploop as sl
from steploop.compiler import pipeline, replay

pytestmark = pytest.mark.pairs

HEADS, D, INPUT = 2, 24, 5  # a state of 2 * 24 * 24 numbers: wide


class Heads(sl.Step):
    """What the steps here have in common: queries, keys and values of every head."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(INPUT, HEADS * D) for _ in range(3))
        self.gates = nn.Linear(INPUT, 2 * HEADS)

    def of(self, x):
        q, k, v = (layer(x).unflatten(-1, (HEADS, D)) for layer in (self.q, self.k, self.v))
        return q, F.normalize(k, dim=-1), v, *torch.sigmoid(self.gates(x)).chunk(2, -1)


class LinearAttention(Heads):
    """A decay per head and an outer product (Katharopoulos et al. 2020; Sun et al. 2023)."""

    def __init__(self):
        super().__init__()
        self.S = sl.State((HEADS, D, D))

    def step(self, x):
        q, k, v, decay, _ = self.of(x)
        self.S.next = decay[..., None, None] * self.S.prev + k.unsqueeze(-1) * v.unsqueeze(-2)
        return torch.einsum("bhkv,bhk->bhv", self.S.next, q).flatten(1)


class Delta(LinearAttention):
    """The delta rule (Schlag et al. 2021), written with matmul."""

    def step(self, x):
        q, k, v, beta, _ = self.of(x)
        old = (self.S.prev @ k.unsqueeze(-1)).squeeze(-1)
        self.S.next = self.S.prev + (beta.unsqueeze(-1) * (v - old)).unsqueeze(-1) * k.unsqueeze(-2)
        return (self.S.next @ q.unsqueeze(-1)).squeeze(-1).flatten(1)


class MLSTM(LinearAttention):
    """The matrix memory of xLSTM (Beck et al. 2024): two more states, one of which bounds the exponents."""

    def __init__(self):
        super().__init__()
        self.n, self.m = sl.State((HEADS, D)), sl.State(HEADS)

    def step(self, x):
        q, k, v, i, f = self.of(x)
        m = torch.maximum(f.log() + self.m.prev, i)
        i, f = torch.exp(i - m), torch.exp(f.log() + self.m.prev - m)
        C = f[..., None, None] * self.S.prev + i[..., None, None] * torch.einsum("bhv,bhk->bhvk", v, k)
        n = f[..., None] * self.n.prev + i[..., None] * k
        h = torch.einsum("bhvk,bhk->bhv", C, q) / torch.einsum("bhk,bhk->bh", n, q).abs().clamp(min=1.0).unsqueeze(-1)
        self.S.next, self.n.next, self.m.next = C, n, m
        return h.flatten(1)


class FastWeights(Heads):
    """Ba et al. 2016: the fast matrix is made of the states that it helps to make."""

    def __init__(self):
        super().__init__()
        self.A, self.h = sl.State((HEADS, D, D)), sl.State((HEADS, D), init="learned")
        self.w = nn.Linear(HEADS * D, HEADS * D)

    def step(self, x):
        z = (self.v(x) + self.w(self.h.prev.flatten(1))).unflatten(-1, (HEADS, D))
        self.A.next = 0.9 * self.A.prev + 0.3 * self.h.prev.unsqueeze(-1) * self.h.prev.unsqueeze(-2)
        self.h.next = torch.tanh(z + torch.matmul(self.A.next, self.h.prev.unsqueeze(-1)).squeeze(-1))
        return self.h.next.flatten(1)


class ReadOnce(Heads):
    """A matrix that is no state: it is made of the input, read by two others, and a part of it is given."""

    def __init__(self):
        super().__init__()
        self.h, self.S = sl.State((HEADS, D)), sl.State((HEADS, D, D))

    def step(self, x):
        q, k, v, a, b = self.of(x)
        outer = v.unsqueeze(-1) @ k.unsqueeze(-2)
        self.h.next = torch.tanh((outer @ self.h.prev.unsqueeze(-1)).squeeze(-1) + q)
        self.S.next = a[..., None, None] * self.S.prev.transpose(-1, -2) + outer * b[..., None, None]
        return torch.cat([(self.S.prev * self.h.next.unsqueeze(-1)).sum(-2).flatten(1), outer[:, 0, 0]], -1)


class OneProduct(sl.Step):
    """One product makes everything; parts of it are read by several loops, and divided by what another loop gives."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(INPUT, 3 * HEADS * D + 2 * HEADS)
        self.S, self.n, self.m = sl.State((HEADS, D, D)), sl.State((HEADS, D)), sl.State(HEADS)

    def step(self, x):
        q, k, v, gates = self.layer(x).split([HEADS * D] * 3 + [2 * HEADS], -1)
        q, k, v = (a.view(-1, HEADS, D) for a in (q, k, v))
        i, f = torch.sigmoid(gates).chunk(2, -1)
        m = torch.maximum(f.log() + self.m.prev, i)
        i, f = torch.exp(i - m), torch.exp(f.log() + self.m.prev - m)
        self.S.next = f[..., None, None] * self.S.prev + i[..., None, None] * (v.unsqueeze(-1) * k.unsqueeze(-2))
        self.n.next, self.m.next = f[..., None] * self.n.prev + i[..., None] * k, m
        below = (self.n.next * q).sum(-1, keepdim=True).abs().clamp(min=1.0)
        return (torch.einsum("bhvk,bhk->bhv", self.S.next, q) / below).flatten(1), q


class Summed(Heads):
    """A sum of outer products, which would be a running sum over a sequence of matrices; it is given as well."""

    def __init__(self):
        super().__init__()
        self.S, self.late = sl.State((HEADS, D, D)), sl.State((HEADS, D, D), init=1.0)

    def step(self, x):
        q, k, v, _, _ = self.of(x)
        self.S.next = self.S.prev + k.unsqueeze(-1) * v.unsqueeze(-2)
        self.late.next = self.S.prev
        return (self.late.prev @ q.unsqueeze(-1)).squeeze(-1), self.S.next.mT


STEPS = [LinearAttention, Delta, MLSTM, FastWeights, ReadOnce, OneProduct, Summed]


def made(kind):
    torch.manual_seed(0)
    return kind().double()


@pytest.fixture(params=["kept", "made again"])
def again(request, monkeypatch):
    """Whether wide values are kept, which at the sizes of tests they are; else spans are short."""
    if request.param != "kept":
        monkeypatch.setattr(pipeline, "REPLAY_FROM", -1)
        monkeypatch.setattr(replay, "LEAST_SPAN", 2)


CALLS = [(call, "auto") for call in situations(None, None, None)] + [("all", "eager")]


@pytest.mark.parametrize(("call", "backend"), CALLS)
@pytest.mark.parametrize("kind", STEPS)
def test_matrix_states_equal_the_plain_loop(kind, backend, call, again):
    step = made(kind)
    for T, B in ((11, 3), (5, 1), (0, 2), (1, 3)):
        generator = torch.Generator().manual_seed(T)
        lengths = torch.tensor([T, max(T - 3, 0), 0][:B])
        holes = torch.rand(T, B, generator=generator) > 0.3
        resets = torch.rand(T, B, generator=generator) > 0.7
        xs = torch.randn(T, B, INPUT, dtype=torch.float64, requires_grad=True)
        given = situations(lengths, holes, resets)[call]
        for reverse in (False, True):
            agree(step, xs, backend=backend, save="auto", loop={"reverse": reverse}, **given)


def test_a_state_that_is_given_gets_its_gradient(again):
    step, xs = made(Delta), torch.randn(9, 3, INPUT, dtype=torch.float64, requires_grad=True)
    state = {"S": torch.randn(3, HEADS, D, D, dtype=torch.float64, requires_grad=True)}
    for backend in ("eager", "auto"):
        agree(step, xs, backend=backend, save="auto", state=state)
        agree(step, xs, backend=backend, save="auto", state=state, resets=torch.rand(9, 3) > 0.6)


@pytest.mark.parametrize("kind", [LinearAttention, Delta, MLSTM, FastWeights])
def test_nothing_wide_is_kept(kind, monkeypatch):
    monkeypatch.setattr(pipeline, "REPLAY_FROM", -1)
    step, xs = made(kind), torch.randn(16, 3, INPUT, dtype=torch.float64)
    sizes = []

    def pack(saved):
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        sl.Loop(step)(xs)[0].sum().backward()
    at_edges = 4 * 3 * HEADS * D * D  # four spans of four steps
    assert max(sizes) == at_edges and sizes.count(at_edges) == 1
    plan = sl.Loop(step).plan(xs)
    assert any("made again" in text for text in plan.notes)


@pytest.mark.parametrize("kind", [LinearAttention, Delta, MLSTM, FastWeights])
def test_products_with_a_vector_are_in_the_loop(kind, monkeypatch):
    monkeypatch.setattr(pipeline, "REPLAY_FROM", -1)  # as a sequence that is much longer
    plan = sl.Loop(made(kind)).plan(torch.randn(16, 3, INPUT, dtype=torch.float64))
    for found in (plan, plan.backward):
        for op in (*found.before, *found.after):
            assert op.piece.startswith("loop ") or op.name != "bmm" or f"{D}, {D})" not in op.product, op


def test_wide_values_are_kept_where_what_makes_them_is_as_wide():
    """A big LSTM keeps its gates: its cell is no wider than they are."""
    xs = torch.randn(5, 2, 3, requires_grad=True)
    for step in (sl.nn.LSTMCell(3, 1100), sl.nn.GRUCell(3, 1100)):
        assert not any("made again" in text for text in sl.Loop(step).plan(xs).notes)
