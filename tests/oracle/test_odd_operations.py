"""Operations with which torch's own transforms, tracer or kernels have trouble: values and gradients.

At sizes one after the other, outside the recurrence and in it, with other weights of the outputs at every step.
"""

from __future__ import annotations

import pytest
import torch
from torch import distributions as D

import steploop as sl

F64 = torch.float64
PLACES, TABLE = torch.tensor([1, 0]), torch.full((4,), 0.1)


def quantised(x):
    return torch.fake_quantize_per_tensor_affine(x, torch.tensor(0.1), torch.tensor(2, dtype=torch.int32), -128, 127)


def quantised_by_channel(x):
    return torch.fake_quantize_per_channel_affine(x, TABLE, torch.tensor([0, 1, 2, 3]).int(), 1, -128, 127)


def written(x, what, index):
    new = x.clone()
    if what == "multiplied":
        new[index] *= 2
    else:
        new[index] += x.mean()
    return new


# Functions of a matrix (4, 4).
OF_MATRICES = {
    "trace": lambda x: x.trace() * x,
    "torch.trace": lambda x: torch.trace(x * x),
    "index_fill": lambda x: x.index_fill(0, PLACES, x.sum()),
    "index_fill a column": lambda x: x.index_fill(-1, PLACES, x[0, 0]),
    "index_fill_": lambda x: (x * 2).index_fill_(1, PLACES, x.mean()),
    "index_fill with a number": lambda x: x.index_fill(1, PLACES, 2.0),
    "cov": lambda x: torch.cov(x),
    "cov of a row": lambda x: torch.cov(x[0], correction=0),
    "corrcoef": lambda x: torch.corrcoef(x),
    "end of the first axis": lambda x: written(x, "multiplied", slice(2, None)),
    "last two": lambda x: written(x, "multiplied", slice(-2, None)),
    "every second": lambda x: written(x, "added", slice(1, None, 2)),
    "a corner": lambda x: written(x, "added", (slice(1, None), slice(2, None))),
    "first axis from the front": lambda x: written(x, "multiplied", slice(None, 3)),
    "roll": lambda x: x.roll(3),
    "roll back": lambda x: x.roll(-1),
    "bucketize": lambda x: x + torch.bucketize(x.sum(), x[0].sort()[0]),
    "median": lambda x: x.sum().median(0, keepdim=True)[0] * x,
    "max_pool3d": lambda x: torch.nn.functional.adaptive_max_pool3d(x.view(1, 1, 4, 2, 2), (2, 1, 2)).flatten(),
    "tensorinv": lambda x: torch.linalg.tensorinv((x + 5 * torch.eye(4)).view(2, 2, 4), ind=2).flatten(),
    "tensorsolve": lambda x: torch.linalg.tensorsolve((x + 5 * torch.eye(4)).view(2, 2, 4), x[:2, :2]),
    "tensorsolve, turned": lambda x: torch.linalg.tensorsolve(
        (x + 5 * torch.eye(4)).view(2, 4, 2), x[:2, :2], dims=(1,)
    ),
    "max_pool1d": lambda x: torch.nn.functional.adaptive_max_pool1d(x, 3),
}


def loss_of(outputs, final):
    """Each number with a weight of its own: equal ones would hide what a gradient reads of another step."""
    total = 0.0
    for value in (outputs, final):
        total = total + (value * torch.linspace(0.5, 2.0, value.numel(), dtype=F64).view(value.shape)).sum()
    return total


