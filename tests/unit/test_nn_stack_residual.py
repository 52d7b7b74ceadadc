"""Stack and Residual: names, order, constants, ordinary modules as layers, errors."""

import copy

import pytest
import torch
from torch import nn

import steploop as sl

B = 3


class Gate(sl.Step):
    """x * gate + h, with a per-step gate and a constant `bias`."""

    def __init__(self, size):
        super().__init__()
        self.h = sl.State(size)

    def step(self, x, gate, bias=None):
        self.h.next = x * gate + self.h.prev + (0 if bias is None else bias)
        return self.h.next


class Starts(sl.Step):
    """A cell that takes its constant in begin only."""

    def __init__(self, size):
        super().__init__()
        self.h = sl.State(size)

    def begin(self, start):
        self.h.prev = start

    def step(self, x):
        self.h.next = self.h.prev + x
        return self.h.next


def run(step, *xs, **call):
    return sl.Loop(step, backend="reference")(*xs, **call)


class TestStack:
    def test_names_of_children_states_and_parameters(self):
        stack = sl.nn.Stack(sl.nn.LSTMCell(4, 5), nn.Linear(5, 6), sl.nn.GRUCell(6, 7))
        assert [n for n, _ in stack.named_children()] == ["0", "1", "2"]
        outputs, state = run(stack, torch.zeros(2, B, 4))
        assert list(state) == ["0.h", "0.c", "2.h"] and outputs.shape == (2, B, 7)
        assert "1.weight" in stack.state_dict() and "2.weight_ih" in stack.state_dict()

    def test_is_a_sequence_of_layers(self):
        cells = [sl.nn.GRUCell(4, 4) for _ in range(3)]
        stack = sl.nn.Stack(*cells)
        assert len(stack) == 3 and list(stack) == cells and stack[0] is cells[0] and stack[-1] is cells[2]

    def test_is_one_loop_after_the_other(self):
        a, b = sl.nn.LSTMCell(4, 5), sl.nn.GRUCell(5, 6)
        x = torch.randn(5, B, 4)
        middle, _ = run(a, x)
        expected, _ = run(b, middle)
        assert torch.equal(run(sl.nn.Stack(a, b), x)[0], expected)

    def test_called_alone_it_runs_the_sequence(self):
        stack = sl.nn.Stack(sl.nn.GRUCell(4, 4))
        x = torch.randn(5, B, 4)
        torch.testing.assert_close(stack(x)[0], run(stack, x)[0])

    def test_the_first_layer_takes_all_sequences(self):
        x, gate = torch.randn(5, B, 4), torch.rand(5, B, 4)
        outputs, _ = run(sl.nn.Stack(Gate(4), nn.Tanh()), x, gate)
        torch.testing.assert_close(outputs, (x * gate).cumsum(0).tanh())

    def test_constants_go_to_the_layers_that_name_them(self):
        class Scale(sl.Step):
            def step(self, x, scale):
                return x * scale

        x, scale, start = torch.randn(5, B, 4), torch.randn(B, 4), torch.randn(B, 4)
        outputs, _ = run(sl.nn.Stack(Scale(), Starts(4), Scale()), x, scale=scale, start=start)
        torch.testing.assert_close(outputs, ((x * scale).cumsum(0) + start) * scale)

    def test_a_constant_that_nothing_takes(self):
        with pytest.raises(sl.SteploopError, match="no cell in it takes: `sclae`"):
            run(sl.nn.Stack(sl.nn.GRUCell(4, 4)), torch.zeros(2, B, 4), sclae=torch.zeros(B, 4))

    def test_the_same_cell_twice_says_how_to_share(self):
        cell = sl.nn.GRUCell(4, 4)
        with pytest.raises(sl.StepError, match="sl.share"):
            run(sl.nn.Stack(cell, cell), torch.zeros(2, B, 4))

    def test_shared_weights_keep_their_own_states(self):
        cell = sl.nn.GRUCell(4, 4)
        x = torch.randn(5, B, 4)
        outputs, state = run(sl.nn.Stack(cell, sl.share(cell)), x)
        expected, _ = run(sl.nn.Stack(cell, copy.deepcopy(cell)), x)
        assert list(state) == ["0.h", "1.h"] and torch.equal(outputs, expected)

    def test_wrong_arguments(self):
        with pytest.raises(sl.StepError, match="no cells"):
            sl.nn.Stack()
        with pytest.raises(sl.StepError, match=r"layer 0 is not a module[^$]*Stack\(\*cells\)"):
            sl.nn.Stack([sl.nn.GRUCell(4, 4)])


class TestResidual:
    def test_adds_the_input(self):
        cell = sl.nn.GRUCell(4, 4)
        x = torch.randn(5, B, 4)
        outputs, state = run(sl.nn.Residual(cell), x)
        torch.testing.assert_close(outputs, x + run(cell, x)[0])
        assert list(state) == ["cell.h"]

    def test_of_an_ordinary_module(self):
        linear = nn.Linear(4, 4)
        x = torch.randn(5, B, 4)
        torch.testing.assert_close(run(sl.nn.Residual(linear), x)[0], x + linear(x))

    def test_constants_reach_the_cell_and_its_begin(self):
        x, start = torch.randn(5, B, 4), torch.randn(B, 4)
        outputs, _ = run(sl.nn.Residual(sl.nn.Residual(Starts(4))), x, start=start)
        torch.testing.assert_close(outputs, 2 * x + x.cumsum(0) + start)

    @pytest.mark.parametrize("hidden", [1, 5])
    def test_shapes_that_differ_are_named_both(self, hidden):
        """A hidden size of 1 would broadcast; that is an error too."""
        with pytest.raises(sl.StepError, match=rf"x: \(B, 4\)[^$]*GRUCell: \(B, {hidden}\)[^$]*nn.Linear"):
            run(sl.nn.Residual(sl.nn.GRUCell(4, hidden)), torch.zeros(2, B, 4))

    def test_a_cell_that_returns_no_tensor(self):
        class Pair(sl.Step):
            def step(self, x):
                return x, x

        with pytest.raises(sl.StepError, match="Pair returned another thing"):
            run(sl.nn.Residual(Pair()), torch.zeros(2, B, 4))
        with pytest.raises(sl.StepError, match="wraps a Step"):
            sl.nn.Residual(torch.tanh)
