"""Random numbers inside a loop are drawn outside of it: with the right distribution, and with the step's meaning."""

from __future__ import annotations

import devices
import pytest
import torch
import torch.nn.functional as F
from agree import everything
from torch import nn

import steploop as sl

H, T, B = 6, 5, 4
RANDOM = {"rand", "randn", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial", "normal", "uniform",
          "exponential", "native_dropout", "normal_functional"}  # fmt: skip

# A draw from a state h in (0, 1).
DRAWS = {
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "rand_like in float32": lambda h: torch.rand_like(h, dtype=torch.float32).to(h.dtype),
    "randint_like": lambda h: torch.randint_like(h, 1, 4),
    "uniform_": lambda h: torch.empty_like(h).uniform_(-1, 1),
    "normal_": lambda h: torch.zeros_like(h).normal_(1, 2),
    "exponential_": lambda h: torch.empty_like(h).exponential_(2.0),
    "bernoulli_": lambda h: torch.empty_like(h).bernoulli_(0.3),
    "a mask of dropout": lambda h: F.dropout(torch.ones_like(h), 0.3),
    "bernoulli": lambda h: torch.bernoulli(h.detach()),
    "bernoulli_ of a tensor": lambda h: torch.empty_like(h).bernoulli_(h.detach()),
    "normal": lambda h: torch.normal(h.detach(), 0.5),
    "normal of two": lambda h: torch.normal(h.detach(), h.detach() + 1),
    "multinomial": lambda h: F.one_hot(torch.multinomial(h.detach(), 1)[:, 0], H).to(h.dtype),
}


class Drawing(sl.Step):
    """h' = sigmoid(W h + x) * draw(sigmoid(W h + x)); gives back the draw. With `given`, it is replayed."""

    def __init__(self, draw, given=False):
        super().__init__()
        torch.manual_seed(3)
        self.mix = nn.Linear(H, H).double()
        self.h = sl.State(H)
        self.draw, self.given = draw, given

    def step(self, x, drawn=None):
        h = torch.sigmoid(self.mix(self.h.prev) + x)
        drawn = drawn if self.given else self.draw(h)
        self.h.next = h * drawn
        return self.h.next.clone(), drawn


def arguments():
    xs = torch.randn(T, B, H, dtype=torch.float64, requires_grad=True)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[2, 1] = True
    return xs, dict(lengths=torch.tensor([5, 0, 3, 4]), resets=resets)


@pytest.mark.parametrize("name", DRAWS)
def test_nothing_is_drawn_inside_the_loop(name):
    plan = sl.Loop(Drawing(DRAWS[name])).plan(arguments()[0])
    (loop,) = plan.loops
    assert loop.backend == devices.compiled(), loop.reasons
    assert not RANDOM & {op.name for op in loop.ops}


@pytest.mark.parametrize("save", ("states", "all"))
@pytest.mark.parametrize("name", DRAWS)
def test_equals_the_plain_loop_on_the_same_numbers(name, save):
    xs, call = arguments()
    step = Drawing(DRAWS[name])
    drawing = sl.Loop(step, backend=devices.compiled(), save=save)
    found = everything(lambda leaves, rest: drawing(*leaves, **rest), step, (xs,), call)
    replayed = Drawing(None, given=True)
    plain = sl.Loop(replayed, backend="reference")
    numbers = found["result 1"].detach()
    expected = everything(lambda leaves, rest: plain(*leaves, numbers, **rest), replayed, (xs,), call)
    compared = [k for k, v in expected.items() if isinstance(v, torch.Tensor)]
    assert any("grad" in k for k in compared)
    for k in compared:
        torch.testing.assert_close(found[k], expected[k], rtol=1e-9, atol=1e-12, msg=lambda m, k=k: f"{k}: {m}")


