"""Layers: whole sequences through one layer after the other, row by row as if each were alone; states, errors."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import steploop as sl

INPUT, H, OUT = 4, 3, 2
BACKEND = "reference"  # what the layers hand on is the same for every backend; one test compares the compiled ones


def deep(cell=sl.nn.LSTMCell, backend=BACKEND, **options):
    """Two bidirectional layers, one in one direction, and a product."""
    torch.manual_seed(0)
    options = {"backend": backend, **options}
    return sl.nn.Layers(
        sl.nn.Bidirectional(cell(INPUT, H), cell(INPUT, H), **options),
        sl.nn.Dropout(0.0),
        sl.nn.Bidirectional(cell(2 * H, H), sl.nn.GRUCell(2 * H, H), **options),
        sl.nn.GRUCell(2 * H, H),
        nn.Linear(H, OUT),
        **options,
    )


def mixed(backend=BACKEND, **options):
    """sl.nn's own layers of torch's kind, and Layers in Layers."""
    torch.manual_seed(0)
    options = {"backend": backend, **options}
    return sl.nn.Layers(
        sl.nn.LSTM(INPUT, H, num_layers=2, bidirectional=True, **options),
        sl.nn.Layers(nn.LayerNorm(2 * H), sl.nn.GRU(2 * H, H, **options), **options),
        sl.Loop(sl.nn.RNNCell(H, OUT), reverse=True, **options),
        **options,
    )


def small(backend):
    torch.manual_seed(0)
    return sl.nn.Layers(
        sl.nn.Bidirectional(sl.nn.RNNCell(INPUT, H), sl.nn.RNNCell(INPUT, H), backend=backend),
        nn.Linear(2 * H, OUT),
        backend=backend,
    )


def alone(layers, x, state=None):
    """One row without masks, through plain Python loops. x: (T, 1, INPUT)."""
    plain = copy.deepcopy(layers)
    for module in plain.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"
    outputs, found = plain(x, state=state)
    return outputs, found, list(plain.parameters())


def valid_steps(T, B, lengths=None, mask=None):
    valid = torch.ones(T, B, dtype=torch.bool)
    if lengths is not None:
        valid &= torch.arange(T)[:, None] < lengths
    return valid if mask is None else valid & mask


def both_masks(T, B):
    generator = torch.Generator().manual_seed(T * 10 + B)
    lengths = torch.randint(0, T + 1, (B,), generator=generator)
    return {"lengths": lengths, "mask": torch.rand(T, B, generator=generator) < 0.6}


@pytest.mark.parametrize("make, backend", [(deep, BACKEND), (mixed, BACKEND), (small, "eager")])
def test_every_row_is_as_if_it_were_alone(make, backend):
    """A sequence of sizes through the same layers: outputs, states and gradients."""
    layers = make(backend=backend)
    for T, B in [(5, 3), (1, 3), (4, 1), (5, 3)]:
        for call in ({}, both_masks(T, B)):
            x, valid = torch.randn(T, B, INPUT), valid_steps(T, B, **call)
            x[~valid] = torch.nan  # what stands there is never read
            x.requires_grad_()
            outputs, state = layers(x, **call)
            if state.steps is not None:
                assert state.steps.tolist() == valid.sum(0).tolist()
            if not valid.any():  # nothing reaches a weight
                assert (outputs == 0).all()
                continue
            weights = torch.randn_like(outputs)
            (found_x, *found) = torch.autograd.grad((outputs * weights).sum(), [x, *layers.parameters()])
            expected = [torch.zeros_like(p) for p in layers.parameters()]
            for row in range(B):
                steps = valid[:, row].nonzero()[:, 0]
                own = x.detach()[steps, row : row + 1].requires_grad_()
                y, last, parameters = alone(layers, own)
                torch.testing.assert_close(outputs[steps, row : row + 1], y)
                for name, value in last.items():
                    torch.testing.assert_close(state[name][row : row + 1], value)
                if len(steps):
                    loss = (y * weights[steps, row : row + 1]).sum()
                    of_x, *of_parameters = torch.autograd.grad(loss, [own, *parameters])
                    torch.testing.assert_close(found_x[steps, row : row + 1], of_x)
                    expected = [a + b for a, b in zip(expected, of_parameters, strict=True)]
            assert (outputs[~valid] == 0).all() and (found_x[~valid] == 0).all()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [deep, mixed])
def test_packed_sequences_come_out_packed(make):
    layers, x, lengths = make(), torch.randn(5, 3, INPUT), torch.tensor([2, 5, 4])
    expected, state = layers(x, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    outputs, packed_state = layers(packed)
    assert isinstance(outputs, PackedSequence)
    torch.testing.assert_close(pad_packed_sequence(outputs)[0], expected)
    assert list(state) == list(packed_state)
    torch.testing.assert_close(dict(packed_state), dict(state))


@pytest.mark.parametrize("make", [deep, mixed])
def test_batch_first(make):
    call = both_masks(5, 3)
    turned = {"lengths": call["lengths"], "mask": call["mask"].T, "resets": torch.rand(3, 5) < 0.3}
    x = torch.randn(5, 3, INPUT)
    expected, state = make()(x, **call, resets=turned["resets"].T)
    outputs, same = make(batch_first=True)(x.transpose(0, 1), **turned)
    torch.testing.assert_close(outputs.transpose(0, 1), expected)
    torch.testing.assert_close(dict(same), dict(state))


def test_a_state_goes_on_where_a_call_ended():
    layers = sl.nn.Layers(
        sl.nn.GRU(INPUT, H, num_layers=2, backend=BACKEND), sl.nn.LSTMCell(H, H), nn.Linear(H, OUT), backend=BACKEND
    )
    x = torch.randn(6, 3, INPUT)
    whole, last = layers(x)
    first, state = layers(x[:2])
    assert list(state) == ["0.h", "1.h", "1.c"] and state["0.h"].shape == (3, 2, H)
    second, then = layers(x[2:], state=state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(dict(then), dict(last))
    chosen, _ = layers(x[2:, [2, 0]], state=state.select([2, 0]))
    torch.testing.assert_close(chosen, second[:, [2, 0]])
    again, _ = layers(x, state=state.reset_())
    torch.testing.assert_close(again, whole)


def test_the_last_outputs():
    layers, call = deep(), {"lengths": torch.tensor([4, 0, 5])}
    x = torch.randn(5, 3, INPUT)
    outputs, _ = layers(x, **call)
    last, _ = layers.last_output(x, **call)
    torch.testing.assert_close(last, torch.stack([outputs[3, 0], torch.zeros(OUT), outputs[4, 2]]))


def test_on_masked_is_the_last_layers():
    layers, call = deep(), {"lengths": torch.tensor([2, 5])}
    x = torch.randn(5, 2, INPUT)
    outputs, _ = layers(x, **call)
    repeated, _ = layers(x, on_masked="repeat", **call)
    torch.testing.assert_close(repeated[2:, 0], outputs[1, 0].expand(3, OUT))
    torch.testing.assert_close(repeated[:, 1], outputs[:, 1])


class Conditioned(sl.Step):
    def __init__(self):
        super().__init__()
        self.h = sl.State(H, init=None)

    def begin(self, start):
        self.h.prev = start

    def step(self, x, scale):
        self.h.next = torch.tanh(self.h.prev + x * scale)
        return self.h.next


def test_constants_go_to_the_layers_that_name_them():
    layers = sl.nn.Layers(nn.Linear(INPUT, H), Conditioned(), sl.nn.GRUCell(H, H), backend=BACKEND)
    x, start, scale = torch.randn(4, 2, INPUT), torch.randn(2, H), torch.tensor(0.5)
    outputs, _ = layers(x, start=start, scale=sl.unbatched(scale))
    inner, _ = layers[1](layers[0](x)[0], start=start, scale=sl.unbatched(scale))
    torch.testing.assert_close(outputs, layers[2](inner)[0])
    with pytest.raises(sl.StepError, match="a constant that no cell in it takes: `memory`"):
        layers(x, memory=start)


def test_modules_are_seen_as_they_are_now():
    """Train and eval, weights and layers that are replaced, copies and pickles."""
    layers = sl.nn.Layers(sl.nn.GRUCell(INPUT, H), sl.nn.Dropout(0.5), backend=BACKEND)
    x = torch.randn(50, 2, INPUT)
    assert (layers(x)[0] == 0).any()
    assert not (layers.eval()(x)[0] == 0).any()
    expected, _ = layers(x)
    for twin in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        torch.testing.assert_close(twin(x)[0], expected)
    setattr(layers, "0", sl.Loop(sl.nn.RNNCell(INPUT, H), backend=BACKEND))
    torch.testing.assert_close(layers(x)[0], layers[0](x)[0])
    other = sl.nn.Layers(sl.nn.RNNCell(INPUT, H), sl.nn.Dropout(0.5), backend=BACKEND)
    other.load_state_dict(layers.state_dict())
    torch.testing.assert_close(other.eval()(x)[0], layers(x)[0])
    layers[0].until = "done"
    with pytest.raises(sl.UnsupportedError, match="layer 0 ends by itself"):
        layers(x)


@pytest.mark.parametrize(
    "make, error, told",
    [
        (lambda: sl.nn.Layers(), sl.StepError, "has no layers"),
        (lambda: sl.nn.Layers([sl.nn.GRUCell(2, 2)]), sl.StepError, r"Layers\(\*layers\)"),
        (lambda: sl.nn.Layers(nn.LSTM(2, 2)), sl.StepError, "layer 0 is torch's LSTM(.|\n)*sl.nn.LSTM"),
        (lambda: sl.nn.Layers(sl.nn.GRU(2, 2, batch_first=True)), sl.InputError, "with batch_first=True"),
        (lambda: deep()(torch.randn(5, 2, INPUT), state={"h": 1}), sl.StateError, "belongs to no layer"),
        (lambda: deep()(torch.randn(5, 2, INPUT), state=[1]), sl.StateError, "not a dictionary"),
        (lambda: mixed()(torch.randn(5, INPUT)), sl.InputError, "takes one sequence with a batch"),
        (lambda: mixed()(torch.randn(5, 2, INPUT), state={"0.h": torch.zeros(2, 4, H)}), sl.StateError, "'c'"),
        (lambda: sl.nn.Layers(sl.nn.GRU(2, 2)).last_output(torch.randn(5, 2, 2)), sl.UnsupportedError, "GRUCell"),
    ],
)
def test_what_is_told(make, error, told):
    with pytest.raises(error, match=told):
        make()
