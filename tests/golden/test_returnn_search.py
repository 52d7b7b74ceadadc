"""Numbers of the peer RETURNN: beam search with its own length normalisation, and a loop that ends by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import steploop as sl

FOLDER = Path(__file__).parent / "returnn_search"


def files(start):
    return sorted(path.name for path in FOLDER.glob(f"{start}*.npz"))


def load(name):
    arrays = np.load(FOLDER / name)
    return {key: torch.as_tensor(arrays[key]) for key in arrays.files}


class Decoder(sl.Step):
    """LSTM decoder with dot attention. Before the first label stands a vector of zeros; no end label is read."""

    def __init__(self, arrays):
        super().__init__()
        for key, value in arrays.items():
            if key.startswith("param/"):
                self.register_buffer(
                    key.removeprefix("param/output/rec/").replace("/", "_").removeprefix("param_"), value
                )
        self.h, self.c, self.att = (sl.State(6) for _ in range(3))

    def step(self, label, *, encoder, context, there):
        embedded = F.embedding(label.clamp(min=0), self.target_embed_W)
        embedded = torch.where(label.unsqueeze(1) >= 0, embedded, torch.zeros_like(embedded))
        z = torch.cat([embedded, self.att.prev, self.h.prev], -1) @ self.s_rec_lstm_cell_kernel
        i, j, f, o = (z + self.s_rec_lstm_cell_bias).chunk(4, -1)
        self.c.next = torch.sigmoid(f + 1) * self.c.prev + torch.sigmoid(i) * torch.tanh(j)
        h = torch.sigmoid(o) * torch.tanh(self.c.next)
        self.h.next = h
        energy = torch.einsum("bsk,bk->bs", context, h @ self.s_transformed_W)
        weights = sl.nn.masked_softmax(energy, there)
        self.att.next = torch.einsum("bs,bsk->bk", weights, encoder)
        readout = torch.cat([h, embedded, self.att.next], -1) @ self.readout_in_W + self.readout_in_b
        return readout.unflatten(-1, (4, 2)).amax(-1) @ self.output_prob_W + self.output_prob_b


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", files("16"))
def test_beam_search_with_length_normalization(name, backend):
    arrays = load(name)
    step = Decoder(arrays)
    data, lengths = arrays["in/data"], arrays["in_len/data"]
    encoder = torch.tanh(data @ arrays["param/encoder/W"] + arrays["param/encoder/b"])
    context = encoder @ arrays["param/enc_ctx/W"] + arrays["param/enc_ctx/b"]
    batch, size = arrays["extra/beam_scores"].shape
    normalised = "lennorm" in name
    hyps = sl.search.beam(
        step, start=-1, end=0, max_steps=2 * data.shape[1], size=size, n_best=size, stop="all",
        length_penalty="returnn" if normalised else None, encoder=encoder, context=context,
        there=sl.length_mask(lengths, data.shape[1]), backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(hyps.scores, arrays["extra/beam_scores"], rtol=1e-5, atol=1e-5)
    assert hyps.lengths.flatten().tolist() == arrays["extra/lens"].tolist()
    tokens = arrays["extra/tokens"]
    steps = min(tokens.shape[1], hyps.labels.shape[2])
    assert torch.equal(hyps.labels.flatten(0, 1)[:, :steps], tokens[:, :steps].long())
    assert hyps.lengths[:, 0].tolist() == arrays["extra/decision_len"].tolist()
    assert hyps.labels.shape[0] == batch


class Growing(sl.Step):
    """s = prev:s + x; ends when the sum of s is above 1.5; gives 2 s + t."""

    def __init__(self):
        super().__init__()
        self.s = sl.State(2)
        self.at = sl.memory.StepIndex()
        self.done = sl.State(init=False, dtype=torch.bool)

    def step(self, *, data):
        self.s.next = self.s.prev + data
        self.done.next = self.s.next.sum(-1) > 1.5
        return 2 * self.s.next + self.at().unsqueeze(1)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", files("17b"))
def test_a_loop_that_ends_by_itself(name, backend):
    arrays = load(name)
    data = arrays["in/data"].requires_grad_()
    loop = sl.Loop(Growing(), batch_first=True, until="done", backend=backend)
    outputs, state = loop(steps=arrays["out/output"].shape[1], data=data)
    assert state.steps.tolist() == arrays["out_len/output/axis1"].tolist()
    torch.testing.assert_close(outputs, arrays["out/output"][:, : outputs.shape[1]], rtol=1e-5, atol=1e-5)
    outputs.backward(arrays["ct/output"][:, : outputs.shape[1]])
    torch.testing.assert_close(data.grad, arrays["grad/input/data"], rtol=1e-5, atol=1e-4)