def results(function, xs, backend, **options):
    leaves = [x.clone().requires_grad_() for x in xs]
    final, outputs = sl.scan(function, *leaves, backend=backend, **options)
    return [outputs, final, *torch.autograd.grad(loss_of(outputs, final), leaves)]


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("name", list(OF_MATRICES))
def test_of_a_matrix(name, where):
    operation = OF_MATRICES[name]

    def step(carry, x):
        y = operation(x if where == "outside" else x + 0.1 * carry)
        return torch.tanh(0.5 * carry + y.mean()), y

    for steps in (3, 1, 5):
        xs = torch.randn(4, 4, dtype=F64), torch.randn(steps, 4, 4, dtype=F64)
        for backend in ("eager", "auto"):
            for found, wanted in zip(results(step, xs, backend), results(step, xs, "reference"), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


OF_ROWS = {
    "fake_quantize": quantised, "fake_quantize by channel": quantised_by_channel,
    "written at the end": lambda x: written(x, "multiplied", (slice(None), slice(2, None))),
    "index_fill": lambda x: x.index_fill(1, PLACES, 0.5), "len": lambda x: x + torch.zeros(len(x), 1),
    "the first row": lambda x: x + x[0:1].sum(0, keepdim=True).expand(len(x), 4),
    "aminmax and sgn": lambda x: sum(torch.aminmax(x, dim=1, keepdim=True)) + x.sgn(),
    "an average over rows": lambda x: x - x.sum(0, keepdim=True) / x.shape[0],
}  # fmt: skip
ALWAYS_ALL_ROWS = {"an average over rows"}  # it computes with the number of rows


class Cell(sl.Step):
    def __init__(self, operation):
        super().__init__()
        self.operation, self.h = operation, sl.State(4)

    def step(self, x):
        self.h.next = torch.tanh(self.operation(x + 0.5 * self.h.prev))
        return self.h.next * 2


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("name", list(OF_ROWS))
def test_of_rows(name, backend):
    loop = sl.Loop(Cell(OF_ROWS[name]), backend=backend)
    for batch in (2, 4, 1, 3):
        x = torch.randn(5, batch, 4, requires_grad=True)
        mask = torch.rand(5, batch) < 0.6
        mask[2] = False  # no row takes this step
        sl.verify(loop, x)
        if name not in ALWAYS_ALL_ROWS:
            sl.verify(loop, x, lengths=torch.randint(0, 6, (batch,)))
            sl.verify(loop, x, mask=mask, resets=torch.rand(5, batch) < 0.3)


DRAWN = {
    "Gamma": lambda a: D.Gamma(a, a),
    "Chi2": D.Chi2,
    "StudentT": D.StudentT,
    "InverseGamma": lambda a: D.InverseGamma(a, a),
    "FisherSnedecor": lambda a: D.FisherSnedecor(a, a),
    "Beta": lambda a: D.Beta(a, a),
    "Dirichlet": D.Dirichlet,
    "Normal": lambda a: D.Normal(a, a),
    "Laplace": lambda a: D.Laplace(a, a),
    "Gumbel": lambda a: D.Gumbel(a, a),
    "Weibull": lambda a: D.Weibull(a, a),
    "Pareto": lambda a: D.Pareto(a, a),
    "Kumaraswamy": lambda a: D.Kumaraswamy(a, a),
}


@pytest.mark.parametrize("name", list(DRAWN))
def test_draws_have_gradients(name):
    """One step alone draws what torch draws, and its gradient is torch's."""
    made = DRAWN[name]
    x = torch.rand(1, 3, 4) + 0.5
    found = []
    for backend in ("reference", "auto"):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        _, ys = sl.scan(lambda h, x: (h, made(x).rsample()), torch.zeros(3, 4), leaf, backend=backend)
        found.append((ys.detach(), *torch.autograd.grad((ys * torch.arange(12.0).view(1, 3, 4)).sum(), leaf)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("largest", [torch.amax, lambda x, dim, keepdim: x.max(dim, keepdim)[0]])
def test_steps_that_no_row_takes(largest, backend):
    """Some operations take no rows at all; such a step does not run."""
    mask = torch.tensor([[True, True], [False, False], [True, False]])

    def step(h, x):
        return h * 0.5 + x, largest(h, 0, True).expand_as(x)

    xs = torch.randn(2, 4, dtype=F64), torch.randn(3, 2, 4, dtype=F64)
    for found, wanted in zip(
        results(step, xs, backend, mask=mask), results(step, xs, "reference", mask=mask), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def by_hand(h, x):
    total = 0
    for row in h:
        total = total + row
    return 0.3 * h + 0.5 * x + 0.1 * total, h


def apart(h, x):
    return torch.stack([0.3 * a + 0.5 * b for a, b in zip(h, x, strict=True)]), h


def test_rows_that_see_each_other_in_a_step_for_one_number_of_rows():
    """No analysis can follow the rows of such a step: it is tried with numbers."""
    h, x = torch.randn(3, 4), torch.randn(4, 3, 4)
    everything, some = torch.ones(4, 3, dtype=torch.bool), torch.tensor([[True, True, False]] * 4)
    for step, mask in ((apart, everything), (apart, some), (by_hand, everything)):
        for backend in ("eager", "auto"):
            found, wanted = (sl.scan(step, h, x, mask=mask, backend=b)[0] for b in (backend, "reference"))
            torch.testing.assert_close(found, wanted)
    with pytest.raises(sl.UnsupportedError, match="fixes the number of rows, and its rows see each other"):
        sl.scan(by_hand, h, x, mask=some)


class Switched(sl.Step):
    """For one number of rows; whether they see each other can be changed."""

    def __init__(self):
        super().__init__()
        self.mixes, self.h = False, sl.State(4)

    def step(self, x):
        self.h.next = (by_hand if self.mixes else apart)(self.h.prev, x)[0]
        return self.h.next


def test_whether_rows_see_each_other_follows_the_step():
    loop = sl.Loop(Switched())
    lengths = torch.tensor([4, 2, 3])
    for mixes in (False, True, False, True):
        loop.step.mixes = mixes
        for batch in (3, 1, 3):
            x = torch.randn(4, batch, 4, requires_grad=True)
            sl.verify(loop, x)
            if mixes and batch > 1:
                with pytest.raises(sl.UnsupportedError, match="its rows see each other"):
                    loop(x, lengths=lengths)
            else:
                sl.verify(loop, x, lengths=lengths[:batch])


def test_a_step_that_traces_a_function_itself():
    def step(h, x):
        return torch.tanh(torch.func.linearize(torch.tanh, h)[1](x)), h

    with pytest.raises(sl.StepError, match="traces a function itself"):
        sl.scan(step, torch.zeros(3, 4), torch.randn(5, 3, 4))


def test_the_line_of_a_gradient_that_cannot_be_traced():
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * float(x.sum())

    def step(h, x):
        return torch.tanh(Odd.apply(h) + x), h  # this line

    with pytest.raises(sl.StepError, match="test_odd_operations.py"):
        sl.scan(step, torch.zeros(3, 4, requires_grad=True), torch.randn(5, 3, 4))


class Meets(sl.Step):
    """A memory and a State that the step may leave alone."""

    def __init__(self):
        super().__init__()
        self.use, self.history, self.h, self.u = False, sl.memory.History(), sl.State(2), sl.State(...)

    def step(self, x):
        if self.use:
            self.history(x)
            self.u.next = self.u.sized(3, like=x) + x.sum(1, keepdim=True)
        self.h.next = self.h.prev + x
        return self.h.next


@pytest.mark.parametrize("backend", ["reference", "eager", "auto"])
def test_states_that_no_step_of_a_call_meets(backend):
    loop, plain = (sl.Loop(Meets(), backend=b) for b in (backend, "reference"))
    state = other = None
    for use in (False, False, True, True, False, True):
        loop.step.use = plain.step.use = use
        x, resets = torch.randn(3, 2, 2), torch.rand(3, 2) < 0.2
        _, state = loop(x, state=state, resets=resets)
        _, other = plain(x, state=other, resets=resets)
        assert {n: v.shape for n, v in state.items()} == {n: v.shape for n, v in other.items()}
        for name, value in state.items():
            torch.testing.assert_close(value, other[name])
