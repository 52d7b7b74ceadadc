"""The legacy models in `sl.search`: greedy search is feed_previous=True."""

from __future__ import annotations

import pytest
import torch

import steploop as sl
from steploop.seq2seq import legacy, tf_cells

B, H, E, NE, ND, STEPS = 3, 5, 4, 6, 7, 8


def models():
    torch.manual_seed(0)
    projection = torch.randn(H, ND), torch.randn(ND)
    sizes = (NE, ND, E)
    return {
        "rnn": legacy.EmbeddingRNNSeq2Seq(tf_cells.GRUCell(H), *sizes),
        "rnn projected outside": legacy.EmbeddingRNNSeq2Seq(tf_cells.BasicLSTMCell(H), *sizes, projection),
        "tied": legacy.EmbeddingTiedRNNSeq2Seq(tf_cells.GRUCell(H), ND, E),
        "attention": legacy.EmbeddingAttentionSeq2Seq(tf_cells.BasicLSTMCell(H), *sizes, 2),
        "attention projected outside": legacy.EmbeddingAttentionSeq2Seq(
            tf_cells.MultiRNNCell([tf_cells.GRUCell(H), tf_cells.GRUCell(H)]), *sizes, 1, projection,
            initial_state_attention=True,
        ),
        "one2many": legacy.One2ManyRNNSeq2Seq(
            tf_cells.GRUCell(H), {"a": tf_cells.GRUCell(H), "b": tf_cells.GRUCell(H)}, NE, {"a": ND, "b": 5}, E
        ),
    }  # fmt: skip


def labels_of(model, outputs):
    projection = model.decoder.output_projection
    scores = outputs if projection is None else outputs @ projection[0] + projection[1]
    return scores.argmax(-1).T


@pytest.mark.parametrize("name", models())
def test_greedy_search_gives_what_is_fed_back(name):
    model = models()[name]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    for inputs, lengths in [
        (torch.randint(0, NE, (4, B)), None),
        (torch.randint(0, NE, (6, B)), torch.tensor([6, 2, 3])),
    ]:
        start, given = torch.tensor([1, 2, 0]), torch.zeros(STEPS, B, dtype=torch.int64)
        given[0] = start
        search = {"start": start, "end": None, "max_steps": STEPS, "backend": "reference"}
        found = model.search_step(inputs, encoder_lengths=lengths)
        if name == "one2many":
            outputs, _ = model(inputs, {"a": given, "b": given}, feed_previous=True, encoder_lengths=lengths)
            for key in "ab":
                hyps = sl.search.greedy(found[key], **search)
                assert torch.equal(hyps.best(), outputs[key].argmax(-1).T)
            continue
        outputs, _ = model(inputs, given, feed_previous=True, encoder_lengths=lengths)
        expected = labels_of(model, outputs)
        hyps = sl.search.greedy(found, **search)
        assert torch.equal(hyps.best(), expected)
        again = model.search_step(inputs, encoder_lengths=lengths)
        assert again.step is found.step  # what was captured of it stays
        ended = sl.search.beam(again, **{**search, "end": 0}, size=4)
        log_probs = sl.search.rescore(
            again, ended.labels, ended.lengths, start=start, end=0, finished=ended.finished, backend="reference"
        )
        torch.testing.assert_close(log_probs, ended.log_probs)


def test_a_search_with_what_the_model_brings_itself_is_an_error():
    found = models()["rnn"].search_step(torch.zeros(2, B, dtype=torch.int64))
    with pytest.raises(sl.InputError, match="`state` was given, and the model brings its own"):
        sl.search.greedy(found, start=1, end=0, max_steps=3, state=found.state)
