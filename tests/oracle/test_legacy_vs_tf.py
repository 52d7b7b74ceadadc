"""Every option of the legacy models against TF1's own algorithm, unrolled in plain torch (legacy_tf.py): outputs,
final states and the gradients of all variables, for several sizes one after the other."""

from __future__ import annotations

import itertools

import legacy_tf as tf
import pytest
import torch
from torch.utils import _pytree as pytree

from steploop.seq2seq import legacy, tf_cells

INPUT, HIDDEN, MEMORY, NE, ND, E = 3, 4, 5, 7, 6, 3
CELLS = {
    "rnn": ("rnn", HIDDEN),
    "gru": ("gru", HIDDEN),
    "lstm": ("lstm", HIDDEN),
    "flat lstm": ("lstm", HIDDEN),
    "3 lstms": ("multi", [("lstm", HIDDEN), ("lstm", 5), ("lstm", HIDDEN)]),
    "gru on lstm": ("multi", [("lstm", 5), ("gru", HIDDEN)]),
    "projected gru": ("project", ("gru", HIDDEN), 5),
    "projected 3 grus": ("project", ("multi", [("gru", HIDDEN)] * 3), 5),
}
# (encoder steps, decoder steps, batch), one after the other on one model.
SIZES = [(5, 4, 3), (1, 1, 1), (2, 1, 3), (1, 6, 2)]


def make_cell(cell, flat=False):
    kind, of = cell[0], cell[1]
    if kind == "multi":
        return tf_cells.MultiRNNCell([make_cell(layer, flat) for layer in of], state_is_tuple=not flat)
    if kind == "project":
        return tf_cells.OutputProjectionWrapper(make_cell(of, flat), cell[2])
    if kind == "lstm":
        return tf_cells.BasicLSTMCell(of, state_is_tuple=not flat)
    return {"rnn": tf_cells.BasicRNNCell, "gru": tf_cells.GRUCell}[kind](of)


def cell_of(name):
    return make_cell(CELLS[name], name.startswith("flat"))


def randomised(model, scale=0.5):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)
    return model


def floats(steps, batch, size=INPUT):
    return [torch.randn(batch, size, requires_grad=True) for _ in range(steps)]


def labels(steps, batch, of):
    return [torch.randint(of, (batch,)) for _ in range(steps)]


def projection_of(cell, of=ND):
    torch.manual_seed(6)
    return torch.randn(tf.outputs(cell), of), torch.randn(of)


def flat(result):
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def parts(state, cell):
    """A state's tensors as the oracle has them: an LSTM's c and h apart."""
    leaves = flat(state)
    if [leaf.shape[1] for leaf in leaves] != tf.sizes(cell):
        leaves = torch.cat(leaves, 1).split(tf.sizes(cell), 1)
    return list(leaves)


def check(model, run_model, run_oracle, leaves=(), values=1e-5, gradients=1e-5):
    """Both give the same values, and the same gradients of every variable and of `leaves`."""
    variables = {v.name: v for v in model.tf_variables(model.scope)}
    weights = {n: v.view(v.parameter).detach().clone().requires_grad_() for n, v in variables.items()}
    expected = flat(run_oracle(tf.Weights(weights, model.scope)))
    found = flat(run_model())
    assert len(found) == len(expected)
    for k, (a, b) in enumerate(zip(found, expected)):
        torch.testing.assert_close(a, b, rtol=values, atol=values, msg=lambda m: f"result {k}: {m}")
    generator = torch.Generator().manual_seed(8)
    cotangents = [torch.randn(b.shape, generator=generator) for b in expected]
    model.zero_grad()
    wanted = gradients_of(expected, cotangents, [*weights.values(), *leaves])
    got = gradients_of(found, cotangents, [*model.parameters(), *leaves])
    by_parameter = dict(zip(map(id, model.parameters()), got))
    for name, gradient in zip([*weights, *range(len(leaves))], wanted):
        if isinstance(name, str):
            one = variables[name].view(by_parameter[id(variables[name].parameter)])
        else:
            one = got[len(got) - len(leaves) + name]
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(
            one, gradient, rtol=gradients, atol=gradients * scale, msg=lambda m: f"gradient of {name}: {m}"
        )


