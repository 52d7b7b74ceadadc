"""TF1's cells: sizes that are told later, initial values, and errors. Formulas: tests/oracle, tests/golden."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import steploop as sl
from steploop.seq2seq import tf_cells

KINDS = [tf_cells.BasicRNNCell, tf_cells.GRUCell, tf_cells.BasicLSTMCell]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_by_itself(kind):
    cell = kind(4, input_size=3)
    outputs, _ = sl.Loop(cell, backend="reference")(torch.randn(5, 2, 3))
    assert outputs.shape == (5, 2, 4) and outputs.dtype == torch.float32
    wide = kind(4, input_size=3, dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert list(other.state_dict()) == list(cell.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_inputs_is_told_once(kind):
    cell = kind(4)
    assert not list(cell.parameters()) and cell.output_size == 4
    with pytest.raises(sl.StepError, match="does not know the size of its inputs"):
        cell(torch.randn(5, 2, 3))
    wrapper = tf_cells.EmbeddingWrapper(cell, 7, 3)
    assert cell.input_size == 3
    outputs, _ = wrapper(torch.randint(7, (5, 2)))
    assert outputs.shape == (5, 2, 4)
    cell.build(3)
    with pytest.raises(sl.InputError, match="inputs of another size"):
        cell.build(5)


def test_layers_tell_each_other():
    cells = tf_cells.MultiRNNCell([tf_cells.GRUCell(4), tf_cells.BasicLSTMCell(5), sl.nn.GRUCell(5, 2)])
    wrapped = tf_cells.OutputProjectionWrapper(cells, 6, activation=torch.tanh, input_size=3)
    assert [cell.input_size for cell in cells.children()] == [3, 4, 5]
    outputs, state = sl.Loop(wrapped, backend="reference")(torch.randn(5, 2, 3))
    assert outputs.shape == (5, 2, 6) and outputs.abs().max() < 1
    assert list(state) == ["cell.cell_0.h", "cell.cell_1.c", "cell.cell_1.h", "cell.cell_2.h"]
    assert wrapped.state_size == (4, tf_cells.LSTMStateTuple(5, 5), 2)


def test_initial_values():
    gru = tf_cells.GRUCell(64, input_size=64)
    assert (gru.gates.bias == 1).all() and (gru.candidate.bias == 0).all()
    limit = (6 / (128 + 128)) ** 0.5
    assert 0.9 * limit < gru.gates.kernel.abs().max() <= limit
    embedding = tf_cells.EmbeddingWrapper(gru, 50, 64).embedding
    assert 0.9 * 3**0.5 < embedding.abs().max() <= 3**0.5


def test_options():
    lstm = tf_cells.BasicLSTMCell(2, forget_bias=0.0, activation=nn.functional.relu, input_size=1)
    outputs, state = sl.Loop(lstm, backend="reference")(torch.randn(3, 2, 1))
    assert (outputs >= 0).all() and set(state) == {"c", "h"}


def test_errors():
    for units in (0, 2.5, True, "4"):
        with pytest.raises(sl.InputError, match="num_units is a whole number"):
            tf_cells.GRUCell(units)
    cell = tf_cells.GRUCell(4)
    with pytest.raises(sl.StepError, match="same cell more than once"):
        tf_cells.MultiRNNCell([cell, cell])
    for cells in ([], [cell, 3]):
        with pytest.raises(sl.StepError, match="takes a list of cells"):
            tf_cells.MultiRNNCell(cells)
    for wrap in (lambda: tf_cells.OutputProjectionWrapper(4, 3), lambda: tf_cells.EmbeddingWrapper("gru", 3, 3)):
        with pytest.raises(sl.StepError, match="takes a cell"):
            wrap()

    class Silent(sl.Step):
        def step(self, x):
            return x

    with pytest.raises(sl.InputError, match="does not say how many features"):
        tf_cells.OutputProjectionWrapper(Silent(), 3)
