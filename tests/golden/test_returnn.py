"""Numbers of the peer RETURNN (index.json says which version and what each case means), from models built of
`sl.memory`: unequal lengths, values and gradients, in every backend."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import steploop as sl
from steploop import memory

FOLDER = Path(__file__).parent / "returnn"
INDEX = json.loads((FOLDER / "index.json").read_text())["cases"]
MODELS = {}


def golden(name):
    """Marks a model as the one of a case; it is built from the case's parameters."""

    def mark(kind):
        MODELS[name] = kind
        return kind

    return mark


class Model(sl.Step):
    """A step with the parameters of a case. `self["rec/W"]` is the one whose name ends so."""

    reads = ("data",)  # sequences, in order
    output = "output"
    result = staticmethod(lambda y, lengths: y)

    def __init__(self, parameters):
        super().__init__()
        self.names = list(parameters)
        self.held = nn.ParameterList(parameters.values())
        self.build()

    def build(self):
        pass

    def __getitem__(self, end):
        (index,) = [i for i, name in enumerate(self.names) if name.endswith(end)]
        return self.held[index]

    def linear(self, x, layer):
        y = x @ self[f"{layer}/W"]
        return y + self[f"{layer}/b"] if any(name.endswith(f"{layer}/b") for name in self.names) else y

    def constants(self, given, lengths):
        return {}


class NativeLSTM(sl.Step):
    """Gates (cell-in, input, forget, output), no forget bias."""

    def __init__(self, w, w_re, b):
        super().__init__()
        self.w, self.w_re, self.b = w, w_re, b
        self.h, self.c = sl.State(len(w_re)), sl.State(len(w_re))

    def step(self, x):
        j, i, f, o = (x @ self.w + self.h.prev @ self.w_re + self.b).chunk(4, -1)
        self.c.next = torch.sigmoid(f) * self.c.prev + torch.sigmoid(i) * torch.tanh(j)
        self.h.next = torch.sigmoid(o) * torch.tanh(self.c.next)
        return self.h.next


def native_lstm(model, layer):
    return NativeLSTM(model[f"{layer}/rec/W"], model[f"{layer}/rec/W_re"], model[f"{layer}/rec/b"])


@golden("01b_cumsum_initial")
class CumSum(Model):
    def build(self):
        self.x = memory.CumSum(1)

    def step(self, data):
        return self.x(data)


@golden("02a_window_left")
class Window(Model):
    def build(self):
        self.win = memory.Window(3)

    def step(self, data):
        return self.win(data)


@golden("03a_cumconcat_selfatt_1head")
class SelfAttention(Model):
    def build(self):
        self.attention = memory.CausalSelfAttention(1, scale=1.0)

    def step(self, data):
        q, k, v = self.linear(data, "qkv").split([5, 5, 6], -1)
        return self.linear(self.attention(q, k, v), "rec/output")


class OverHistory(SelfAttention):
    """The same, spelled out over all keys and values so far."""

    def build(self):
        self.keys, self.values = memory.History(), memory.History()

    def step(self, data):
        q, k, v = self.linear(data, "qkv").split([5, 5, 6], -1)
        keys, values = self.keys(k), self.values(v)
        energy = torch.einsum("bk,bsk->bs", q, keys.values).masked_fill(~keys.mask, float("-inf"))
        return self.linear(torch.einsum("bs,bsv->bv", energy.softmax(-1), values.values), "rec/output")


@golden("04a_masked_lstm_auto_unmask")
class MaskedLSTM(Model):
    def build(self):
        self.masked = memory.Masked(native_lstm(self, "masked"))

    def step(self, data):
        return self.linear(self.masked(data, where=data.sum(-1) > 0), "rec/output")


@golden("05a_edit_distance_table")
class EditDistance(Model):
    def build(self):
        self.ed = memory.EditDistance()

    def constants(self, given, lengths):
        return {"target": given["tgt"], "target_lengths": lengths["tgt"]}

    def step(self, data, target, target_lengths):
        return self.ed(data, target=target, target_lengths=target_lengths)

    @staticmethod
    def result(y, lengths):
        inside = torch.arange(y.shape[-1]) <= lengths["tgt"][:, None]
        return torch.where(inside[:, None], y, 0)


