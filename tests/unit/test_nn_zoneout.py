"""Zoneout: states kept with probability p in training, mixed in eval mode; what is returned; errors."""

import pytest
import torch
from torch import nn

import steploop as sl

B, H = 40, 30


class Counter(sl.Step):
    """States that make every kept entry visible: a += 1 and b += 10 at every step, n counts in integers."""

    def __init__(self):
        super().__init__()
        self.a = sl.State(H)
        self.b = sl.State(H)
        self.n = sl.State(dtype=torch.int64)

    def step(self, x):
        self.a.next = self.a.prev + 1
        self.b.next = self.b.prev + 10
        self.n.next = self.n.prev + 1
        return self.a.next, {"b": self.b.next}, x


class NamedCell(sl.Step):
    """A cell with one state that takes a constant and returns something else than its state."""

    def __init__(self):
        super().__init__()
        self.h = sl.State(H)

    def step(self, x, bias):
        self.h.next = self.h.prev + x + bias
        return 2 * self.h.next


def run(step, steps=5, **call):
    return sl.Loop(step, backend="reference")(torch.ones(steps, B, H), **call)


def test_in_training_entries_keep_their_value_with_probability_p():
    (a, others, x), state = run(sl.nn.Zoneout(Counter(), {"a": 0.3, "b": 0.8}))
    assert torch.equal(x, torch.ones_like(x))
    for values, p, by in ((a, 0.3, 1), (others["b"], 0.8, 10)):
        steps = torch.diff(values, dim=0, prepend=torch.zeros(1, B, H))
        assert set(steps.unique().tolist()) == {0.0, float(by)}
        kept = (steps == 0).double().mean().item()
        assert abs(kept - p) < 4 * (p * (1 - p) / steps.numel()) ** 0.5
        # fresh at every step, row and feature
        for axis in range(3):
            assert not (steps == steps.select(axis, 0).unsqueeze(axis)).all()
    assert torch.equal(state["cell.a"], a[-1]) and torch.equal(state["cell.b"], others["b"][-1])
    assert (state["cell.n"] == 5).all()


def test_one_number_is_for_all_floating_states():
    (a, others, _), state = run(sl.nn.Zoneout(Counter(), 1.0))
    assert (a == 0).all() and (others["b"] == 0).all() and (state["cell.n"] == 5).all()


def test_states_are_zoned_independently():
    (a, others, _), _ = run(sl.nn.Zoneout(Counter(), 0.5), steps=1)
    assert 0.4 < ((a == 0) == (others["b"] == 0)).double().mean() < 0.6


def test_in_eval_mode_the_expectation():
    zoneout = sl.nn.Zoneout(Counter(), {"a": 0.25}).eval()
    (a, others, _), state = run(zoneout, steps=3)
    assert torch.equal(a[:, 0, 0], torch.tensor([0.75, 1.5, 2.25]))
    assert torch.equal(others["b"][:, 0, 0], torch.tensor([10.0, 20.0, 30.0]))


def test_raw_output_is_what_the_cell_returned():
    zoneout = sl.nn.Zoneout(Counter(), 1.0, output="raw")
    (a, _, _), state = run(zoneout)
    assert (a == 1).all() and (state["cell.a"] == 0).all()


def test_p_zero_is_the_cell_itself():
    cell = sl.nn.LSTMCell(H, H)
    expected, final = run(cell)
    outputs, state = run(sl.nn.Zoneout(cell, 0.0))
    assert torch.equal(outputs, expected)
    assert {n.removeprefix("cell."): v.tolist() for n, v in state.items()} == {
        n: v.tolist() for n, v in final.items()
    }


def test_an_lstms_h_comes_from_its_unzoned_c():
    """Krueger et al. 2017: h_t is computed from the new cell state; zoning c touches the next step only."""
    cell = sl.nn.LSTMCell(H, H)
    expected, _ = run(cell, steps=1)
    outputs, state = run(sl.nn.Zoneout(cell, {"c": 1.0}), steps=1)
    assert torch.equal(outputs, expected) and (state["cell.c"] == 0).all()


def test_nested_in_other_wrappers():
    stack = sl.nn.Stack(
        sl.nn.Zoneout(sl.nn.Stack(sl.nn.LSTMCell(H, H), sl.nn.GRUCell(H, H)), {"0.c": 0.5, "1.h": 0.1}),
        sl.nn.Residual(sl.nn.Zoneout(sl.nn.GRUCell(H, H), 0.2)),
    )
    outputs, state = run(stack)
    assert list(state) == ["0.cell.0.h", "0.cell.0.c", "0.cell.1.h", "1.cell.cell.h"]
    assert torch.isfinite(outputs).all()


def test_zoneout_of_a_zoneout_multiplies():
    zoneout = sl.nn.Zoneout(sl.nn.Zoneout(Counter(), {"a": 0.5}), {"cell.a": 0.5}).eval()
    (a, _, _), _ = run(zoneout, steps=2)
    assert torch.equal(a[:, 0, 0], torch.tensor([0.25, 0.5]))


def test_constants_reach_the_cell():
    zoneout = sl.nn.Zoneout(NamedCell(), 0.0, output="raw")
    outputs, _ = run(zoneout, steps=1, bias=torch.full((B, H), 3.0))
    assert (outputs == 8).all()
    with pytest.raises(sl.SteploopError, match="`biass`"):
        run(sl.nn.Zoneout(Counter(), 0.0), steps=1, biass=torch.zeros(B, H))


def test_gradients_flow_to_prev_and_next():
    class Scale(sl.Step):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.full((H,), 2.0))
            self.h = sl.State(H)

        def step(self, x):
            self.h.next = self.h.prev * self.w + x
            return self.h.next

    zoneout = sl.nn.Zoneout(Scale(), 0.5).eval()
    outputs, _ = run(zoneout, steps=2)
    outputs[-1].sum().backward()
    # h1 = 1/2, h2 = (h1 + h1 w + 1) / 2, and so dh2/dw = h1 / 2
    torch.testing.assert_close(zoneout.cell.w.grad, torch.full((H,), B / 4))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: sl.nn.Zoneout(nn.Linear(3, 3), 0.5), sl.StepError, "wraps a Step"),
        (lambda: sl.nn.Zoneout(Counter(), 1.5), ValueError, r"\[0, 1\], got 1.5"),
        (lambda: sl.nn.Zoneout(Counter(), {"a": -1}), ValueError, r"\[0, 1\], got -1"),
        (lambda: sl.nn.Zoneout(Counter(), {"h": 0.1}), sl.StepError, "'h' that Counter does not have"),
        (lambda: sl.nn.Zoneout(Counter(), 0.1, output="both"), ValueError, '"zoned" or "raw", got \'both\''),
        (lambda: run(sl.nn.Zoneout(Counter(), {"n": 0.5})), sl.StepError, "'n' is torch.int64"),
        (
            lambda: run(sl.nn.Zoneout(NamedCell(), 0.5), bias=torch.zeros(B, H)),
            sl.StepError,
            'NamedCell returns none of its states[^$]*output="raw"',
        ),
    ],
)
def test_wrong_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()
