"""The drop-in layers beyond equality with torch: lengths, masks, resets, copies, parametrizations, errors."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import steploop as sl

T, B, INPUT, H = 6, 4, 3, 5
LENGTHS = torch.tensor([4, 6, 1, 3])
KINDS = ["RNN", "GRU", "LSTM"]


def make(kind="LSTM", **options):
    torch.manual_seed(4)
    return getattr(sl.nn, kind)(INPUT, H, **{"num_layers": 2, "backend": "reference", **options})


def inputs(*shape):
    torch.manual_seed(6)
    return torch.randn(*(shape or (T, B, INPUT)))


def finals(result):
    return result[1] if isinstance(result[1], tuple) else (result[1],)


both_directions = pytest.mark.parametrize("bidirectional", [False, True])


@both_directions
@pytest.mark.parametrize("kind", KINDS)
class TestRaggedBatches:
    def test_lengths_are_a_packed_sequence(self, kind, bidirectional):
        layer, x = make(kind, bidirectional=bidirectional), inputs()
        packed, *_ = expected = layer(pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
        result = layer(x, lengths=LENGTHS)
        torch.testing.assert_close(result[0], pad_packed_sequence(packed)[0])
        for actual, value in zip(finals(result), finals(expected), strict=True):
            torch.testing.assert_close(actual, value)

    def test_a_mask_drops_steps(self, kind, bidirectional):
        layer, x = make(kind, bidirectional=bidirectional, batch_first=True), inputs(B, T, INPUT)
        mask = torch.tensor([[1, 0, 1, 1, 0, 1]] * B, dtype=torch.bool)
        x[~mask] = float("nan")
        outputs, _ = result = layer(x, mask=mask)
        dense, _ = expected = layer(x[:, mask[0]])
        torch.testing.assert_close(outputs[:, mask[0]], dense)
        assert (outputs[~mask] == 0).all()
        for actual, value in zip(finals(result), finals(expected), strict=True):
            torch.testing.assert_close(actual, value)

    def test_a_length_may_be_zero(self, kind, bidirectional):
        layer, x = make(kind, bidirectional=bidirectional), inputs()
        outputs, _ = result = layer(x, lengths=torch.tensor([0, 6, 0, 2]))
        assert (outputs[:, [0, 2]] == 0).all()
        assert all((value[:, [0, 2]] == 0).all() for value in finals(result))

    def test_no_steps(self, kind, bidirectional):
        layer = make(kind, bidirectional=bidirectional)
        outputs, _ = result = layer(torch.zeros(0, B, INPUT))
        assert outputs.shape == (0, B, H * (2 if bidirectional else 1))
        assert all((value == 0).all() for value in finals(result))


def test_resets_start_anew():
    layer, x = make("LSTM"), inputs()
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[3] = True
    outputs, (h, c) = layer(x, resets=resets)
    again, (h2, c2) = layer(x[3:])
    torch.testing.assert_close(outputs[3:], again)
    torch.testing.assert_close((h, c), (h2, c2))


def test_masks_of_an_unbatched_sequence():
    layer, x = make("GRU"), inputs(T, INPUT)
    mask = torch.tensor([1, 1, 0, 1, 1, 0], dtype=torch.bool)
    outputs, h = layer(x, mask=mask)
    dense, expected = layer(x[mask])
    torch.testing.assert_close(outputs[mask], dense)
    torch.testing.assert_close(h, expected)
    outputs, h = layer(x, lengths=4, resets=~mask)
    assert outputs.shape == (T, H) and h.shape == (2, H) and (outputs[4:] == 0).all()


@both_directions
@pytest.mark.parametrize("kind", KINDS)
class TestTheLayerIsAnOrdinaryModule:
    def expected(self, kind, layer, x):
        theirs = getattr(nn, kind)(INPUT, H, 2, bidirectional=layer.bidirectional).to(x.dtype)
        theirs.load_state_dict(layer.state_dict())
        return theirs(x)

    def test_copies_and_pickles_are_independent(self, kind, bidirectional):
        layer, x = make(kind, bidirectional=bidirectional), inputs()
        expected = layer(x)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        others = [
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(file, weights_only=False),
        ]
        for other in others:
            torch.testing.assert_close(other(x), expected)
            with torch.no_grad():
                other.weight_hh_l1.zero_()
            torch.testing.assert_close(layer(x), expected)
            assert not torch.equal(other(x)[0], expected[0])

    def test_weights_changed_moved_or_replaced(self, kind, bidirectional):
        layer, x = make(kind, bidirectional=bidirectional), inputs()
        layer(x)
        with torch.no_grad():
            layer.weight_ih_l0.mul_(2)
        torch.testing.assert_close(layer(x), self.expected(kind, layer, x))
        layer.bias_hh_l1 = nn.Parameter(torch.randn_like(layer.bias_hh_l1))
        torch.testing.assert_close(layer(x), self.expected(kind, layer, x))
        layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}, assign=True)
        torch.testing.assert_close(layer(x), self.expected(kind, layer, x))
        layer, x = layer.double(), x.double()
        outputs, _ = layer(x)
        assert outputs.dtype == torch.float64
        torch.testing.assert_close(layer(x), self.expected(kind, layer, x))

    def test_functional_call(self, kind, bidirectional):
        layer, x = make(kind, bidirectional=bidirectional), inputs()
        before = layer(x)
        weights = {k: torch.randn_like(v, requires_grad=True) for k, v in layer.named_parameters()}
        outputs, _ = torch.func.functional_call(layer, weights, (x,))
        gradients = torch.autograd.grad(outputs.sum(), list(weights.values()))
        assert all(g.abs().sum() > 0 for g in gradients)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.copy_(weights[name])
        torch.testing.assert_close(outputs, layer(x)[0])
        assert not torch.equal(before[0], outputs)

    def test_parametrizations(self, kind, bidirectional):
        layer, x = make(kind, bidirectional=bidirectional), inputs()

        class Double(nn.Module):
            def forward(self, weight):
                return 2 * weight

        parametrize.register_parametrization(layer, "weight_hh_l1", Double())
        expected = make(kind, bidirectional=bidirectional)
        with torch.no_grad():
            expected.weight_hh_l1.mul_(2)
        torch.testing.assert_close(layer(x), expected(x))
        layer(x)[0].sum().backward()
        assert layer.parametrizations.weight_hh_l1.original.grad.abs().sum() > 0
        torch.testing.assert_close(copy.deepcopy(layer)(x), expected(x))

    def test_spectral_norm_iterates_once_per_call(self, kind, bidirectional):
        layer = make(kind, bidirectional=bidirectional)
        parametrizations.spectral_norm(layer, "weight_ih_l0")
        theirs = nn.Linear(INPUT, layer.weight_hh_l0.shape[0], bias=False)
        norm = layer.parametrizations.weight_ih_l0
        with torch.no_grad():
            theirs.weight.copy_(norm.original)
        parametrizations.spectral_norm(theirs, "weight")
        theirs.parametrizations.weight[0].load_state_dict(norm[0].state_dict())
        layer(inputs())
        theirs(torch.zeros(1, INPUT))
        torch.testing.assert_close(norm[0]._u, theirs.parametrizations.weight[0]._u)

    def test_train_eval_and_a_later_dropout_are_seen(self, kind, bidirectional):
        layer, x = make(kind, bidirectional=bidirectional, dropout=0.5), inputs()
        assert not torch.equal(layer(x)[0], layer(x)[0])
        layer.eval()
        assert torch.equal(layer(x)[0], layer(x)[0])
        layer.train()
        layer.dropout = 0.0
        assert torch.equal(layer(x)[0], layer(x)[0])


def test_attributes_that_code_for_torch_uses():
    layer = make("LSTM", bidirectional=True)
    assert layer.flatten_parameters() is None
    assert [len(weights) for weights in layer.all_weights] == [4] * 4
    assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True))
    assert layer.get_expected_hidden_size(inputs(), None) == (4, B, H)
    assert isinstance(layer, nn.LSTM)


def test_a_replica_as_data_parallel_makes_it():
    layer, x = make("LSTM"), inputs()
    replica = layer._replicate_for_data_parallel()
    for name, weight in layer.named_parameters():
        setattr(replica, name, (2 * weight).detach().requires_grad_())
    expected = make("LSTM")
    with torch.no_grad():
        for weight in expected.parameters():
            weight.mul_(2)
    torch.testing.assert_close(replica(x), expected(x))


def test_repr_shows_the_backend_only_where_it_was_chosen():
    assert repr(sl.nn.GRU(3, 5)) == repr(nn.GRU(3, 5)) == "GRU(3, 5)"
    assert repr(sl.nn.GRU(3, 5, backend="reference")) == "GRU(3, 5, backend='reference')"


def test_under_autocast_the_states_stay_float32():
    for kind in KINDS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer = make(kind)
            result = layer(inputs())
            again = layer(inputs().bfloat16(), result[1])
        assert all(value.dtype == torch.float32 for value in (*finals(result), *finals(again)))


def test_constructors_check_as_torchs_do():
    calls = [
        lambda module: module.LSTM(3, 5, proj_size=5),
        lambda module: module.GRU(3, 5, num_layers=0),
        lambda module: module.RNN(3, 5, nonlinearity="gelu"),
        lambda module: module.RNN(0, 5),
        lambda module: module.GRU(3, 5, dropout=1.5),
        lambda module: module.GRU(3, 5, batch_first=1),
    ]
    for call in calls:
        with pytest.raises((TypeError, ValueError)) as theirs:
            call(nn)
        with pytest.raises(theirs.type, match=str(theirs.value)[:20]):
            call(sl.nn)
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        sl.nn.GRU(3, 5, dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sl.nn.GRU(3, 5, 2, dropout=0.5)
    with pytest.raises(sl.InputError, match="no such backend"):
        sl.nn.GRU(3, 5, backend="gpu")


@pytest.mark.parametrize(
    "kind, x, hx, error, words",
    [
        ("GRU", torch.zeros(T, B, 4), None, sl.InputError, r"input_size=3[^$]*\(6, 4, 4\)"),
        ("GRU", torch.zeros(T), None, sl.InputError, r"3-D \(T, B, I\), or 2-D \(T, I\)"),
        ("GRU", torch.zeros(1, T, B, 3), None, sl.InputError, r"3-D \(T, B, I\)"),
        (
            "GRU",
            torch.zeros(T, B, 3).double(),
            None,
            sl.InputError,
            r"torch.float32, as the weights[^$]*layer.to",
        ),
        ("GRU", [1.0], None, sl.InputError, "no tensor and no PackedSequence"),
        ("GRU", torch.zeros(T, B, 3), torch.zeros(2, B, 6), sl.StateError, r"= \(2, 4, 5\)[^$]*\(2, 4, 6\)"),
        ("GRU", torch.zeros(T, B, 3), torch.zeros(2, H), sl.StateError, r"= \(2, 4, 5\)[^$]*\(2, 5\)"),
        ("GRU", torch.zeros(T, 3), torch.zeros(2, 1, H), sl.StateError, r"= \(2, 5\)[^$]*\(2, 1, 5\)"),
        ("GRU", torch.zeros(T, B, 3), (torch.zeros(2, B, H),) * 2, sl.StateError, "one tensor h_0"),
        ("LSTM", torch.zeros(T, B, 3), torch.zeros(2, B, H), sl.StateError, r"a tuple \(h_0, c_0\)"),
        ("LSTM", torch.zeros(T, B, 3), (torch.zeros(2, B, H), None), sl.StateError, r"a tuple \(h_0, c_0\)"),
        (
            "LSTM",
            torch.zeros(T, B, 3),
            (torch.zeros(2, B, H), torch.zeros(1, B, H)),
            sl.StateError,
            "c_0 has",
        ),
        ("GRU", torch.zeros(T, B, 3), torch.zeros(2, B, H).double(), sl.StateError, "float64"),
    ],
)
def test_wrong_inputs_and_states(kind, x, hx, error, words):
    with pytest.raises(error, match=words):
        make(kind)(x, hx)


def test_lengths_with_a_packed_sequence():
    packed = pack_padded_sequence(inputs(), LENGTHS, enforce_sorted=False)
    with pytest.raises(sl.InputError, match="PackedSequence, which carries its own"):
        make()(packed, lengths=LENGTHS)


def test_inside_a_step_it_is_an_inner_sequence():
    class Encoder(sl.Step):
        def __init__(self):
            super().__init__()
            self.inner = make("GRU", batch_first=True)

        def step(self, windows):
            _, h = self.inner(windows)
            return h[-1]

    step, x = Encoder(), torch.randn(3, B, T, INPUT)
    outputs, state = sl.Loop(step, backend="reference")(x)
    assert list(state) == []
    torch.testing.assert_close(outputs[1], step.inner(x[1])[1][-1])
