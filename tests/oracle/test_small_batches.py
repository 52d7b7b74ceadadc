"""No rows, one row, and steps whose batch is not known."""

from __future__ import annotations

import logging

import devices
import pytest
import torch
import torch.nn.functional as F
from agree import agree, agree_scan
from torch import nn

import steploop as sl


class Normed(sl.Step):
    def __init__(self, affine):
        super().__init__()
        self.norm, self.h = nn.BatchNorm1d(4, affine=affine).double().eval(), sl.State(4)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def step(self, x):
        self.h.next = torch.tanh(self.norm(self.h.prev + x))
        return self.norm(x) + self.h.next


@pytest.mark.parametrize("affine", (True, False))
@pytest.mark.parametrize("steps, batch", [(0, 3), (3, 1), (3, 4)])
def test_batch_norm_with_fixed_statistics(steps, batch, affine):
    agree(Normed(affine), torch.randn(steps, batch, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("steps, batch", [(0, 3), (3, 1), (3, 4)])
def test_batch_norm_in_scan(steps, batch):
    norm = Normed(True).norm

    def step(h, x):
        h = torch.tanh(norm(h + x))
        return h, norm(x)

    init = torch.zeros(batch, 4, dtype=torch.float64, requires_grad=True)
    agree_scan(step, init, torch.randn(steps, batch, 4, dtype=torch.float64))


def test_batch_norm_of_sequences_inside_a_step():
    class Inner(Normed):
        def step(self, x):
            return self.norm(x).sum(-1)

    agree(Inner(True), torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("batch", (1, 2))
def test_results_in_parts_go_from_one_piece_to_another(batch):
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def step(carry, x):
        m, n = carry
        gate = F.logsigmoid(x @ weight)  # of two results, of which the backward pass reads one
        m = torch.maximum(m + gate, x[:, :2])
        return (m, torch.exp(gate - m) * n + 1), n

    init = (torch.zeros(batch, 2, dtype=torch.float64), torch.zeros(batch, 2, dtype=torch.float64))
    agree_scan(step, init, torch.randn(4, batch, 3, dtype=torch.float64))


def test_weights_that_are_masked_get_gradients_outside_the_loop():
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def step(h, x):
        h = torch.tanh(h @ weight.triu() + x @ weight.tril())
        return h, h

    xs = torch.randn(4, 2, 3, dtype=torch.float64)
    agree_scan(step, torch.zeros(2, 3, dtype=torch.float64), xs)
    plan = sl.plan(step, torch.zeros(2, 3, dtype=torch.float64), xs)
    assert len(plan.backward.loops) == 1


TABLES = {
    "of inputs": lambda table, x, k, h: table[k],
    "several": lambda table, x, k, h: table[torch.stack([k, (k + 1) % 5], 1)].sum(1),
    "of a state": lambda table, x, k, h: table[h.argmax(-1)],
    "matrices": lambda table, x, k, h: (table.view(5, 3, 1)[k] * x[:, None]).sum(-1),
}


@pytest.mark.parametrize("name", TABLES)
def test_gradients_of_an_indexed_table_leave_the_loop(name):
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def step(h, given):
        x, k = given
        h = torch.tanh(h + x + TABLES[name](table, x, k, h))
        return h, h

    xs = torch.randn(4, 2, 3, dtype=torch.float64), torch.randint(0, 5, (4, 2))
    init = torch.zeros(2, 3, dtype=torch.float64)
    agree_scan(step, init, xs)
    assert len(sl.plan(step, init, xs).backward.loops) == 1


def test_constants_made_from_a_state_are_the_same_at_every_step():
    def step(h, x):
        h = torch.tanh(h * h.new_full((3,), 0.5) + x * torch.ones_like(h[0]) + x.new_zeros(3))
        return h, h.new_ones(2, 3) @ h.unsqueeze(-1)

    xs, init = torch.randn(4, 2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    agree_scan(step, init, xs)
    (loop,) = sl.plan(step, init, xs).loops
    assert loop.backend == devices.compiled(), loop.reasons


def test_writing_columns_by_index():
    places = torch.tensor([2, 0])

    def step(h, x):
        h = torch.tanh(h + x)
        y = h.clone()
        y[:, places] = x[:, :2] * h[:, places]
        return torch.tanh(y), y

    xs = torch.randn(4, 2, 3, dtype=torch.float64)
    agree_scan(step, torch.zeros(2, 3, dtype=torch.float64, requires_grad=True), xs)
    assert sl.plan(step, torch.zeros(2, 3, dtype=torch.float64), xs).loops[0].backend == devices.compiled()


def test_a_loop_over_the_rows_is_not_traced_for_the_rows_of_the_hint():
    """The number of rows is fixed as soon as Python asks for it: a trace for a thousand rows would be thrown away."""
    traced = []
    library = torch.library.Library("rows_of_a_test", "DEF")  # noqa: TOR901
    library.define("halved(Tensor x) -> Tensor")
    library.impl("halved", lambda x: x / 2, "CompositeExplicitAutograd")
    fake = lambda x: traced.append(x) or torch.empty_like(x)
    torch.library.register_fake("rows_of_a_test::halved", fake, lib=library)

    def step(h, x):
        rows = [torch.ops.rows_of_a_test.halved(h[b]) + x[b] for b in range(len(x))]
        return torch.stack(rows), h * 1

    with torch.no_grad():
        for rows in (3, 5, 3):
            xs, h = torch.randn(4, rows, 2), torch.zeros(rows, 2)
            last, _ = sl.scan(step, h, xs)
            for x in xs:
                h = h / 2 + x
            torch.testing.assert_close(last, h)
    assert len(traced) < 100


def test_what_is_only_tried_is_not_logged():
    """A trace that is given up because the step fixes the number of rows is no warning to anybody."""
    told = []

    class Listens(logging.Handler):
        def emit(self, record):
            told.append(record.getMessage())

    log, handler = logging.getLogger("torch.fx.experimental.symbolic_shapes"), Listens(logging.WARNING)
    log.addHandler(handler)
    try:
        xs = torch.randn(4, 3, 2)
        last, _ = sl.scan(lambda h, x: (torch.stack([h[b] + x[b] for b in range(len(x))]), h), torch.zeros(3, 2), xs)
    finally:
        log.removeHandler(handler)
    torch.testing.assert_close(last, xs.sum(0))
    assert not told, told
