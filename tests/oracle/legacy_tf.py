"""tf.contrib.legacy_seq2seq in plain torch, unrolled over lists as TF1 does it; it does not use steploop.

Weights are a dict {TF1 name: tensor}; a cell is a description: ("gru", 4), ("lstm", 4), ("rnn", 4),
("multi", [cells]), ("project", cell, outputs). States are flat lists of tensors, an LSTM's c before its h.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


class Weights:
    """The variables below a scope."""

    def __init__(self, variables, scope=""):
        self.variables, self.scope = variables, scope

    def __truediv__(self, name):
        return Weights(self.variables, f"{self.scope}/{name}" if self.scope else name)

    def __getitem__(self, name):
        return self.variables[f"{self.scope}/{name}"]

    def linear(self, *inputs):
        return torch.cat(inputs, 1) @ self["kernel"] + self["bias"]


def sizes(cell):
    """The sizes of a cell's states."""
    kind, of = cell[0], cell[1]
    if kind == "multi":
        return [size for layer in of for size in sizes(layer)]
    return sizes(of) if kind == "project" else [of, of] if kind == "lstm" else [of]


def outputs(cell):
    kind, of = cell[0], cell[1]
    return outputs(of[-1]) if kind == "multi" else cell[2] if kind == "project" else of


def zeros(cell, like):
    return [like.new_zeros(like.shape[0], size) for size in sizes(cell)]


def run_cell(cell, weights, x, state):
    kind, of = cell[0], cell[1]
    if kind == "project":
        inside = weights / "output_projection_wrapper"
        y, state = run_cell(of, inside, x, state)
        return inside.linear(y), state
    if kind == "multi":
        after = []
        for k, layer in enumerate(of):
            count = len(sizes(layer))
            x, new = run_cell(layer, weights / f"multi_rnn_cell/cell_{k}", x, state[:count])
            state, after = state[count:], after + new
        return x, after
    if kind == "rnn":
        h = torch.tanh((weights / "basic_rnn_cell").linear(x, state[0]))
        return h, [h]
    if kind == "gru":
        inside, (h,) = weights / "gru_cell", state
        r, u = torch.sigmoid((inside / "gates").linear(x, h)).split(of, 1)
        c = torch.tanh((inside / "candidate").linear(x, r * h))
        h = u * h + (1 - u) * c
        return h, [h]
    c, h = state
    i, j, f, o = (weights / "basic_lstm_cell").linear(x, h).split(of, 1)
    c = c * torch.sigmoid(f + 1.0) + torch.sigmoid(i) * torch.tanh(j)
    h = torch.tanh(c) * torch.sigmoid(o)
    return h, [c, h]


def static_rnn(cell, weights, inputs, state=None):
    state = zeros(cell, inputs[0]) if state is None else state
    found = []
    for x in inputs:
        y, state = run_cell(cell, weights, x, state)
        found.append(y)
    return found, state


def argmax_and_embed(embedding, projection, update):
    def function(prev, _):
        if projection is not None:
            prev = prev @ projection[0] + projection[1]
        found = F.embedding(prev.argmax(1), embedding)
        return found if update else found.detach()

    return function


def rnn_decoder(inputs, state, cell, weights, loop_function=None):
    found = []
    for i, x in enumerate(inputs):
        if loop_function is not None and i:
            x = loop_function(found[-1], i)
        y, state = run_cell(cell, weights, x, state)
        found.append(y)
    return found, state


def embedding_rnn_decoder(inputs, state, cell, weights, projection=None, feed=False, update=True):
    embedding = weights["embedding"]
    function = argmax_and_embed(embedding, projection, update) if feed else None
    embedded = [F.embedding(x, embedding) for x in inputs]
    return rnn_decoder(embedded, state, cell, weights / "rnn_decoder", function)


