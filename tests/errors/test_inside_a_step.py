"""Sizes, dtypes and devices that do not fit inside a step: the message begins with the user's line."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steploop as sl

WEIGHT, WIDE = torch.zeros(5, 4), torch.zeros(4, 4, dtype=torch.float64)
WRONG = {
    "sizes of a product": (lambda x, h: x @ WEIGHT, RuntimeError, "linear|mm|matmul"),
    "sizes of a layer": (lambda x, h: nn.Linear(5, 4)(x), RuntimeError, r"linear\(\(2, 4\) float32, \(4, 5\) float32"),
    "sizes of a sum": (lambda x, h: x + torch.zeros(3), RuntimeError, "size"),
    "an axis": (lambda x, h: x.sum(7), IndexError, r"sum\(\(2, 4\) float32\)"),
    "a view": (lambda x, h: x.view(-1, 7), RuntimeError, "7"),
    "a concatenation": (lambda x, h: torch.cat([x, x[0]], 1), RuntimeError, r"\(2, 4\) float32, \(4,\) float32"),
    "dtypes of a product": (lambda x, h: torch.mm(x, WIDE).float(), RuntimeError, "float != double"),
    "dtypes inside the loop": (lambda x, h: torch.mm(h, WIDE).float(), RuntimeError, "float != double"),
    "a softmax of integers": (lambda x, h: x.long().softmax(-1), RuntimeError, "Long"),
    "a difference of flags": (lambda x, h: (x > 0) - (h > 0), RuntimeError, "bool"),
    "dtypes of a copy": (lambda x, h: h.index_copy(1, torch.arange(4), x.double()), RuntimeError, "Double"),
    "a loss": (lambda x, h: F.nll_loss(x, x.long()), RuntimeError, "nll_loss"),
    "an equation": (lambda x, h: torch.einsum("bij,bj->bi", x, h), RuntimeError, "einsum"),
}


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("what", WRONG)
def test_the_line_comes_first(what, backend):
    body, builtin, text = WRONG[what]

    def fn(h, x):
        return h, body(x, h)

    with pytest.raises(sl.StepError) as caught:
        sl.scan(fn, torch.zeros(2, 4), torch.zeros(3, 2, 4), backend=backend)
    first, message = str(caught.value).splitlines()[0], str(caught.value)
    assert re.match(r"(.*/)?test_inside_a_step.py:\d+: ", first), message
    assert re.search(text, message) and "fix:" in message
    assert isinstance(caught.value, builtin)


def test_what_the_users_code_raises_stays_as_it_is():
    class Own(RuntimeError):
        pass

    def raises(h, x):
        raise Own("mine")

    def misses(h, x):
        return h, {}["missing"]

    for fn, kind in ((raises, Own), (misses, KeyError)):
        with pytest.raises(kind) as caught:
            sl.scan(fn, torch.zeros(2, 4), torch.zeros(3, 2, 4))
        assert not isinstance(caught.value, sl.SteploopError)


@pytest.mark.parametrize(
    "body",
    [
        lambda x, h: x + x.double() * (h > 0),
        lambda x, h: F.embedding(x.long(), WIDE),
        lambda x, h: x.gather(1, h.long()),
        lambda x, h: torch.where(x > 0, x, h.double()),
        lambda x, h: (x > 0) ^ (h > 0),
        lambda x, h: torch.bucketize(x, WIDE[0]),
    ],
)
def test_dtypes_that_torch_takes(body):
    x = torch.zeros(3, 2, 4)
    _, found = sl.scan(lambda h, x: (h, body(x, h)), torch.zeros(2, 4), x)
    _, wanted = sl.scan(lambda h, x: (h, body(x, h)), torch.zeros(2, 4), x, backend="reference")
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)
