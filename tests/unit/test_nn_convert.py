"""Weights of other frameworks against the frameworks' formulas, written out here in NumPy; there and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import steploop as sl
from steploop.nn import convert

I, H, T, B = 3, 4, 5, 2


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) * 0.5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(x, gates, order, forget_bias=0.0):
    """h of all steps; gates(x, h) -> (B, 4H) in `order`, the letters i f g o."""
    h = c = np.zeros((x.shape[1], H), np.float32)
    found = []
    for step in x:
        part = dict(zip(order, np.split(gates(step, h), 4, axis=1)))
        c = sigmoid(part["f"] + forget_bias) * c + sigmoid(part["i"]) * np.tanh(part["g"])
        h = sigmoid(part["o"]) * np.tanh(c)
        found.append(h)
    return np.stack(found)


def gru(x, step):
    h, found = np.zeros((x.shape[1], H), np.float32), []
    for one in x:
        h = step(one, h)
        found.append(h)
    return np.stack(found)


# ---- what each framework computes ---------------------------------------------------------------------------


def keras_lstm(x, arrays):
    """keras.layers.LSTM: i, f, c, o."""
    kernel, recurrent, bias = arrays
    return lstm(x, lambda x, h: x @ kernel + h @ recurrent + bias, "ifgo")


def keras_gru(x, arrays):
    """keras.layers.GRU: z, r, h; a bias (2, 3H) is one of reset_after=True."""
    kernel, recurrent, bias = arrays

    def step(x, h):
        if bias.ndim == 2:
            (xz, xr, xh), (hz, hr, hh) = (
                np.split(v @ w + b, 3, axis=1) for v, w, b in zip((x, h), (kernel, recurrent), bias)
            )
            z, r = sigmoid(xz + hz), sigmoid(xr + hr)
            candidate = np.tanh(xh + r * hh)
        else:
            xz, xr, xh = np.split(x @ kernel + bias, 3, axis=1)
            uz, ur, uh = np.split(recurrent, 3, axis=1)
            z, r = sigmoid(xz + h @ uz), sigmoid(xr + h @ ur)
            candidate = np.tanh(xh + (r * h) @ uh)
        return z * h + (1 - z) * candidate

    return gru(x, step)


def tf1_lstm(forget_bias):
    """BasicLSTMCell: i, j, f, o, the forget bias added at run time."""

    def run(x, arrays):
        kernel, bias = arrays
        gates = lambda x, h: np.concatenate([x, h], 1) @ kernel + bias
        return lstm(x, gates, "igfo", forget_bias)

    return run


def tf1_gru(x, arrays):
    """GRUCell: r, u; r multiplies h before the product."""
    gates, gates_bias, candidate, candidate_bias = arrays

    def step(x, h):
        r, u = np.split(sigmoid(np.concatenate([x, h], 1) @ gates + gates_bias), 2, axis=1)
        c = np.tanh(np.concatenate([x, r * h], 1) @ candidate + candidate_bias)
        return u * h + (1 - u) * c

    return gru(x, step)


def returnn_lstm(x, arrays):
    """NativeLstm2: j, i, f, o."""
    w, w_re, b = arrays
    return lstm(x, lambda x, h: x @ w + h @ w_re + b, "gifo")


def onnx_lstm(x, arrays):
    """LSTM: i, o, f, c; W[iofc], R[iofc], Wb and Rb."""
    w, r, b = (array[0] for array in arrays)
    return lstm(x, lambda x, h: x @ w.T + h @ r.T + b[: 4 * H] + b[4 * H :], "iofg")


def onnx_gru(linear_before_reset):
    """GRU: z, r, h."""

    def run(x, arrays):
        w, r, b = (array[0] for array in arrays)
        (wz, wr, wh), (rz, rr, rh) = np.split(w, 3), np.split(r, 3)
        bz, br, bh, cz, cr, ch = np.split(b, 6)

        def step(x, h):
            z = sigmoid(x @ wz.T + h @ rz.T + bz + cz)
            r = sigmoid(x @ wr.T + h @ rr.T + br + cr)
            if linear_before_reset:
                candidate = np.tanh(x @ wh.T + r * (h @ rh.T + ch) + bh)
            else:
                candidate = np.tanh(x @ wh.T + (r * h) @ rh.T + ch + bh)
            return (1 - z) * candidate + z * h

        return gru(x, step)

    return run


def keras_arrays(gates, *bias):
    return [random(I, gates * H), random(H, gates * H), random(*bias)]


def onnx_arrays(gates, directions=1):
    shapes = ((gates * H, I), (gates * H, H), (2 * gates * H,))
    return [random(directions, *shape) for shape in shapes]


FORGET = {"forget_bias": 0.7}
BEFORE = {"reset_after": False}
TF1_GRU = [random(I + H, 2 * H), random(2 * H), random(I + H, H), random(H)]
# framework, kind, arrays, formula, options of from_* and to_*, options of the cell
CASES = {
    "keras lstm": ("keras", "lstm", keras_arrays(4, 4 * H), keras_lstm, {}, {}),
    "keras gru, reset after": ("keras", "gru", keras_arrays(3, 2, 3 * H), keras_gru, {}, {}),
    "keras gru, reset before": ("keras", "gru", keras_arrays(3, 3 * H), keras_gru, {}, BEFORE),
    "tf1 lstm": ("tf1", "lstm", [random(I + H, 4 * H), random(4 * H)], tf1_lstm(1.0), {}, {}),
    "tf1 lstm, forget bias": (
        "tf1", "lstm", [random(I + H, 4 * H), random(4 * H)], tf1_lstm(0.7), FORGET, {}
    ),
    "tf1 gru": ("tf1", "gru", TF1_GRU, tf1_gru, {}, BEFORE),
    "returnn lstm": ("returnn", "lstm", keras_arrays(4, 4 * H), returnn_lstm, {}, {}),
    "onnx lstm": ("onnx", "lstm", onnx_arrays(4), onnx_lstm, {}, {}),
    "onnx gru, linear before reset": ("onnx", "gru", onnx_arrays(3), onnx_gru(True), {}, {}),
    "onnx gru": ("onnx", "gru", onnx_arrays(3), onnx_gru(False), {}, BEFORE),
}  # fmt: skip


def functions(framework):
    return getattr(convert, f"from_{framework}"), getattr(convert, f"to_{framework}")


def cell_with(kind, weights, **options):
    cell = {"lstm": sl.nn.LSTMCell, "gru": sl.nn.GRUCell}[kind](I, H, **options)
    cell.load_state_dict(weights, strict=True)
    return cell


@pytest.mark.parametrize("name", CASES)
def test_a_cell_computes_what_the_framework_does(name):
    framework, kind, arrays, formula, options, of_cell = CASES[name]
    cell = cell_with(kind, functions(framework)[0](kind, arrays, **options), **of_cell)
    x = random(T, B, I)
    outputs, _ = sl.Loop(cell, backend="reference")(torch.from_numpy(x))
    np.testing.assert_allclose(outputs.detach().numpy(), formula(x, arrays), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name):
    """A cell of ours, with two biases of its own, computes the same in the framework; arrays come back as given."""
    framework, kind, arrays, formula, options, of_cell = CASES[name]
    load, give = functions(framework)
    back = {**options, **(of_cell if framework == "keras" else {})}
    again = give(kind, load(kind, arrays, **options), **back)
    assert len(again) == len(arrays)
    for one, other in zip(arrays, again):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)

    torch.manual_seed(1)
    cell = {"lstm": sl.nn.LSTMCell, "gru": sl.nn.GRUCell}[kind](I, H, **of_cell)
    x = random(T, B, I)
    expected, _ = sl.Loop(cell, backend="reference")(torch.from_numpy(x))
    found = formula(x, give(kind, cell.state_dict(), **back))
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case[5]])
def test_two_directions(name):
    """A bidirectional layer: the framework's forward outputs beside those of its backward part."""
    framework, kind, arrays, formula, options, _ = CASES[name]
    load, give = functions(framework)
    other = [array[..., ::-1].copy() for array in arrays]
    if framework == "onnx":
        both = [np.concatenate(pair) for pair in zip(arrays, other)]
    else:
        both = [*arrays, *other]
    layer = {"lstm": sl.nn.LSTM, "gru": sl.nn.GRU}[kind](I, H, bidirectional=True, backend="reference")
    layer.load_state_dict(load(kind, both, **options), strict=True)
    x = random(T, B, I)
    outputs, _ = layer(torch.from_numpy(x))
    expected = np.concatenate([formula(x, arrays), formula(x[::-1], other)[::-1]], -1)
    np.testing.assert_allclose(outputs.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    for one, again in zip(both, give(kind, layer.state_dict(), **options)):
        np.testing.assert_allclose(again, one, rtol=1e-5, atol=1e-6)


def test_the_names_of_a_layer_and_no_bias():
    arrays = keras_arrays(4, 4 * H)
    assert list(convert.from_keras("lstm", arrays, layer=2)) == [
        "weight_ih_l2", "weight_hh_l2", "bias_ih_l2", "bias_hh_l2",
    ]  # fmt: skip
    found = convert.from_keras("lstm", arrays[:2])
    assert not found["bias_ih"].any() and not found["bias_hh"].any()
    plain = sl.nn.LSTMCell(I, H, bias=False)
    kernel, _, bias = convert.to_keras("lstm", plain.state_dict())
    assert kernel.shape == (I, 4 * H) and not bias.any()


def test_tensors_are_copies():
    arrays = keras_arrays(4, 4 * H)
    found = convert.from_keras("lstm", arrays)
    found["weight_ih"].zero_()
    assert arrays[0].any()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: convert.from_keras("rnn", []), ["which kind", '"lstm" or "gru"']),
        (lambda: convert.from_keras("lstm", [random(3)]), ["number of arrays", "3, or 6"]),
        (lambda: convert.from_keras("gru", keras_arrays(4, 16)), ["one GRU", "3 gates"]),
        (lambda: convert.from_onnx("lstm", [random(16, 3)] * 3), ["three axes"]),
        (lambda: convert.from_onnx("lstm", [*onnx_arrays(4), random(1, 12)]), ["peepholes"]),
        (lambda: convert.from_returnn("gru", []), ["no native GRU"]),
        (lambda: convert.from_tf1("lstm", [random(4, 16), random(16)]), ["rows for the inputs"]),
        (lambda: convert.to_keras("gru", sl.nn.LSTMCell(I, H).state_dict()), ["not the weights of one GRU"]),
        (lambda: convert.to_keras("lstm", {}), ["weight_ih_l0", "nothing"]),
        (lambda: convert.to_onnx("lstm", sl.nn.LSTMCell(I, H, proj_size=2).state_dict()), ["no projections"]),
    ],
)
def test_errors(call, words):
    with pytest.raises((sl.InputError, sl.UnsupportedError)) as error:
        call()
    for word in words:
        assert word.lower() in str(error.value).lower(), str(error.value)
