"""The stages of the compiler one by one: simplify, the batch axis, components."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import steploop as sl
from steploop.compiler import capture_store
from steploop.compiler.ir.graph import Rows, op_name
from steploop.compiler.partition import components
from steploop.compiler.passes.manager import mixing_reasons

B, SIZE = 3, 4


def graph_of(body, **constants):
    """The simplified graph of a step `y = body(cell, x, h, **constants)`."""

    class Step(sl.Step):
        def __init__(self):
            super().__init__()
            self.h = sl.State(SIZE)
            self.w, self.v = nn.Linear(SIZE, SIZE), nn.Linear(2 * SIZE, SIZE)
            self.norm, self.bn = nn.LayerNorm(SIZE), nn.BatchNorm1d(SIZE).eval()
            self.conv = nn.Conv1d(1, 2, 3)

        def step(self, x, **given):
            self.h.next = self.h.prev + x
            return body(self, x, self.h.prev, **given)

    prepared = sl.Loop(Step(), backend="eager").prepare(torch.randn(2, B, SIZE), **constants)
    capture, _ = capture_store.find(prepared.program, prepared.call)
    return capture.forward.graph


def names(step):
    return [op_name(n) for n in step.graph.nodes if n.op == "call_function"]


# -- simplify ------------------------------------------------------------------------------------------------


def test_what_nobody_needs_is_gone():
    assert "sin" not in names(graph_of(lambda s, x, h: (x.sin(), x + 1)[1]))


def test_common_subexpressions_are_computed_once():
    assert names(graph_of(lambda s, x, h: x.sin() + (x.sin() * h))).count("sin") == 1


def test_random_numbers_are_never_common():
    assert names(graph_of(lambda s, x, h: torch.rand_like(x) + torch.rand_like(x))).count("rand_like") == 2


@pytest.mark.parametrize(
    "nothing",
    [
        lambda x: x.clone(),
        lambda x: x.contiguous().detach(),
        lambda x: x.to(x.dtype),
        lambda x: x[:, 0:],
        lambda x: x.view(x.shape),
        lambda x: x.t().t(),
        lambda x: x.expand(x.shape),
    ],
)
def test_operations_that_change_nothing_are_gone(nothing):
    assert names(graph_of(lambda s, x, h: nothing(x).sin())) in (["add", "sin"], ["sin", "add"])


def test_a_linear_layer_is_a_product_and_a_sum():
    found = names(graph_of(lambda s, x, h: s.w(h)))
    assert found.count("mm") == 1 and "addmm" not in found and "linear" not in found


# -- the batch axis ------------------------------------------------------------------------------------------


def rows_of(body, **constants):
    """Where the batch axis of what a body returns is, or why it has none."""
    step = graph_of(body, **constants)
    mixing = mixing_reasons(step)
    node = step.outputs[0]
    return mixing[node] if node in mixing else node.meta["rows"]


@pytest.mark.parametrize(
    "body",
    [
        lambda s, x, h: torch.tanh(x) * h + 1,
        lambda s, x, h: s.w(x),
        lambda s, x, h: s.norm(x),
        lambda s, x, h: s.bn(x),
        lambda s, x, h: s.conv(x[:, None]),
        lambda s, x, h: torch.cat([x, h], 1),
        lambda s, x, h: torch.softmax(x, 1),
        lambda s, x, h: x.sum(1),
        lambda s, x, h: x.t().sum(0),
        lambda s, x, h: x.sort(1).values,
        lambda s, x, h: x.view(-1, 2, 2).transpose(1, 2).flatten(1),
        lambda s, x, h: x[:, None] @ h[:, :, None],
        lambda s, x, h: torch.einsum("bi,bj->bij", x, h),
        lambda s, x, h: x.gather(1, h.argmax(1, keepdim=True)),
        lambda s, x, h: s.w.weight[h.argmax(1)],
        lambda s, x, h: F.embedding(h.argmax(1), s.w.weight),
        lambda s, x, h: F.one_hot(h.argmax(1), SIZE),
        lambda s, x, h: F.dropout(x, 0.5),
        lambda s, x, h: torch.linalg.inv(x[:, :, None] * h[:, None] + torch.eye(SIZE)),
        lambda s, x, h: x.repeat(1, 2),
        lambda s, x, h: F.pad(x, (1, 1)),
        lambda s, x, h: x.flip(1).cumsum(1),
        lambda s, x, h: torch.zeros(x.shape[0], 2),
    ],
)
def test_rows_that_stay_apart(body):
    assert rows_of(body) == Rows(0)


def test_rows_inside_a_larger_axis():
    assert rows_of(lambda s, x, h: s.conv(x.reshape(-1, 1, SIZE)).reshape(x.shape[0], 4)) == Rows(0)
    heads = graph_of(lambda s, x, h: torch.bmm(x.view(-1, 2, 1), h.view(-1, 1, 2)).view(x.shape[0], 8))
    assert not mixing_reasons(heads)
    assert Rows(0, 1, 2) in [n.meta["rows"] for n in heads.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda s, x, h: x - x.mean(0), "reduces over the rows"),
        (lambda s, x, h: x + x.sum(0), "sums over the rows"),
        (lambda s, x, h: x.flip(0), "along the rows"),
        (lambda s, x, h: x @ (x.t() @ h), "sums over the rows"),
        (lambda s, x, h: (x @ h.t()).sum(1), "every row with every other"),
        (lambda s, x, h: torch.cat([x[1:], x[:1]]), "slices the batch"),
        (lambda s, x, h: x[0].expand_as(x), "selects a row"),
        (lambda s, x, h: x / x.shape[0], "batch size"),
        (lambda s, x, h: x + torch.arange(x.shape[0])[:, None], "numbers the rows"),
        (lambda s, x, h: x.softmax(0), "along the rows"),
        (lambda s, x, h: x.cumsum(0), "along the rows"),
        (lambda s, x, h: F.batch_norm(x, None, None, training=True), "no rule"),
    ],
)
def test_rows_that_influence_each_other(body, reason):
    mixing = mixing_reasons(graph_of(body))
    assert any(reason in text for text in mixing.values()), mixing


# -- components ----------------------------------------------------------------------------------------------


def test_components_come_in_reverse_order():
    successors = {1: [2], 2: [3], 3: [1, 4], 4: [5], 5: [6], 6: [5], 7: [7]}
    found = [sorted(c) for c in components(range(1, 8), successors)]
    assert found == [[5, 6], [4], [1, 2, 3], [7]]


def test_components_of_a_long_chain_need_no_recursion():
    count = 20_000
    assert len(components(range(count), {i: [i + 1] for i in range(count - 1)})) == count