@golden("06_rec_step_info")
class StepInfo(Model):
    def build(self):
        self.i = memory.StepIndex()

    def step(self, data):
        return data + 0.1 * self.i().unsqueeze(-1)


@golden("07a_lstm_nativelstm2")
class LSTM(Model):
    def build(self):
        self.lstm = native_lstm(self, "lstm")

    def step(self, data):
        return self.linear(self.lstm(data), "rec/output")


@golden("09a_dot_energy_encdec")
class Dot(Model):
    output = "output/energy"

    def constants(self, given, lengths):
        return {"enc": given["enc"]}

    def step(self, data, enc):
        return torch.einsum("bk,bsk->bs", data @ self["q/W"], enc @ self["enc_ctx/W"])

    @staticmethod
    def result(y, lengths):
        return y * (torch.arange(y.shape[-1]) < lengths["enc"][:, None])[:, None]


@golden("10a_att_decoder_dot_teacher_forcing")
class Decoder(Model):
    reads = ("classes",)
    output = "output/output_prob"

    def build(self):
        self.previous = memory.Delay()
        self.h, self.c, self.att = sl.State(6), sl.State(6), sl.State(6)

    def constants(self, given, lengths):
        encoder = torch.tanh(self.linear(given["data"], "encoder"))
        mask = torch.arange(encoder.shape[1]) < lengths["data"][:, None]
        return {"encoder": encoder, "context": self.linear(encoder, "enc_ctx"), "there": mask}

    def step(self, label, encoder, context, there):
        embedded = self.previous(F.embedding(label, self["target_embed/W"]))
        z = torch.cat([embedded, self.att.prev, self.h.prev], -1) @ self["lstm_cell/kernel"]
        i, j, f, o = (z + self["lstm_cell/bias"]).chunk(4, -1)
        self.c.next = torch.sigmoid(f + 1) * self.c.prev + torch.sigmoid(i) * torch.tanh(j)
        h = torch.sigmoid(o) * torch.tanh(self.c.next)
        self.h.next = h
        energy = torch.einsum("bsk,bk->bs", context, h @ self["s_transformed/W"])
        weights = energy.masked_fill(~there, float("-inf")).softmax(-1)
        att = torch.einsum("bs,bsk->bk", weights, encoder)
        self.att.next = att
        readout = self.linear(torch.cat([h, embedded, att], -1), "readout_in")
        readout = readout.unflatten(-1, (4, 2)).amax(-1)
        return self.linear(readout, "output_prob").softmax(-1)


@golden("11a_inner_lstm_over_window_fwd")
class InnerLSTM(Model):
    def build(self):
        self.win = memory.Window(3)
        self.lstm = memory.SequenceRNN(native_lstm(self, "lstm"))

    def step(self, data):
        return self.lstm(self.win(data))


@golden("14a_pos_enc_add")
class PositionalEncoding(Model):
    def build(self):
        self.encoding = memory.PositionalEncoding(7)

    def step(self, data):
        return self.encoding(data)


@golden("15a_transformer_dec1")
class Transformer(Model):
    reads = ("classes",)
    output = "output/output_prob"

    def build(self):
        self.previous = memory.Delay(init=0)
        self.position = memory.PositionalEncoding(8)
        self.attention = memory.CausalSelfAttention(2)

    def norm(self, x, layer):
        return F.layer_norm(x, (8,), self[f"{layer}/scale"], self[f"{layer}/bias"], 1e-6)

    def feed_forward(self, x, block):
        inner = torch.relu(self.linear(self.norm(x, f"{block}_ff_laynorm"), f"{block}_ff_conv1"))
        return x + self.linear(inner, f"{block}_ff_conv2")

    def qkv(self, x, block):
        parts = (x @ self[f"{block}_self_att_att/QKV"]).unflatten(-1, (2, 12)).split(4, -1)
        return [part.flatten(-2) for part in parts]

    def constants(self, given, lengths):
        embedded = F.embedding(given["data"], self["source_embed_raw/W"]) * 8**0.5
        x, _ = sl.Loop(memory.PositionalEncoding(8), batch_first=True)(embedded)
        there = torch.arange(x.shape[1]) < lengths["data"][:, None]
        q, k, v = self.qkv(self.norm(x, "enc_01_self_att_laynorm"), "enc_01")
        x = x + self.linear(attend(q, k, v, there), "enc_01_self_att_lin")
        encoder = self.norm(self.feed_forward(x, "enc_01"), "encoder")
        return {
            "keys": self.linear(encoder, "dec_01_att_key0"),
            "values": self.linear(encoder, "dec_01_att_value0"),
            "there": there,
        }

    def step(self, label, keys, values, there):
        x = self.position(F.embedding(self.previous(label), self["target_embed_raw/W"]) * 8**0.5)
        q, k, v = self.qkv(self.norm(x, "dec_01_self_att_laynorm"), "dec_01")
        x = x + self.linear(self.attention(q, k, v), "dec_01_self_att_lin")
        query = self.linear(self.norm(x, "dec_01_att_laynorm"), "dec_01_att_query0")
        x = x + self.linear(attend(query.unsqueeze(1), keys, values, there).squeeze(1), "dec_01_att_lin")
        x = self.norm(self.feed_forward(x, "dec_01"), "rec/decoder")
        return self.linear(x, "output_prob").softmax(-1)


