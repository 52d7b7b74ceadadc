"""verify must find a wrong backend, and must not find one in a right one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steploop as sl
from steploop import dispatch
from steploop.backends import reference
from steploop.closed_over import trainable


class Cell(sl.Step):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 3)
        self.h = sl.State(3)

    def step(self, x, *, bias=0.0):
        self.h.next = torch.tanh(self.a(torch.cat([x, self.h.prev], -1)) + bias)
        return {"h": self.h.next}


class Spikes(sl.Step):
    def __init__(self):
        super().__init__()
        self.v = sl.State(2)

    def step(self, x):
        v = 0.9 * self.v.prev + x
        spike = (v > 1).to(v.dtype)
        self.v.next = v - spike
        return spike


@pytest.fixture
def backend(monkeypatch):
    """Call it with a function (result, call) -> result: what the optimised way does to the right result."""

    def install(change):
        def run(program, call, backend, save="auto"):
            return change(reference.run(program, call), call)

        monkeypatch.setattr(dispatch, "run", run)

    return install


def right(result, call):
    return result


def test_a_right_backend_passes(backend):
    backend(right)
    given = {"h": torch.randn(4, 3)}
    report = sl.verify(
        sl.Loop(Cell(), reverse=True),
        torch.randn(6, 4, 2),
        lengths=[6, 0, 3, 2],
        resets=torch.rand(6, 4) < 0.3,
        state=given,
        bias=torch.randn(4, 3),
    )
    assert report.ok and not report.step_by_step and not report.notes
    names = {f"{d.kind} {d.name}" for d in report.differences}
    assert {"output outputs['h']", "state h", "gradient xs", "gradient state['h']", "gradient bias"} <= names
    assert "gradient step.a.weight" in names
    assert "agree" in str(report) and "step.a.weight" in str(report)


def test_a_wrong_output_is_found_and_named(backend):
    def wrong(result, call):
        result.outputs[0] = result.outputs[0].index_put(
            (torch.tensor(3), torch.tensor(1), torch.tensor(2)), torch.tensor(7.0)
        )
        return result

    backend(wrong)
    with pytest.raises(sl.MismatchError, match=r"outputs\['h'\] at step 3, row 1, entry \[2\]") as error:
        sl.verify(Cell(), torch.randn(6, 4, 2))
    assert "7.0 (auto)" in str(error.value) and "(reference)" in str(error.value)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


def test_a_wrong_gradient_is_found(backend):
    def wrong(result, call):
        result.outputs = [_WrongGradient.apply(o) for o in result.outputs]
        return result

    backend(wrong)
    with pytest.raises(sl.MismatchError, match="gradient"):
        sl.verify(sl.Loop(Cell()), torch.randn(6, 4, 2))
    with torch.no_grad():  # forward only
        report = sl.verify(sl.Loop(Cell()), torch.randn(6, 4, 2))
    assert "forward only" in str(report)


def test_a_wrong_shape_or_a_new_nan_is_found(backend):
    backend(
        lambda result, call: type(result)([o[:-1] for o in result.outputs], result.states, result.out_spec)
    )
    with pytest.raises(sl.MismatchError, match="optimised .5, 4, 3."):
        sl.verify(Cell(), torch.randn(6, 4, 2))
    backend(
        lambda result, call: type(result)([o / 0 for o in result.outputs], result.states, result.out_spec)
    )
    with pytest.raises(sl.MismatchError, match="inf|nan"):
        sl.verify(Cell(), torch.randn(6, 4, 2))


def test_functions_for_scan(backend):
    backend(right)
    w = torch.randn(3, 3, requires_grad=True)
    linear = nn.Linear(3, 3)
    report = sl.verify(
        lambda c, x: (torch.tanh(c @ w + linear(x)), c), torch.zeros(2, 3), torch.randn(5, 2, 3), reverse=True
    )
    names = {d.name for d in report.differences if d.kind == "gradient"}
    assert names == {"init", "xs", "w", "linear.weight", "linear.bias"}


def test_discrete_steps_are_compared_from_the_references_state(backend):
    def rounded(result, call):
        # a rounding error that a long run turns into other spikes, and a single step does not
        if call.steps > 1:
            result.outputs = [1 - o for o in result.outputs]
        return result

    backend(rounded)
    report = sl.verify(Spikes(), torch.rand(20, 4, 2))
    assert report.ok and report.step_by_step and "step by step" in str(report)
    with pytest.raises(sl.MismatchError):
        sl.verify(Cell(), torch.randn(20, 4, 2))  # nothing discrete: no excuse


def test_a_wrong_discrete_step_is_found(backend):
    backend(
        lambda result, call: type(result)([1 - o for o in result.outputs], result.states, result.out_spec)
    )
    with pytest.raises(sl.MismatchError, match="step by step"):
        sl.verify(Spikes(), torch.rand(20, 4, 2))


class Noisy(sl.Step):
    """A state of as many features as there are rows in the tests, and a draw of it."""

    def __init__(self, draw):
        super().__init__()
        self.mix, self.h = nn.Linear(4, 4), sl.State(4)
        self.draw = draw

    def step(self, x):
        self.h.next = torch.tanh(self.mix(self.h.prev) + x) + self.draw(self.h.prev)
        return self.h.next


DRAWS = {
    "rand_like": torch.rand_like,
    "rand": lambda h: torch.rand(h.shape),
    "turned": lambda h: torch.rand(h.shape[::-1]).t(),
    "dropout": lambda h: F.dropout(h, 0.5),
    "bernoulli": lambda h: torch.bernoulli(torch.sigmoid(h)),
    "bernoulli_": lambda h: torch.empty_like(h).bernoulli_(),
    "normal": lambda h: torch.normal(h.detach(), h.detach().abs()),
    "normal_": lambda h: torch.empty_like(h).normal_(1, 2),
    "multinomial": lambda h: torch.multinomial(h.softmax(-1), 1).to(h.dtype),
    "geometric_": lambda h: torch.empty_like(h).geometric_(0.5),
    "one number for each row": lambda h: torch.rand(h.shape[0], 1),
}
GIVEN, NOT_GIVEN = "both ways were given the same ones", "only shapes, dtypes and finiteness were compared"


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_the_same_both_ways(name):
    call = dict(lengths=[6, 0, 3, 2], resets=torch.rand(6, 4) < 0.3)
    report = sl.verify(Noisy(DRAWS[name]), torch.randn(6, 4, 4), **call)
    assert report.ok and GIVEN in str(report)


@pytest.mark.parametrize("name", DRAWS)
def test_a_wrong_random_step_is_found(backend, name):
    def wrong(result, call):
        return type(result)([1.01 * o for o in result.outputs], result.states, result.out_spec)

    backend(wrong)
    with pytest.raises(sl.MismatchError, match="outputs"):
        sl.verify(Noisy(DRAWS[name]), torch.randn(6, 4, 4))


@pytest.mark.parametrize(
    "draw",
    [
        lambda h: torch.poisson(h.abs()),
        lambda h: F.dropout(h.view(-1, 2)).view(h.shape),  # rows in groups
        lambda h: torch.rand(4),  # the same for all rows
    ],
)
def test_random_numbers_that_are_no_inputs_leave_shapes_only(draw):
    report = sl.verify(Noisy(draw), torch.randn(6, 4, 4))
    assert report.ok and NOT_GIVEN in str(report)


def test_random_numbers_without_a_batch_are_the_same_both_ways():
    def step(h, x):
        h = torch.tanh(h + x) * torch.rand(3)
        return h, h + torch.randn_like(h)

    report = sl.verify(step, torch.zeros(3), torch.randn(5, 3))
    assert report.ok and GIVEN in str(report)
    assert NOT_GIVEN in str(sl.verify(step, torch.zeros(3), torch.randn(0, 3)))  # draws only for the shapes


def test_the_callers_data_and_buffers_are_left_alone(backend):
    backend(right)

    class Normed(sl.Step):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def step(self, x):
            return self.norm(x)

    step, xs = Normed(), torch.randn(5, 4, 2)
    report = sl.verify(step, xs)
    assert report.ok and any(d.kind == "buffer" for d in report.differences)
    assert step.norm.num_batches_tracked == 0 and torch.equal(step.norm.running_mean, torch.zeros(2))
    assert not xs.requires_grad and all(p.grad is None for p in step.parameters())


def test_packed_sequences(backend):
    backend(right)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 2), [2, 5, 3], enforce_sorted=False)
    assert sl.verify(Cell(), packed).ok


def test_closed_over_tensors_are_found_wherever_python_shows_them():
    a, b, c = (torch.zeros(1, requires_grad=True) for _ in range(3))
    linear = nn.Linear(1, 1)

    class Holder:
        def __init__(self):
            self.deep = {"c": [c]}

        def fn(self, carry, x, k=b):
            return carry + inner(x), None

    def inner(x):
        return linear(x) + a

    found = {id(tensor) for _, tensor in trainable(Holder().fn)}
    assert found >= {id(b), id(c)}
    assert {id(tensor) for _, tensor in trainable(inner)} == {id(a), id(linear.weight), id(linear.bias)}


class Precise(sl.Step):
    """Sums in float64 what it computes in float32."""

    def __init__(self, discrete=False):
        super().__init__()
        self.linear, self.h, self.discrete = nn.Linear(3, 3), sl.State(3), discrete
        self.total = sl.State(3, dtype=torch.float64)

    def step(self, x):
        self.h.next = torch.tanh(self.linear(self.h.prev) + x)
        self.total.next = self.total.prev + self.h.next.double()
        return self.total.next.argmax(-1) if self.discrete else self.total.next


@pytest.mark.parametrize("discrete", [False, True])
def test_float64_that_is_computed_of_float32_has_its_precision(discrete):
    report = sl.verify(Precise(discrete), torch.randn(40, 3, 3))
    assert report.ok
    assert {d.tolerance for d in report.differences if d.kind == "state"} == {1e-5}
    xs = torch.randn(40, 3, 3, dtype=torch.float64)
    assert {d.tolerance for d in sl.verify(Cell().double(), xs[..., :2]).differences} == {1e-9}
