"""Steps that can't be captured: each is refused with the line at fault and what to write instead, and what
it would have changed is as it was."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import steploop as sl

HIDDEN, INPUT = 3, 2
XS = torch.randn(4, 5, INPUT)
GENERATOR = np.random.default_rng(0)


class Cell(sl.Step):
    """A tanh cell; `body` is what a test adds to it."""

    def __init__(self):
        super().__init__()
        self.h, self.w = sl.State(HIDDEN), nn.Linear(INPUT + HIDDEN, HIDDEN)
        self.register_buffer("buffer", torch.zeros(HIDDEN))
        self.plain, self.count, self.log, self.known = torch.zeros(HIDDEN), 0, [], {}

    def step(self, x):
        self.h.next = torch.tanh(self.w(torch.cat([x, self.h.prev], -1)))
        return self.body(x, self.h.next)


def state_of(cell):
    values = {n: t.clone() for n, t in cell.state_dict().items()} | {"plain": cell.plain.clone()}
    return values, (cell.count, list(cell.log), dict(cell.known), sorted(vars(cell)))


def refused(body, match, training):
    cell = type("Refused", (Cell,), {"body": body})()
    tensors, rest = state_of(cell)
    with pytest.raises(sl.StepError, match=match) as caught, torch.set_grad_enabled(training):
        sl.Loop(cell, backend="eager")(XS)
    after, rest_after = state_of(cell)
    assert rest_after == rest
    assert all(torch.equal(after[n], t) for n, t in tensors.items())
    return str(caught.value)


@pytest.fixture(params=[True, False], ids=["training", "inference"])
def training(request):
    return request.param


# -- the value of a tensor -----------------------------------------------------------------------------------


def branches(self, x, h):
    if h.sum() > 0:
        return h
    return -h


def repeats(self, x, h):
    while h.abs().max() > 0.5:
        h = h * 0.5
    return h


def takes_an_item(self, x, h):
    return h * h.mean().item()


def reads_a_closed_over_value(self, x, h):
    return h * self.buffer.sum().item()


def branches_on_a_closed_over_value(self, x, h):
    return h * 2 if self.buffer.sum() > 0 else h


def counts(self, x, h):
    for _ in range(int(x[0, 0].abs())):
        h = h + 1
    return h


def to_numpy(self, x, h):
    return h + float(h.detach().numpy().sum())


def to_list(self, x, h):
    return h + torch.tensor(h.tolist())


def checks(self, x, h):
    assert (h < 2).all()
    return h


def has_a_shape_that_depends_on_values(self, x, h):
    return h + h[h > 0].sum()


@pytest.mark.parametrize(
    "body",
    [
        branches, repeats, takes_an_item, reads_a_closed_over_value, branches_on_a_closed_over_value, counts,
        to_numpy, to_list, checks, has_a_shape_that_depends_on_values,
    ],
)  # fmt: skip
def test_the_value_of_a_tensor(body, training):
    text = refused(body, "uses the value of a tensor in Python", training)
    first = body.__code__.co_firstlineno
    assert any(f"test_refusals.py:{line})" in text for line in range(first, first + 4))
    assert "torch.where" in text and "Masked" in text and 'backend="reference"' in text


# -- tensors changed in place --------------------------------------------------------------------------------


def adds_one(self, x, h):
    self.buffer.add_(1)
    return h


def adds_one_by_an_operator(self, x, h):
    buffer = self.buffer
    buffer += 1
    return h


def adds_a_value(self, x, h):
    self.buffer.add_(h.mean(0))
    return h


def copies(self, x, h):
    self.buffer.copy_(h[0].detach())
    return h


def sets_an_item(self, x, h):
    self.buffer[0] = 1.0
    return h


def writes_into_a_view(self, x, h):
    self.buffer[1:].zero_().add_(2)
    return h


def writes_out(self, x, h):
    torch.add(self.buffer, 1, out=self.buffer)
    return h


def swaps_its_data(self, x, h):
    self.buffer.data = torch.ones(HIDDEN)
    return h


def initialises(self, x, h):
    nn.init.ones_(self.buffer)
    return h


def scales_its_weights(self, x, h):
    with torch.no_grad():
        self.w.weight.mul_(2)
    return h


def normalises_in_training(self, x, h):
    return F.batch_norm(h, self.buffer, self.buffer + 1, training=True)


def changes_a_plain_tensor(self, x, h):
    self.plain.sub_(1)
    return h + self.plain


@pytest.mark.parametrize(
    "body",
    [
        adds_one, adds_one_by_an_operator, adds_a_value, copies, sets_an_item, writes_into_a_view, writes_out,
        swaps_its_data, initialises, scales_its_weights, normalises_in_training, changes_a_plain_tensor,
    ],
)  # fmt: skip
def test_a_tensor_changed_in_place(body, training):
    text = refused(body, "changes a tensor in place that is not its own", training)
    assert "test_refusals.py:" in text or body is initialises
    assert "sl.State" in text and "eval mode" in text


def test_a_batch_norm_with_running_statistics_in_training():
    class Normed(Cell):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(HIDDEN)

        def body(self, x, h):
            return self.norm(h)

    cell = Normed()
    with pytest.raises(sl.StepError, match="eval mode"):
        sl.Loop(cell, backend="eager")(XS)
    assert cell.norm.num_batches_tracked == 0 and not cell.norm.running_mean.any()


def test_data_of_a_parameter(training):
    refused(lambda self, x, h: h + self.w.weight.data.sum(), r"write .detach\(\) instead", training)


def test_what_a_step_makes_of_closed_over_tensors_may_be_changed():
    def body(self, x, h):
        scale = self.buffer.clone()
        scale.add_(1)
        return h * scale

    cell = type("Fine", (Cell,), {"body": body})()
    found, expected = (sl.Loop(cell, backend=b)(XS)[0] for b in ("eager", "reference"))
    torch.testing.assert_close(found, expected)
    assert not cell.buffer.any()


# -- Python --------------------------------------------------------------------------------------------------


def counts_calls(self, x, h):
    self.count += 1
    return h


def logs(self, x, h):
    self.log.append(1)
    return h


def logs_tensors(self, x, h):
    self.log.append(h)
    return h


def remembers(self, x, h):
    self.known["h"] = h.detach()
    return h


def sets_a_new_attribute(self, x, h):
    self.last = h
    return h


def replaces_a_buffer(self, x, h):
    self.buffer = self.buffer + 1
    return h + self.buffer


@pytest.mark.parametrize(
    "body", [counts_calls, logs, logs_tensors, remembers, sets_a_new_attribute, replaces_a_buffer]
)
def test_a_python_value_changed(body, training):
    assert "sl.State" in refused(body, "changes a Python value", training)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: random.random(),
        lambda: np.random.rand(),
        lambda: GENERATOR.random(),
        lambda: torch.as_tensor(np.random.randn(HIDDEN)).float(),
        lambda: 1.0 if random.random() < 0.5 else torch.ones(HIDDEN),
    ],
    ids=["Python", "numpy", "a generator", "a numpy array", "a branch"],
)
def test_random_numbers_that_are_not_torchs(draw, training):
    random.seed(1)
    refused(lambda self, x, h: h * draw(), "two runs of the step|is drawn once", training)


def test_a_seed_inside_the_step(training):
    def body(self, x, h):
        torch.manual_seed(1)
        return h * torch.rand(())

    torch.manual_seed(2)
    refused(body, "Seed before the call", training)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_module_inside_the_step(training):
    class Scripted(Cell):
        def __init__(self):
            super().__init__()
            self.inner = torch.jit.script(nn.Linear(HIDDEN, HIDDEN))

        def body(self, x, h):
            return self.inner(h)

    with pytest.raises(sl.StepError, match="TorchScript"), torch.set_grad_enabled(training):
        sl.Loop(Scripted(), backend="eager")(XS)