def attend(q, k, v, there):
    """Two heads of size 4; q (B, T, 8), k and v (B, S, 8), there (B, S)."""
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k, v))
    scores = (q @ k.transpose(2, 3) * 4**-0.5).masked_fill(~there[:, None, None], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@golden("18b_prev_shift_ones")
class Shift(Model):
    def build(self):
        self.previous = memory.Delay(init=1)

    def step(self, data):
        x = torch.tanh(self.linear(data, "rec/x"))
        return self.linear(torch.cat([self.previous(x), data], -1), "rec/output")


@golden("19a_twod_lstm_last")
class TwoDLSTM(Model):
    def build(self):
        self.lstm = memory.TwoDLSTM(5, 4, 4, bias=False)
        with torch.no_grad():
            for name, value in (
                ("weight_source", self["W_re"][:5]),
                ("weight_target", self["W_re"][5:]),
                ("weight_h", self["Vh_re"]),
                ("weight_v", self["Vv_re"]),
            ):
                getattr(self.lstm, name).copy_(value.t())

    def __getitem__(self, end):
        return super().__getitem__("rec-twod/" + end)

    def constants(self, given, lengths):
        return {"source": given["enc"], "source_lengths": lengths["enc"]}

    def step(self, data, source, source_lengths):
        return self.lstm(data, source=source, source_lengths=source_lengths)


VARIANTS = [*MODELS.items(), ("03a_cumconcat_selfatt_1head", OverHistory)]


def load(name):
    arrays = np.load(FOLDER / f"{name}.npz")
    found = {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}
    return {key: v.long() if v.dtype == torch.int32 else v for key, v in found.items()}


def under(arrays, prefix):
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def test_every_case_has_a_model():
    assert set(MODELS) == set(INDEX)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name, kind", VARIANTS, ids=[kind.__name__ for _, kind in VARIANTS])
def test_same_numbers(name, kind, backend):
    arrays = load(name)
    given = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in under(arrays, "in/").items()}
    lengths = under(arrays, "in_len/")
    model = kind({key: nn.Parameter(value) for key, value in under(arrays, "param/").items()})
    loop = sl.Loop(model, batch_first=True, backend=backend)
    constants = model.constants(given, lengths)
    y, _ = loop(*[given[n] for n in kind.reads], lengths=lengths[kind.reads[0]], **constants)
    y = kind.result(y, lengths)
    expected = arrays[f"out/{kind.output}"]
    torch.testing.assert_close(y, expected.to(y.dtype), rtol=1e-5, atol=1e-5)
    if f"ct/{kind.output}" not in arrays:
        return
    y.backward(arrays[f"ct/{kind.output}"])
    for key, value in under(arrays, "grad/input/").items():
        close(given[key].grad, value, key)
    gradients = dict(zip(model.names, (p.grad for p in model.held), strict=True))
    for key, value in under(arrays, "grad/param/").items():
        close(gradients[key], value, key)


def close(found, expected, what):
    """To 1e-5 of the largest entry: RETURNN's own numbers are float32 sums."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * scale, msg=lambda m: f"{what}: {m}")
