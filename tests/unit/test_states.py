"""States: the dictionary that a Loop returns and takes."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import steploop as sl


class Counter(sl.Step):
    def __init__(self):
        super().__init__()
        self.h = sl.State(2, init=5.0)
        self.n = sl.State(dtype=torch.int64)

    def step(self, x):
        self.h.next = self.h.prev + x
        self.n.next = self.n.prev + 1


@pytest.fixture
def states():
    xs = torch.arange(4.0)[None, :, None].expand(3, 4, 2).clone().requires_grad_()
    return sl.Loop(Counter(), backend="reference")(xs)[1]


def test_it_is_a_dictionary_by_path(states):
    assert isinstance(states, dict) and isinstance(states, sl.States) and list(states) == ["h", "n"]


def test_detach_and_clone(states):
    assert states["h"].requires_grad and not states.detach()["h"].requires_grad
    twin = states.clone()
    assert twin["h"].data_ptr() != states["h"].data_ptr() and twin["h"].requires_grad


def test_to_changes_floating_values_only(states):
    twin = states.to(torch.float64)
    assert twin["h"].dtype == torch.float64 and twin["n"].dtype == torch.int64
    assert twin.reset_()["h"].dtype == torch.float64


@pytest.mark.parametrize(
    "index",
    [
        [2, 0],
        torch.tensor([2, 0]),
        slice(1, 3),
        torch.tensor([True, False, True, False]),
        [False, True, True, False],
    ],
)
def test_select_rows(states, index):
    chosen = states.select(index)
    tensor_index = torch.tensor(index) if isinstance(index, list) else index
    assert torch.equal(chosen["h"], states["h"][tensor_index])
    assert chosen.reset_()["h"].tolist() == [[5.0, 5.0]] * 2


def test_select_one_row_keeps_the_batch_axis(states):
    assert states.select(1)["h"].shape == (1, 2)


@pytest.mark.parametrize(
    "rows",
    [
        [0, 2], torch.tensor([0, 2]), slice(0, 3, 2), torch.tensor([1, 0, 1, 0]).bool(), np.array([0, 2]),
        np.array([True, False, True, False]),
    ],
)  # fmt: skip
def test_reset_puts_rows_back_to_their_own_initial_value(states, rows):
    before = states.clone()
    assert states.reset_(rows) is states
    assert states["h"][[0, 2]].eq(5).all() and torch.equal(states["h"][[1, 3]], before["h"][[1, 3]])
    assert states["n"].tolist() == [0, 3, 0, 3]


def test_reset_never_goes_back_to_a_given_state():
    loop = sl.Loop(Counter(), backend="reference")
    given = {"h": torch.zeros(1, 2), "n": torch.tensor([7])}
    _, state = loop(torch.ones(1, 1, 2), state=given)
    assert state["n"].tolist() == [8] and state.reset_()["n"].tolist() == [0]


def test_copies_and_pickles_remember(states):
    for twin in (
        copy.copy(states),
        copy.deepcopy(states.detach()),
        pickle.loads(pickle.dumps(states.detach())),
    ):
        assert isinstance(twin, sl.States) and torch.equal(twin["h"], states["h"])
        assert twin.reset_()["n"].tolist() == [0] * 4


def test_it_is_a_pytree(states):
    doubled = pytree.tree_map(lambda v: v * 2, states)
    assert isinstance(doubled, sl.States) and torch.equal(doubled["n"], states["n"] * 2)


def test_truncated_backpropagation():
    loop = sl.Loop(Counter(), backend="reference")
    xs = torch.ones(6, 2, 2, requires_grad=True)
    _, state = loop(xs[:3])
    _, state = loop(xs[3:], state=state.detach())
    state["h"].sum().backward()
    assert (xs.grad[:3] == 0).all() and (xs.grad[3:] == 1).all()
