"""The porting guide docs/porting/returnn.md, with RETURNN's own weights: its code gives RETURNN's own numbers.

By the plain loop, which the other tests compare with the compiled one.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import steploop as sl
from steploop import dispatch

FOLDER = Path(__file__).parent / "returnn"
PAGE = Path(__file__).parents[2] / "docs" / "porting" / "returnn.md"


def load(name):
    arrays = np.load(FOLDER / f"{name}.npz")
    return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}


@pytest.fixture
def page(monkeypatch):
    """What the page's code defines, up to where it searches."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    blocks = [block for block in blocks if "sl.search" not in block]
    space, run = {"__name__": "page"}, dispatch.run
    monkeypatch.setattr(dispatch, "run", lambda program, call, *_: run(program, call, "reference"))
    exec(compile("\n".join(blocks), str(PAGE), "exec"), space)
    return space


def test_a_native_lstm():
    arrays = load("07a_lstm_nativelstm2")
    cell = sl.nn.LSTMCell(len(arrays["param/output/rec/lstm/rec/W"]), len(arrays["param/output/rec/lstm/rec/W_re"]))
    cell.load_state_dict(
        sl.nn.convert.from_returnn("lstm", [arrays[f"param/output/rec/lstm/rec/{n}"] for n in ("W", "W_re", "b")])
    )
    y, _ = sl.Loop(cell, batch_first=True, backend="reference")(arrays["in/data"], lengths=arrays["in_len/data"].long())
    y = y @ arrays["param/output/rec/output/W"] + arrays["param/output/rec/output/b"]
    y = y * sl.length_mask(arrays["in_len/data"].long(), y.shape[1]).unsqueeze(-1)
    torch.testing.assert_close(y, arrays["out/output"], rtol=1e-5, atol=1e-5)


def test_the_pages_decoder(page):
    arrays = load("10a_att_decoder_dot_teacher_forcing")
    names = {key.removeprefix("param/"): value for key, value in arrays.items() if key.startswith("param/")}

    def found(end):
        (value,) = [v for key, v in names.items() if key.endswith(end)]
        return value

    decoder = page["Decoder"](len(found("output_prob/b")))
    cell = sl.nn.convert.from_tf1("lstm", [found("lstm_cell/kernel"), found("lstm_cell/bias")], forget_bias=1.0)
    decoder.load_state_dict(
        {
            "embedding.weight": found("target_embed/W"),
            **{f"s.{name}": value for name, value in cell.items()},
            "s_transformed.weight": found("s_transformed/W").t(),
            "readout_in.weight": found("readout_in/W").t(),
            "readout_in.bias": found("readout_in/b"),
            "output.weight": found("output_prob/W").t(),
            "output.bias": found("output_prob/b"),
        }
    )
    encoder = torch.tanh(arrays["in/data"] @ found("encoder/W") + found("encoder/b"))
    valid = sl.length_mask(arrays["in_len/data"].long(), encoder.shape[1])
    lengths = arrays["in_len/classes"].long()
    scores, _ = sl.Loop(decoder, batch_first=True, backend="reference")(
        arrays["in/classes"].long(), lengths=lengths,
        encoder=encoder, enc_ctx=encoder @ found("enc_ctx/W") + found("enc_ctx/b"), valid=valid,
    )  # fmt: skip
    probabilities = scores.softmax(-1) * sl.length_mask(lengths, scores.shape[1]).unsqueeze(-1)
    torch.testing.assert_close(probabilities, arrays["out/output/output_prob"], rtol=1e-5, atol=1e-5)


def test_the_pages_self_attention(page):
    QKV = load("15a_transformer_dec1")["param/output/rec/dec_01_self_att_att/QKV"]
    attention = sl.memory.CausalSelfAttention(2, len(QKV), bias=False)
    attention.qkv.load_state_dict({"weight": page["qkv_weight"](QKV, 2, 8, 8)})
    x = torch.randn(5, 3, len(QKV))
    q, k, v = (part.flatten(-2) for part in (x @ QKV).unflatten(-1, (2, 12)).split(4, -1))
    expected, _ = sl.memory.CausalSelfAttention(2)(q, k, v)
    torch.testing.assert_close(attention(x)[0], expected)
    assert F.linear(x, attention.qkv.weight).shape == (5, 3, 24)
