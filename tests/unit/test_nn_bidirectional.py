"""Bidirectional: two loops over one sequence, ragged batches, states of both directions, errors."""

import copy
import pickle

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import steploop as sl

T, B, INPUT, H = 6, 3, 4, 5
LENGTHS = torch.tensor([4, 6, 0])
HOLES = torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.6


def make(**options):
    torch.manual_seed(2)
    return sl.nn.Bidirectional(
        sl.nn.LSTMCell(INPUT, H), sl.nn.GRUCell(INPUT, H), backend="reference", **options
    )


def both(layer, *xs, **call):
    forward = sl.Loop(layer.forward_loop.step, backend="reference")
    backward = sl.Loop(layer.backward_loop.step, backend="reference", reverse=True)
    return forward(*xs, **call), backward(*xs, **call)


@pytest.mark.parametrize("call", [{}, {"lengths": LENGTHS}, {"mask": HOLES}], ids=["plain", "lengths", "holes"])
def test_is_both_loops(call):
    layer = make()
    x = torch.randn(T, B, INPUT)
    (left, left_state), (right, right_state) = both(layer, x, **call)
    outputs, state = layer(x, **call)
    assert torch.equal(outputs, torch.cat([left, right], -1))
    assert list(state) == ["forward.h", "forward.c", "backward.h"]
    assert torch.equal(state["forward.c"], left_state["c"]) and torch.equal(
        state["backward.h"], right_state["h"]
    )


def test_the_backward_cell_starts_at_each_rows_end():
    layer = make()
    x = torch.randn(T, B, INPUT)
    outputs, state = layer(x, lengths=LENGTHS)
    alone, alone_state = layer(x[:4, :1])
    torch.testing.assert_close(outputs[:4, :1], alone)
    torch.testing.assert_close(state["backward.h"][:1], alone_state["backward.h"])
    assert (outputs[4:, 0] == 0).all() and (outputs[:, 2] == 0).all()


@pytest.mark.parametrize("call", [{}, {"lengths": LENGTHS}, {"mask": HOLES}, {"lengths": LENGTHS, "mask": HOLES}])
@pytest.mark.parametrize("options", [{}, {"on_masked": "repeat"}])
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_last_output_is_that_of_each_direction(call, options, batch_first):
    layer = make(batch_first=batch_first)
    x = torch.randn(T, B, INPUT)
    (left, _), (right, _) = both(make(), x, **call)
    valid = torch.ones(T, B, dtype=torch.bool) if "mask" not in call else HOLES
    if "lengths" in call:
        valid = valid & (torch.arange(T)[:, None] < LENGTHS)
    if batch_first:
        x, call = x.transpose(0, 1), {k: v.transpose(0, 1) if k == "mask" else v for k, v in call.items()}
    found, state = layer.last_output(x, **call, **options)
    for row in range(B):
        steps = valid[:, row].nonzero()[:, 0].tolist()
        expected = torch.zeros(2 * H)
        if steps:
            expected = torch.cat([left[steps[-1], row], right[steps[0], row]])
        assert torch.equal(found[row], expected)
        if steps:  # LSTM and GRU give their h
            assert torch.equal(found[row, :H], state["forward.h"][row])
            assert torch.equal(found[row, H:], state["backward.h"][row])


def test_the_last_output_of_packed_sequences_and_of_no_steps():
    layer = make()
    x, lengths = torch.randn(T, B, INPUT), torch.tensor([4, 6, 1])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    assert torch.equal(layer.last_output(packed)[0], layer.last_output(x, lengths=lengths)[0])
    assert torch.equal(layer.last_output(x[:0])[0], torch.zeros(B, 2 * H))


def test_packed_sequences():
    layer = make()
    x, lengths = torch.randn(T, B, INPUT), torch.tensor([4, 6, 1])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    outputs, state = layer(packed)
    expected, expected_state = layer(x, lengths=lengths)
    again = pack_padded_sequence(expected, lengths, enforce_sorted=False)
    assert isinstance(outputs, PackedSequence) and torch.equal(outputs.data, again.data)
    assert torch.equal(outputs.batch_sizes, again.batch_sizes)
    for name, value in expected_state.items():
        assert torch.equal(state[name], value)


def test_batch_first():
    x = torch.randn(T, B, INPUT)
    outputs, _ = make(batch_first=True)(x.transpose(0, 1), lengths=LENGTHS)
    assert torch.equal(outputs.transpose(0, 1), make()(x, lengths=LENGTHS)[0])


def test_a_given_state_starts_both():
    layer = make()
    x = torch.randn(T, B, INPUT)
    _, state = layer(x)
    outputs, _ = layer(x, state=state)
    left, _ = sl.Loop(layer.forward_loop.step, backend="reference")(
        x, state={"h": state["forward.h"], "c": state["forward.c"]}
    )
    assert torch.equal(outputs[..., :H], left)
    assert not torch.equal(outputs, layer(x)[0])
    torch.testing.assert_close(state.reset_()["backward.h"], torch.zeros(B, H))


def test_wrong_states():
    layer = make()
    x = torch.randn(T, B, INPUT)
    with pytest.raises(sl.StateError, match=r"forward\.<state>[^$]*'h'"):
        layer(x, state={"h": torch.zeros(B, H)})
    with pytest.raises(sl.StateError, match="missing 'h'"):
        layer(x, state={"forward.h": torch.zeros(B, H), "forward.c": torch.zeros(B, H)})
    with pytest.raises(sl.StateError):
        layer(x, state=torch.zeros(B, H))


def test_gradients_reach_both_cells_and_copies_work():
    layer = make()
    x = torch.randn(T, B, INPUT)
    outputs, _ = layer(x)
    outputs.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], outputs)


def test_outputs_in_trees_are_joined_leaf_by_leaf():
    class Two(sl.Step):
        def __init__(self, features):
            super().__init__()
            self.features = features

        def step(self, x):
            return {"sum": x.sum(-1, keepdim=True), "x": x[..., : self.features], "none": None}

    layer = sl.nn.Bidirectional(Two(2), Two(3), backend="reference")
    outputs, state = layer(torch.randn(T, B, INPUT))
    assert outputs["sum"].shape == (T, B, 2) and outputs["x"].shape == (T, B, 5) and outputs["none"] is None
    assert dict(state) == {}


def test_outputs_that_cannot_be_joined():
    class Flat(sl.Step):
        def step(self, x):
            return x.sum(-1)

    x = torch.randn(T, B, INPUT)
    with pytest.raises(sl.InputError, match="joined on their last axis"):
        sl.nn.Bidirectional(Flat(), Flat(), backend="reference")(x)

    class Pair(sl.Step):
        def step(self, x):
            return x, x

    with pytest.raises(sl.InputError, match="not alike"):
        sl.nn.Bidirectional(Pair(), sl.nn.GRUCell(INPUT, H), backend="reference")(x)


def test_is_not_a_step():
    with pytest.raises(sl.StepError, match="Bidirectional"):
        sl.Loop(make())