def gradients_of(results, cotangents, leaves):
    kept = [(r, c) for r, c in zip(results, cotangents) if r.requires_grad]
    return torch.autograd.grad(
        [r for r, _ in kept], leaves, [c for _, c in kept], allow_unused=True, materialize_grads=True
    )


P = torch.randn(ND, INPUT, generator=torch.Generator().manual_seed(3))


def loop_function_of(size):
    """tanh(prev P) + 0.1 i, with i as the models or TF give it."""
    return lambda prev, i: torch.tanh(prev @ P[:size]) + 0.1 * i


def given_state(cell, model_cell, batch):
    state = [torch.randn(batch, size, requires_grad=True) for size in tf.sizes(cell)]
    packed = state
    if [s for s in pytree.tree_leaves(model_cell.state_size)] != tf.sizes(cell):
        packed = [torch.cat(state, 1)]
    structure = pytree.tree_flatten(model_cell.state_size)[1]
    return state, pytree.tree_unflatten(packed, structure)


BACKENDS = ["reference", "auto"]
FED = [(name, fed) for name in CELLS for fed in (False, True)]


@pytest.mark.parametrize("cell, fed", FED, ids=lambda value: str(value))
def test_rnn_decoder(cell, fed):
    made = cell_of(cell)
    function = loop_function_of(tf.outputs(CELLS[cell])) if fed else None
    model = randomised(legacy.RNNDecoder(made, function, input_size=INPUT, backend="reference"))
    for _, steps, batch in SIZES:
        inputs = floats(steps, batch)
        state, packed = given_state(CELLS[cell], made, batch)
        check(
            model,
            lambda: split(model(inputs, packed), CELLS[cell]),
            lambda w: tf.rnn_decoder(inputs, state, CELLS[cell], w, function),
            [*inputs, *state],
        )


def split(result, cell):
    outputs, state = result
    return outputs, parts(state, cell)


@pytest.mark.parametrize("cell", CELLS)
def test_basic_rnn_seq2seq(cell):
    model = legacy.BasicRNNSeq2Seq(cell_of(cell), input_size=INPUT, backend="reference")
    randomised(model)
    for source, target, batch in SIZES:
        inputs = floats(source, batch), floats(target, batch)
        check(
            model,
            lambda: split(model(*inputs), CELLS[cell]),
            lambda w: tf.basic_rnn_seq2seq(*inputs, CELLS[cell], w),
            [*inputs[0], *inputs[1]],
        )


@pytest.mark.parametrize("cell, fed", FED, ids=lambda value: str(value))
def test_tied_rnn_seq2seq(cell, fed):
    function = loop_function_of(tf.outputs(CELLS[cell])) if fed else None
    model = legacy.TiedRNNSeq2Seq(cell_of(cell), function, input_size=INPUT, backend="reference")
    randomised(model)
    for source, target, batch in SIZES:
        inputs = floats(source, batch), floats(target, batch)
        check(
            model,
            lambda: split(model(*inputs), CELLS[cell]),
            lambda w: tf.tied_rnn_seq2seq(*inputs, CELLS[cell], w, function),
            [*inputs[0], *inputs[1]],
        )


FEEDS = [False, True, torch.tensor(False), torch.tensor(True)]
# feed_previous, projected, update_embedding_for_previous
LABEL_OPTIONS = list(itertools.product(FEEDS, (False, True), (False, True)))


def fed_and_update(feed, update):
    """What TF does: whether outputs are fed back; update None: as TF1, by the kind of feed_previous."""
    return bool(feed), not isinstance(feed, torch.Tensor) if update is None else update


@pytest.mark.parametrize("cell", ["lstm", "projected gru"])
@pytest.mark.parametrize("feed, projected, update", LABEL_OPTIONS, ids=str)
def test_embedding_rnn_decoder(cell, feed, projected, update):
    projection = projection_of(CELLS[cell]) if projected else None
    symbols = ND if projected else tf.outputs(CELLS[cell])
    made = cell_of(cell)
    model = legacy.EmbeddingRNNDecoder(made, symbols, E, projection, feed, update, backend="reference")
    randomised(model)
    for _, steps, batch in SIZES:
        inputs = labels(steps, batch, symbols)
        state, packed = given_state(CELLS[cell], made, batch)
        check(
            model,
            lambda: split(model(inputs, packed), CELLS[cell]),
            lambda w: tf.embedding_rnn_decoder(inputs, state, CELLS[cell], w, projection, bool(feed), update),
            state,
        )


