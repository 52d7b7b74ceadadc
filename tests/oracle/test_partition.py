"""What must loop, on the shapes that people build; each loop is named by the operations in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import steploop as sl

T, B, INPUT, HIDDEN, LABELS, SLOTS = 6, 3, 4, 5, 7, 8


class GRU(sl.Step):
    def __init__(self, size):
        super().__init__()
        self.h = sl.State(HIDDEN)
        self.x_gates, self.h_gates = nn.Linear(size, 3 * HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN)

    def step(self, x):
        r, z, n = self.x_gates(x).chunk(3, -1)
        hr, hz, hn = self.h_gates(self.h.prev).chunk(3, -1)
        r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
        self.h.next = (1 - z) * torch.tanh(n + r * hn) + z * self.h.prev
        return self.h.next


def attend(query, memory):
    weights = torch.softmax(torch.einsum("bd,bsd->bs", query, memory), -1)
    return torch.einsum("bs,bsd->bd", weights, memory)


class Stack(sl.Step):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = GRU(INPUT), GRU(HIDDEN), GRU(HIDDEN)

    def step(self, x):
        return self.c(self.b(self.a(x)))


class Decoder(sl.Step):
    """Fed with given labels; the context goes back into the cell, the output layer does not."""

    def __init__(self):
        super().__init__()
        self.embed, self.cell = nn.Embedding(LABELS, INPUT), GRU(INPUT + HIDDEN)
        self.context, self.out = sl.State(HIDDEN), nn.Linear(2 * HIDDEN, LABELS)

    def step(self, label, *, memory):
        h = self.cell(torch.cat([self.embed(label), self.context.prev], -1))
        self.context.next = attend(h, memory)
        return self.out(torch.cat([h, self.context.next], -1))


class AttendsAfterwards(sl.Step):
    """The context is read by the output alone."""

    def __init__(self):
        super().__init__()
        self.embed, self.cell = nn.Embedding(LABELS, INPUT), GRU(INPUT)
        self.out = nn.Linear(2 * HIDDEN, LABELS)

    def step(self, label, *, memory):
        h = self.cell(self.embed(label))
        return self.out(torch.cat([h, attend(h, memory)], -1))


class NothingFedBack(sl.Step):
    def __init__(self):
        super().__init__()
        self.before, self.w = sl.State(INPUT), nn.Linear(2 * INPUT, HIDDEN)

    def step(self, x):
        self.before.next = x
        return torch.tanh(self.w(torch.cat([x, self.before.prev], -1)))


class ContextToEveryLayer(sl.Step):
    """A stack with the context fed to every layer, and the bottom layer as the query."""

    def __init__(self):
        super().__init__()
        self.bottom, self.middle, self.top = (GRU(INPUT + HIDDEN), GRU(2 * HIDDEN), GRU(2 * HIDDEN))
        self.context = sl.State(HIDDEN)

    def step(self, x, *, memory):
        h = self.bottom(torch.cat([x, self.context.prev], -1))
        self.context.next = attend(h, memory)
        h = self.middle(torch.cat([h, self.context.next], -1))
        return self.top(torch.cat([h, self.context.next], -1))


def plan_of(step, xs, **given):
    return sl.Loop(step, backend="eager").plan(xs, **given)


def names(ops):
    return [op.name for op in ops]


def products(ops):
    return [name for name in names(ops) if name in ("mm", "bmm", "addmm", "baddbmm")]


def test_three_stacked_grus_are_three_loops_with_only_the_hidden_products_inside():
    plan = plan_of(Stack(), torch.randn(T, B, INPUT, requires_grad=True))
    assert [loop.states for loop in plan.loops] == [["a.h"], ["b.h"], ["c.h"]]
    assert [products(loop.ops) for loop in plan.loops] == [["mm"], ["mm"], ["mm"]]
    # The input products: the first layer's before its loop, the others between the loops.
    assert len(products([*plan.before, *plan.after])) == 3
    # In the gradient too: one product a step in every loop, and six weight gradients, one product each.
    back = plan.backward
    assert len(back.loops) == 3
    assert all(len(products(loop.ops)) == 1 for loop in back.loops)
    weights = 6
    inputs = 3
    assert len(products([*back.before, *back.after])) - weights - inputs in (0, 3)  # 3 where recomputed


def test_what_stays_in_a_loop_says_why():
    plan = plan_of(Stack(), torch.randn(T, B, INPUT))
    for loop, cell in zip(plan.loops, "abc", strict=True):
        product = next(op for op in loop.ops if op.name == "mm")
        assert product.line.startswith("test_partition.py:")
        assert f"{cell}.h.prev" in product.why and f"{cell}.h.next" in product.why


def test_a_decoder_fed_with_given_labels_has_its_output_layer_after_the_loop():
    plan = plan_of(Decoder(), torch.randint(0, LABELS, (T, B)), memory=torch.randn(B, SLOTS, HIDDEN))
    (loop,) = plan.loops
    assert sorted(loop.states) == ["cell.h", "context"]
    # In the loop: the context's and the hidden products of the cell, scores and readout of the attention.
    assert sorted(products(loop.ops)) == ["bmm", "bmm", "mm", "mm"]
    assert "embedding" in names(plan.before) and "embedding" not in names(loop.ops)
    assert products(plan.after) and set(products(plan.after)) == {"mm"}


def test_attention_that_nothing_feeds_back_is_outside():
    plan = plan_of(
        AttendsAfterwards(), torch.randint(0, LABELS, (T, B)), memory=torch.randn(B, SLOTS, HIDDEN)
    )
    (loop,) = plan.loops
    assert loop.states == ["cell.h"] and products(loop.ops) == ["mm"]
    assert products(plan.after).count("bmm") == 2


def test_with_nothing_fed_back_everything_is_outside():
    plan = plan_of(NothingFedBack(), torch.randn(T, B, INPUT, requires_grad=True))
    assert plan.loops == [] and plan.backward.loops == []
    assert "tanh" in names(plan.before)


def test_context_to_every_layer_with_the_bottom_layer_as_query():
    xs, memory = torch.randn(T, B, INPUT), torch.randn(B, SLOTS, HIDDEN)
    plan = plan_of(ContextToEveryLayer(), xs, memory=memory)
    first, *others = plan.loops
    # The bottom layer and the attention are one loop; the layers above see a context that is known by then.
    assert sorted(first.states) == ["bottom.h", "context"]
    assert sorted(products(first.ops)) == ["bmm", "bmm", "mm", "mm"]
    assert [(loop.states, products(loop.ops)) for loop in others] == [
        (["middle.h"], ["mm"]),
        (["top.h"], ["mm"]),
    ]


@pytest.mark.parametrize("make", [Stack, NothingFedBack])
def test_ragged_batches_have_the_same_plan(make):
    step, xs = make(), torch.randn(T, B, INPUT)
    full, ragged = plan_of(step, xs), plan_of(step, xs, lengths=torch.tensor([6, 0, 3]))
    assert [loop.ops for loop in full.loops] == [loop.ops for loop in ragged.loops]
    assert (full.before, full.after) == (ragged.before, ragged.after)
