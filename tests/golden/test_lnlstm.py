"""LSTM and layer-norm LSTM against numbers of another implementation: values and all gradients.

The files in lnlstm/ hold runs of OpenAI Baselines' `lstm` and `lnlstm` (a2c/utils.py) under TensorFlow,
float32:
in:x (T, B, I); in:mask (T, B), 1 = return to zero before this step; in:state (B, 2H), c before h; out:h,
out:state;
var:*, the weights, gates in the order i, f, o, u; L = sum(out:h * cot:h) + sum(out:state * cot:state); and
L's gradients, grad:* of the weights and gin:* of x and the given state.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import steploop as sl
from steploop.seq2seq.lnlstm import LNLSTM

FILES = sorted((Path(__file__).parent / "lnlstm").glob("*.npz"))

# Baselines' name -> the parameters it stands for. Its one bias is our bias_ih; bias_hh is zero.
NAMES = {
    "wx": "weight_ih",
    "wh": "weight_hh",
    "gx": "norm_ih.weight",
    "bx": "norm_ih.bias",
    "gh": "norm_hh.weight",
    "bh": "norm_hh.bias",
    "gc": "norm_c.weight",
    "bc": "norm_c.bias",
}


def load(path):
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files if key != "meta"}


def gates_first(array):
    """(..., 4H) with gates i, f, o, u -> (4H, ...) with gates i, f, g, o."""
    i, f, o, u = np.split(array, 4, axis=-1)
    return torch.from_numpy(np.concatenate([i, f, u, o], axis=-1).T.copy())


def ours(golden, prefix, cell):
    """The golden's weights, or their gradients, under our names and in our layout."""
    bias = "bias_ih" if isinstance(cell, sl.nn.LSTMCell) else "bias"
    values = {}
    for key, array in golden.items():
        if key.startswith(prefix):
            name = key.split("/")[-1].removesuffix(":0")
            is_gates = name not in ("gc", "bc")
            values[(NAMES | {"b": bias})[name]] = gates_first(array) if is_gates else torch.from_numpy(array)
    return values


def make_cell(golden):
    inputs, hidden = golden["in:x"].shape[-1], golden["out:h"].shape[-1]
    if any("gx" in key for key in golden):
        cell = sl.nn.LayerNormLSTMCell(inputs, hidden, layer_norm="all", eps=1e-5)
    else:
        cell = sl.nn.LSTMCell(inputs, hidden)
    weights = ours(golden, "var:", cell)
    if isinstance(cell, sl.nn.LSTMCell):
        weights["bias_hh"] = torch.zeros(4 * hidden)
    cell.load_state_dict(weights, strict=True)
    return cell


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_values_and_gradients(path, backend):
    golden = load(path)
    cell = make_cell(golden)
    x = torch.from_numpy(golden["in:x"]).requires_grad_()
    given = torch.from_numpy(golden["in:state"]).requires_grad_()
    c, h = given.chunk(2, dim=-1)

    loop = sl.Loop(cell, backend=backend)
    outputs, state = loop(
        x, state=sl.States({"h": h, "c": c}), resets=torch.from_numpy(golden["in:mask"]) > 0
    )
    final = torch.cat([state["c"], state["h"]], dim=-1)
    torch.testing.assert_close(outputs, torch.from_numpy(golden["out:h"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(final, torch.from_numpy(golden["out:state"]), rtol=1e-5, atol=1e-6)

    value = (outputs * torch.from_numpy(golden["cot:h"])).sum() + (
        final * torch.from_numpy(golden["cot:state"])
    ).sum()
    assert abs(value.item() - golden["L"]) < 1e-5 * max(1.0, abs(float(golden["L"])))
    value.backward()
    expected = ours(golden, "grad:", cell)
    assert len(expected) >= 3
    parameters = dict(cell.named_parameters())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            parameters[name].grad, gradient, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}"
        )
    torch.testing.assert_close(x.grad, torch.from_numpy(golden["gin:x"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given.grad, torch.from_numpy(golden["gin:state"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", ["done", "keep"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_layer_with_masks(path, backend, mask):
    """Baselines' own arguments and names, as lists; the mask as it is there, and its complement."""
    golden = load(path)
    inputs, hidden = golden["in:x"].shape[-1], golden["out:h"].shape[-1]
    layer = LNLSTM(inputs, hidden, layer_norm=path.stem.startswith("ln"), mask=mask, backend=backend)
    weights = {name.removeprefix("var:"): value for name, value in golden.items() if name.startswith("var:")}
    layer.load_tf_variables(weights)
    assert set(layer.to_tf_variables()) == set(weights)
    xs = [torch.from_numpy(x).requires_grad_() for x in golden["in:x"]]
    done = torch.from_numpy(golden["in:mask"])
    ms = done if mask == "done" else [1 - m for m in done.unsqueeze(-1)]
    given = torch.from_numpy(golden["in:state"]).requires_grad_()
    hs, final = layer(xs, ms, given)
    outputs = torch.stack(hs)
    torch.testing.assert_close(outputs, torch.from_numpy(golden["out:h"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(final, torch.from_numpy(golden["out:state"]), rtol=1e-5, atol=1e-6)
    cotangents = [torch.from_numpy(golden[f"cot:{name}"]) for name in ("h", "state")]
    torch.autograd.backward([outputs, final], cotangents)
    for variable in layer.tf_variables(layer.scope):
        expected = torch.from_numpy(golden[f"grad:{variable.name}:0"])
        torch.testing.assert_close(variable.parameter.grad, expected, rtol=1e-4, atol=1e-5)
    of_x = torch.stack([x.grad for x in xs])
    torch.testing.assert_close(of_x, torch.from_numpy(golden["gin:x"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given.grad, torch.from_numpy(golden["gin:state"]), rtol=1e-4, atol=1e-5)


def test_masks_and_states_that_are_none():
    layer, x, s = LNLSTM(3, 4, backend="reference"), torch.randn(5, 2, 3), torch.zeros(2, 8)
    for ms in (torch.full((5, 2), 0.5), torch.zeros(2, 5), [0, 1], [torch.zeros(3)] * 5, []):
        with pytest.raises(sl.InputError, match="1 where a new episode starts"):
            layer(x, ms, s)
    with pytest.raises(sl.StateError, match="c, then h"):
        layer(x, torch.zeros(5, 2), s[:, :4])
    with pytest.raises(sl.InputError, match="which mask"):
        LNLSTM(3, 4, mask="reset")
    bools, _ = layer(x, torch.zeros(5, 2, dtype=torch.bool), s)
    torch.testing.assert_close(bools, layer(x, torch.zeros(5, 2), s)[0])


def test_the_golden_files_are_there():
    assert {path.stem for path in FILES} >= {
        f"{cell}_mask_{kind}" for cell in ("lnlstm", "lstm") for kind in ("first", "mixed")
    }
