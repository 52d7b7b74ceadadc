"""Weights that torch.nn.utils computes anew before every use: pruned, of a given norm, orthogonal."""

from __future__ import annotations

import pytest
import torch
from agree import agree
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import steploop as sl


class Cell(sl.Step):
    def __init__(self):
        super().__init__()
        self.w, self.h = nn.Linear(4, 4), sl.State(4)

    def step(self, x):
        self.h.next = torch.tanh(self.w(x) + self.w(self.h.prev))
        return self.h.next


def _spectral_in_eval(linear: nn.Linear) -> None:
    nn.utils.spectral_norm(linear)
    linear.eval()


WAYS = {
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": _spectral_in_eval,
    "weight_norm, parametrised": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("way", WAYS)
def test_it_is_what_the_plain_loop_has(way, backend):
    cell = Cell()
    WAYS[way](cell.w)
    for steps, batch in ((5, 4), (5, 1), (1, 2), (3, 7)):
        agree(cell, torch.randn(steps, batch, 4, requires_grad=True), backend=backend)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.mul_(0.5)
    agree(cell, torch.randn(5, 4, 4), backend=backend)
    assert type(cell.w.weight) in (Tensor, nn.Parameter)  # nothing of a tracer's is left there
    assert cell.w(torch.randn(2, 4)).shape == (2, 4)


def test_pruned_in_a_stream():
    cell = Cell()
    prune.l1_unstructured(cell.w, "weight", 0.5)
    stream, plain = sl.Loop(cell).stream(2), sl.Loop(cell, backend="reference").stream(2)
    with torch.no_grad():
        for step in range(6):
            if step == 3:
                prune.l1_unstructured(cell.w, "weight", 0.5)
            x = torch.randn(2, 4)
            torch.testing.assert_close(stream(x), plain(x))