MOMENTS = {  # mean and standard deviation of the draw from h = 0.5 everywhere
    "rand_like": (0.5, 12**-0.5), "randn_like": (0, 1), "rand_like in float32": (0.5, 12**-0.5),
    "randint_like": (2, (2 / 3) ** 0.5), "uniform_": (0, 3**-0.5), "normal_": (1, 2), "exponential_": (0.5, 0.5),
    "bernoulli_": (0.3, 0.21**0.5), "a mask of dropout": (1, (0.3 / 0.7) ** 0.5), "bernoulli": (0.5, 0.5),
    "bernoulli_ of a tensor": (0.5, 0.5), "normal": (0.5, 0.5), "normal of two": (0.5, 1.5),
    "multinomial": (1 / H, (1 / H * (1 - 1 / H)) ** 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWS)
def test_distribution(name):
    steps, batch = 40, 200

    def step(h, x):
        drawn = DRAWS[name](torch.sigmoid(0 * h + x))
        return h + drawn, drawn

    _, drawn = sl.scan(step, torch.zeros(batch, H), torch.zeros(steps, batch, H), backend=devices.compiled())
    mean, deviation = MOMENTS[name]
    count = drawn.numel()
    assert abs(drawn.mean() - mean) < 5 * deviation / count**0.5
    assert abs(drawn.std() - deviation) < 0.05 * max(deviation, 1)
    assert (drawn[0] != drawn[1]).any() and (drawn[:, 0] != drawn[:, 1]).any()


def test_probabilities_of_every_state_are_its_own():
    probabilities = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])

    def step(h, x):
        drawn = torch.bernoulli(h)
        return h + 0 * drawn, drawn

    rows = probabilities.expand(4000, 5).contiguous()
    _, drawn = sl.scan(step, rows, torch.zeros(5, 4000, 1), backend=devices.compiled())
    found = drawn.mean((0, 1))
    assert found[0] == 0 and found[-1] == 1
    assert ((found - probabilities).abs() < 0.02).all()


def test_several_draws_without_replacement_are_distinct():
    def step(h, x):
        chosen = torch.multinomial(torch.sigmoid(h), 3)
        return h + x + 0 * chosen.sum(-1, keepdim=True), chosen

    _, chosen = sl.scan(step, torch.zeros(B, H), torch.zeros(T, B, H))
    assert (chosen.sort(-1).values.diff(dim=-1) > 0).all()
    assert chosen.min() >= 0 and chosen.max() < H


@pytest.mark.parametrize("draw", [lambda h: torch.bernoulli(h * 3), lambda h: torch.normal(h, -h)])
def test_what_is_no_probability_gives_nan(draw):
    h = torch.full((B, H), 0.6)
    with torch.no_grad():
        carry, _ = sl.scan(lambda h, x: (draw(h), h), h, torch.zeros(1, B, H), backend=devices.compiled())
    assert carry.isnan().all()


def test_dropout_follows_train_and_eval():
    class Cell(sl.Step):
        def __init__(self):
            super().__init__()
            self.mix, self.h = nn.Linear(H, H), sl.State(H)
            self.drop = nn.Dropout(0.5)

        def step(self, x):
            self.h.next = self.drop(torch.tanh(self.mix(self.h.prev) + x))
            return self.h.next

    cell, xs = Cell(), torch.randn(T, B, H)
    loop, plain = sl.Loop(cell, backend=devices.compiled()), sl.Loop(cell, backend="reference")
    assert 0.3 < (loop(xs)[0] == 0).double().mean() < 0.7
    cell.eval()
    torch.testing.assert_close(loop(xs)[0], plain(xs)[0])
    assert not RANDOM & {op.name for op in loop.plan(xs).before}
    cell.train()
    assert (loop(xs)[0] == 0).any()


FILLS = {
    "uniform_": lambda x: torch.empty(3).uniform_(), "normal_": lambda x: torch.empty(3).normal_(),
    "exponential_": lambda x: torch.empty(3).exponential_(), "geometric_": lambda x: torch.empty(3).geometric_(0.01),
    "cauchy_": lambda x: torch.empty(3).cauchy_(), "log_normal_": lambda x: torch.empty(3).log_normal_(),
    "bernoulli_": lambda x: torch.empty(40).bernoulli_(torch.full((40,), 0.5)),
    "rrelu": lambda x: F.rrelu(torch.full((3,), -1.0), training=True), "rand": lambda x: torch.rand(3),
    "multinomial": lambda x: torch.multinomial(torch.ones(1000), 2).float(),
}  # fmt: skip


@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("name", FILLS)
def test_every_step_draws_anew_without_a_batch(name, backend):
    def step(s, x):
        drawn = FILLS[name](x)
        return s + drawn.sum(), drawn

    total, drawn = sl.scan(step, torch.zeros(()), torch.zeros(20, 3), backend=backend)
    assert len(drawn.unique(dim=0)) == 20
    torch.testing.assert_close(total, drawn.sum())