@pytest.mark.parametrize("cell", ["gru", "3 lstms"])
@pytest.mark.parametrize("feed, projected", list(itertools.product(FEEDS, (False, True))), ids=str)
@pytest.mark.parametrize("update", [None, False, True])
def test_embedding_rnn_seq2seq(cell, feed, projected, update):
    projection = projection_of(CELLS[cell]) if projected else None
    model = legacy.EmbeddingRNNSeq2Seq(
        cell_of(cell), NE, ND, E, projection, feed, update_embedding_for_previous=update, backend="reference"
    )
    randomised(model)
    for source, target, batch in SIZES:
        inputs = labels(source, batch, NE), labels(target, batch, ND)
        check(
            model,
            lambda: split(model(*inputs), CELLS[cell]),
            lambda w: tf.embedding_rnn_seq2seq(*inputs, CELLS[cell], ND, w, projection, *fed_and_update(feed, update)),
        )


@pytest.mark.parametrize("cell", ["rnn", "gru on lstm"])
@pytest.mark.parametrize("feed", FEEDS, ids=str)
@pytest.mark.parametrize("projected, symbols", [(True, None), (False, None), (False, 4)], ids=str)
def test_embedding_tied_rnn_seq2seq(cell, feed, projected, symbols):
    projection = projection_of(CELLS[cell], NE) if projected else None
    model = legacy.EmbeddingTiedRNNSeq2Seq(cell_of(cell), NE, E, symbols, projection, feed, backend="reference")
    randomised(model)
    for source, target, batch in SIZES:
        inputs = labels(source, batch, NE), labels(target, batch, NE)
        check(
            model,
            lambda: split(model(*inputs), CELLS[cell]),
            lambda w: tf.embedding_tied_rnn_seq2seq(
                *inputs, CELLS[cell], symbols or NE, w, projection, *fed_and_update(feed, None)
            ),
        )


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("heads, from_state, size, fed", [(1, False, None, True), (3, True, 6, False)], ids=str)
def test_attention_decoder(cell, heads, from_state, size, fed):
    function = loop_function_of(size or tf.outputs(CELLS[cell])) if fed else None
    made = cell_of(cell)
    model = legacy.AttentionDecoder(
        made,
        size,
        heads,
        function,
        initial_state_attention=from_state,
        input_size=INPUT,
        attention_size=MEMORY,
        backend="reference",
    )
    randomised(model)
    for source, steps, batch in SIZES:
        inputs, memory = floats(steps, batch), torch.randn(batch, source, MEMORY, requires_grad=True)
        state, packed = given_state(CELLS[cell], made, batch)
        check(
            model,
            lambda: split(model(inputs, packed, memory), CELLS[cell]),
            lambda w: tf.attention_decoder(inputs, state, memory, CELLS[cell], w, heads, function, from_state),
            [*inputs, *state, memory],
        )


@pytest.mark.parametrize("feed, projected, update", LABEL_OPTIONS, ids=str)
def test_embedding_attention_decoder(feed, projected, update):
    cell, size = CELLS["gru on lstm"], 5 if projected else ND
    made, projection = cell_of("gru on lstm"), None
    if projected:
        torch.manual_seed(6)
        projection = torch.randn(size, ND), torch.randn(ND)
    model = legacy.EmbeddingAttentionDecoder(
        made,
        ND,
        E,
        2,
        size,
        projection,
        feed,
        update,
        initial_state_attention=projected,
        attention_size=MEMORY,
        backend="reference",
    )
    randomised(model)
    for source, steps, batch in SIZES:
        inputs, memory = labels(steps, batch, ND), torch.randn(batch, source, MEMORY, requires_grad=True)
        state, packed = given_state(cell, made, batch)
        check(
            model,
            lambda: split(model(inputs, packed, memory), cell),
            lambda w: tf.embedding_attention_decoder(
                inputs, state, memory, cell, w, 2, projection, bool(feed), update, projected
            ),
            [*state, memory],
        )


