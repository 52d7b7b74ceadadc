"""RNNCell, LSTMCell, GRUCell, LayerNormLSTMCell: parameters, initial values, torch.nn's weights, errors."""

import copy
import pickle

import pytest
import torch

import steploop as sl

SIZES = (3, 5)
TORCH_CELLS = [
    ("RNNCell", {}),
    ("RNNCell", {"nonlinearity": "relu", "bias": False}),
    ("LSTMCell", {}),
    ("LSTMCell", {"bias": False}),
    ("GRUCell", {}),
    ("GRUCell", {"bias": False}),
]


@pytest.mark.parametrize("name, options", TORCH_CELLS)
def test_same_parameters_and_initial_values_as_torch(name, options):
    torch.manual_seed(1)
    theirs = getattr(torch.nn, name)(*SIZES, **options)
    torch.manual_seed(1)
    ours = getattr(sl.nn, name)(*SIZES, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    fresh = getattr(torch.nn, name)(*SIZES, **options)
    fresh.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(fresh.state_dict(), strict=True)
    if not options.get("bias", True):
        assert ours.bias_ih is None and ours.bias_hh is None


@pytest.mark.parametrize("name, options", TORCH_CELLS)
def test_a_step_is_torchs_step(name, options):
    theirs = getattr(torch.nn, name)(*SIZES, **options)
    ours = getattr(sl.nn, name)(*SIZES, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 2, 3)
    outputs, state = sl.Loop(ours, backend="reference")(x)
    hx = None
    for t in range(7):
        hx = theirs(x[t], hx)
        h = hx[0] if name == "LSTMCell" else hx
        torch.testing.assert_close(outputs[t], h)
    expected = {"h": hx[0], "c": hx[1]} if name == "LSTMCell" else {"h": hx}
    assert list(state) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value)


@pytest.mark.parametrize(
    "make",
    [
        lambda **k: sl.nn.RNNCell(*SIZES, **k),
        lambda **k: sl.nn.LSTMCell(*SIZES, proj_size=2, **k),
        lambda **k: sl.nn.GRUCell(*SIZES, **k),
        lambda **k: sl.nn.LayerNormLSTMCell(*SIZES, layer_norm="gates", **k),
        lambda **k: sl.nn.LayerNormLSTMCell(*SIZES, layer_norm="all", **k),
    ],
    ids=["rnn", "lstm", "gru", "gates", "all"],
)
class TestEveryCell:
    def test_dtype_and_device(self, make):
        cell = make(dtype=torch.float64, device="meta")
        assert {(p.dtype, p.device.type) for p in cell.parameters()} == {(torch.float64, "meta")}

    def test_the_state_has_the_parameters_dtype(self, make):
        _, state = sl.Loop(make(dtype=torch.float64), backend="reference")(torch.zeros(2, 3, 3).double())
        assert {value.dtype for value in state.values()} == {torch.float64}

    def test_copies_and_pickles(self, make):
        cell = make()
        x = torch.randn(4, 2, 3)
        expected, _ = sl.Loop(cell, backend="reference")(x)
        for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
            assert torch.equal(sl.Loop(other, backend="reference")(x)[0], expected)
            with torch.no_grad():
                next(other.parameters()).zero_()
            assert next(cell.parameters()).abs().sum() > 0

    def test_one_step_at_a_time(self, make):
        cell = make()
        x = torch.randn(4, 2, 3)
        expected, final = sl.Loop(cell, backend="reference")(x)
        stream = sl.Loop(cell, backend="reference").stream(2)
        torch.testing.assert_close(torch.stack([stream(step) for step in x]), expected)
        for name, value in final.items():
            torch.testing.assert_close(stream.state[name], value)

    def test_reset_parameters_draws_anew(self, make):
        cell = make()
        before = [p.clone() for p in cell.parameters()]
        cell.reset_parameters()
        assert not torch.equal(before[0], next(cell.parameters()))
        bound = SIZES[1] ** -0.5
        for name, p in cell.named_parameters():
            if "norm" not in name:
                assert p.abs().max() <= bound

    def test_under_autocast_the_state_keeps_its_dtype(self, make):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, state = sl.Loop(make(), backend="reference")(torch.randn(4, 2, 3))
        assert {value.dtype for value in state.values()} == {torch.float32}


def test_repr_names_the_sizes():
    assert "3, 5" in repr(sl.nn.GRUCell(3, 5))
    assert "3, 5, bias=False, nonlinearity=relu" in repr(sl.nn.RNNCell(3, 5, bias=False, nonlinearity="relu"))
    assert "proj_size=2" in repr(sl.nn.LSTMCell(3, 5, proj_size=2))
    assert "layer_norm='all'" in repr(sl.nn.LayerNormLSTMCell(3, 5, layer_norm="all"))


def test_layer_norm_lstm_parameters():
    names = {
        "gates": ["norm_i", "norm_f", "norm_g", "norm_o"],
        "all": ["norm_ih", "norm_hh", "norm_c"],
    }
    for kind, norms in names.items():
        cell = sl.nn.LayerNormLSTMCell(3, 5, layer_norm=kind)
        parameters = [n for n, _ in cell.named_parameters()]
        own = ["weight_ih", "weight_hh"] + (["bias"] if kind == "all" else [])
        assert parameters == own + [f"{norm}.{part}" for norm in norms for part in ("weight", "bias")]
    assert sl.nn.LayerNormLSTMCell(3, 5, layer_norm="all", eps=0.1).norm_c.eps == 0.1


@pytest.mark.parametrize("kind", ["gates", "all"])
def test_layer_norm_makes_the_scale_of_the_weights_irrelevant(kind):
    """Ba et al. 2016, table 1: invariant under re-scaling of a weight matrix (here all that one LN sees)."""
    cell = sl.nn.LayerNormLSTMCell(3, 5, layer_norm=kind, eps=0.0, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    given = {name: torch.randn(2, 5, dtype=torch.float64) for name in ("h", "c")}
    before, _ = sl.Loop(cell, backend="reference")(x, state=given)
    with torch.no_grad():
        cell.weight_ih.mul_(3.0)
        cell.weight_hh.mul_(3.0)
    after, _ = sl.Loop(cell, backend="reference")(x, state=given)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: sl.nn.GRUCell(0, 5), ValueError, "GRUCell: input_size must be greater than zero, got 0"),
        (lambda: sl.nn.GRUCell(3, -1), ValueError, "hidden_size must be greater than zero, got -1"),
        (lambda: sl.nn.GRUCell(3, 5.0), TypeError, "hidden_size must be an int, got float"),
        (lambda: sl.nn.LSTMCell(3, 5, proj_size=5), ValueError, r"proj_size must be in \[0, hidden_size=5\)"),
        (
            lambda: sl.nn.RNNCell(3, 5, nonlinearity="gelu"),
            ValueError,
            'must be "tanh" or "relu", got \'gelu\'',
        ),
        (
            lambda: sl.nn.LayerNormLSTMCell(3, 5, layer_norm="both"),
            ValueError,
            '"gates" or "all", got \'both\'',
        ),
        (lambda: sl.nn.LayerNormLSTMCell(3, 0), ValueError, "hidden_size must be greater than zero"),
    ],
)
def test_wrong_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_state_passed_by_hand_is_an_error_that_says_so():
    cell = sl.nn.LSTMCell(3, 5)
    with pytest.raises(sl.SteploopError, match="state"):
        cell(torch.randn(2, 3), (torch.zeros(2, 5), torch.zeros(2, 5)))