def attention_decoder(inputs, state, memory, cell, weights, heads, loop_function=None, from_state=False):
    def attention(state):
        found = []
        for a in range(heads):
            y = (weights / f"Attention_{a}").linear(*state)
            keys = memory @ weights[f"AttnW_{a}"][0, 0]
            scores = (weights[f"AttnV_{a}"] * torch.tanh(keys + y[:, None])).sum(2)
            found.append((scores.softmax(1)[:, :, None] * memory).sum(1))
        return found

    attns = attention(state) if from_state else [memory.new_zeros(memory.shape[0], memory.shape[2])] * heads
    found = []
    for i, x in enumerate(inputs):
        if loop_function is not None and i:
            x = loop_function(found[-1], i)
        y, state = run_cell(cell, weights, weights.linear(x, *attns), state)
        attns = attention(state)
        found.append((weights / "AttnOutputProjection").linear(y, *attns))
    return found, state


def embedding_attention_decoder(
    inputs, state, memory, cell, weights, heads=1, projection=None, feed=False, update=True, from_state=False
):
    embedding = weights["embedding"]
    function = argmax_and_embed(embedding, projection, update) if feed else None
    embedded = [F.embedding(x, embedding) for x in inputs]
    inside = weights / "attention_decoder"
    return attention_decoder(embedded, state, memory, cell, inside, heads, function, from_state)


def embedded_encoder(inputs, cell, weights):
    inside = weights / "rnn/embedding_wrapper"
    return static_rnn(cell, inside, [F.embedding(x, inside["embedding"]) for x in inputs])


def basic_rnn_seq2seq(encoder, decoder, cell, weights):
    _, state = static_rnn(cell, weights / "rnn", encoder)
    return rnn_decoder(decoder, state, cell, weights / "rnn_decoder")


def tied_rnn_seq2seq(encoder, decoder, cell, weights, loop_function=None):
    inside = weights / "tied_rnn_seq2seq"
    _, state = static_rnn(cell, inside, encoder)
    return rnn_decoder(decoder, state, cell, inside, loop_function)


def embedding_rnn_seq2seq(encoder, decoder, cell, labels, weights, projection=None, feed=False, update=True):
    _, state = embedded_encoder(encoder, cell, weights)
    cell = cell if projection is not None else ("project", cell, labels)
    inside = weights / "embedding_rnn_decoder"
    return embedding_rnn_decoder(decoder, state, cell, inside, projection, feed, update)


def embedding_tied_rnn_seq2seq(encoder, decoder, cell, labels, weights, projection=None, feed=False, update=True):
    embedding = weights["embedding"]
    cell = cell if projection is not None else ("project", cell, labels)
    function = argmax_and_embed(embedding, projection, update) if feed else None
    embedded = ([F.embedding(x, embedding) for x in inputs] for inputs in (encoder, decoder))
    return tied_rnn_seq2seq(*embedded, cell, weights / "combined_tied_rnn_seq2seq", function)


def embedding_attention_seq2seq(
    encoder,
    decoder,
    cell,
    labels,
    weights,
    heads=1,
    projection=None,
    feed=False,
    update=True,
    from_state=False,
):
    memory, state = embedded_encoder(encoder, cell, weights)
    cell = cell if projection is not None else ("project", cell, labels)
    return embedding_attention_decoder(
        decoder,
        state,
        torch.stack(memory, 1),
        cell,
        weights / "embedding_attention_decoder",
        heads,
        projection,
        feed,
        update,
        from_state,
    )


def one2many_rnn_seq2seq(encoder, decoders, encoder_cell, cells, labels, weights, feed=False, update=True):
    _, state = embedded_encoder(encoder, encoder_cell, weights)
    return {
        name: embedding_rnn_decoder(
            inputs,
            state,
            ("project", cells[name], labels[name]),
            weights / f"one2many_decoder_{name}/embedding_rnn_decoder",
            None,
            feed,
            update,
        )
        for name, inputs in decoders.items()
    }