@pytest.mark.parametrize("cell", ["gru", "lstm", "3 lstms"])
@pytest.mark.parametrize("feed, projected", list(itertools.product(FEEDS, (False, True))), ids=str)
@pytest.mark.parametrize("heads, from_state", [(1, True), (2, False)], ids=str)
def test_embedding_attention_seq2seq(cell, feed, projected, heads, from_state):
    projection = projection_of(CELLS[cell]) if projected else None
    model = legacy.EmbeddingAttentionSeq2Seq(
        cell_of(cell),
        NE,
        ND,
        E,
        heads,
        projection,
        feed,
        initial_state_attention=from_state,
        backend="reference",
    )
    randomised(model)
    for source, target, batch in SIZES:
        inputs = labels(source, batch, NE), labels(target, batch, ND)
        check(
            model,
            lambda: split(model(*inputs), CELLS[cell]),
            lambda w: tf.embedding_attention_seq2seq(
                *inputs, CELLS[cell], ND, w, heads, projection, *fed_and_update(feed, None), from_state
            ),
        )


@pytest.mark.parametrize("feed", FEEDS, ids=str)
def test_one2many_rnn_seq2seq(feed):
    encoder, cells, symbols = ("lstm", 4), {"a": ("lstm", 4), "b": ("lstm", 4)}, {"a": 6, "b": 5}
    model = legacy.One2ManyRNNSeq2Seq(
        make_cell(encoder),
        {name: make_cell(cell) for name, cell in cells.items()},
        NE,
        symbols,
        E,
        feed,
        backend="reference",
    )
    randomised(model)
    for source, target, batch in SIZES:
        inputs = labels(source, batch, NE)
        decoders = {"a": labels(target, batch, 6), "b": labels(source, batch, 5)}

        def run_oracle(weights, inputs=inputs, decoders=decoders):
            found = tf.one2many_rnn_seq2seq(inputs, decoders, encoder, cells, symbols, weights, bool(feed))
            return {n: o for n, (o, _) in found.items()}, {n: list(s) for n, (_, s) in found.items()}

        check(model, lambda: model(inputs, decoders), run_oracle)


# ---- compiled ----------------------------------------------------------------------------------------------

# Of gradients, of the largest entry; sums of many steps in another order.
LONG = {"values": 1e-4, "gradients": 1e-4}


@pytest.mark.parametrize("feed", [False, True])
def test_compiled_for_sizes_one_after_the_other(feed):
    """The largest model, one instance for all sizes: a length never seen, one step, one row."""
    cell = CELLS["3 lstms"]
    model = legacy.EmbeddingAttentionSeq2Seq(make_cell(cell), NE, ND, E, 2, None, feed, initial_state_attention=True)
    randomised(model, 0.4)
    for source, target, batch in [*SIZES, (100, 100, 2), (5, 4, 3)]:
        inputs = labels(source, batch, NE), labels(target, batch, ND)
        tolerance = LONG if source == 100 else {}
        check(
            model,
            lambda: split(model(*inputs), cell),
            lambda w: tf.embedding_attention_seq2seq(*inputs, cell, ND, w, 2, None, feed, True, from_state=True),
            **tolerance,
        )


def test_compiled_with_a_loop_function_and_its_step_number():
    cell, function = CELLS["projected 3 grus"], loop_function_of(5)
    made = make_cell(cell)
    model = randomised(legacy.RNNDecoder(made, function, input_size=INPUT))
    for _, steps, batch in [*SIZES, (0, 100, 2)]:
        inputs = floats(steps, batch)
        state, packed = given_state(cell, made, batch)
        check(
            model,
            lambda: split(model(inputs, packed), cell),
            lambda w: tf.rnn_decoder(inputs, state, cell, w, function),
            [*inputs, *state],
        )


def test_given_and_fed_back_in_turns_on_one_model():
    """feed_previous by call, as bool and as tensor: nothing of one call stays for the next."""
    cell = CELLS["gru"]
    model = randomised(legacy.EmbeddingRNNSeq2Seq(make_cell(cell), NE, ND, E))
    switch = torch.tensor(True)
    for k, feed in enumerate([False, True, switch, False, switch, True, switch]):
        if isinstance(feed, torch.Tensor):
            feed.fill_(k != 4)
        inputs = labels(4, 3, NE), labels(5, 3, ND)
        check(
            model,
            lambda: split(model(*inputs, feed_previous=feed), cell),
            lambda w: tf.embedding_rnn_seq2seq(*inputs, cell, ND, w, None, *fed_and_update(feed, None)),
        )
