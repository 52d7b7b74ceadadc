"""The legacy models: forms of inputs and outputs, what leaves the loop, extensions, checkpoints, and errors.

That they compute what TF1 does is tested in tests/oracle and tests/golden.
"""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import steploop as sl
from steploop.seq2seq import legacy, tf_cells

NE, ND, E, H = 7, 6, 3, 4


def ids(steps, batch, of=ND):
    return torch.randint(of, (steps, batch))


def attention_model(cell=None, **options):
    options = {"backend": "reference", **options}
    return legacy.EmbeddingAttentionSeq2Seq(cell or tf_cells.GRUCell(H), NE, ND, E, **options)


def attention_decoder(**options):
    options = {"input_size": E, "attention_size": 5, "backend": "reference", **options}
    return legacy.AttentionDecoder(tf_cells.GRUCell(H), **options)


# ---- forms -------------------------------------------------------------------------------------------------


def test_lists_give_lists_and_tensors_give_tensors():
    model = attention_model()
    source, target = ids(5, 3, NE), ids(4, 3)
    listed, state = model(list(source.int()), list(target.int()))
    outputs, other = model(source, target)
    assert isinstance(listed, list) and len(listed) == 4
    assert torch.equal(torch.stack(listed), outputs) and torch.equal(state, other)
    mixed, _ = model(source, list(target))
    assert isinstance(mixed, list)


def test_states_have_tfs_structure():
    lstm = lambda: tf_cells.BasicLSTMCell(H)
    shapes = lambda state: torch.utils._pytree.tree_map(lambda t: tuple(t.shape), state)
    cells = {
        (2, H): tf_cells.GRUCell(H),
        tf_cells.LSTMStateTuple((2, H), (2, H)): lstm(),
        (2, 2 * H): tf_cells.BasicLSTMCell(H, state_is_tuple=False),
        (tf_cells.LSTMStateTuple((2, H), (2, H)), (2, H)): tf_cells.MultiRNNCell([lstm(), tf_cells.GRUCell(H)]),
        (2, 3 * H): tf_cells.MultiRNNCell([lstm(), tf_cells.GRUCell(H)], state_is_tuple=False),
    }
    for expected, cell in cells.items():
        model = legacy.BasicRNNSeq2Seq(cell, input_size=E, backend="reference")
        _, state = model(torch.randn(3, 2, E), torch.randn(1, 2, E))
        assert shapes(state) == expected and type(shapes(state)) is type(expected)
        zeros = cell.zero_state(2)
        assert shapes(zeros) == expected
        outputs, _ = legacy.RNNDecoder(cell, backend="reference")(torch.randn(1, 2, E), zeros)
        assert outputs.shape == (1, 2, H)


@pytest.mark.parametrize(
    "make", [lambda: sl.nn.LSTMCell(E, H), lambda: sl.nn.GRUCell(E, H), lambda: Leaky()], ids=["lstm", "gru", "own"]
)
def test_any_step_may_be_the_cell(make):
    """With its state as the query of the attention; its weights have no names in TF1."""
    model = attention_model(make(), num_heads=2, initial_state_attention=True)
    outputs, _ = model(ids(5, 3, NE), ids(4, 3))
    assert outputs.shape == (4, 3, ND)
    outputs, _ = model(ids(5, 3, NE), ids(4, 3), feed_previous=True)
    assert outputs.shape == (4, 3, ND)
    with pytest.raises(sl.UnsupportedError, match="no names in a TF1 checkpoint"):
        model.to_tf_variables()


class Leaky(sl.Step):
    """Bad habits: a state changed in place, one that counts, and a dict of weights."""

    output_size = H

    def __init__(self):
        super().__init__()
        self.held = {"w": nn.Linear(E + H, H)}
        self.w, self.h, self.count = self.held["w"], sl.State(H), sl.State(1)

    def step(self, x):
        h = self.h.prev.mul(0.5)
        h += self.held["w"](torch.cat([x, h], -1)).tanh_()
        self.h.next = h
        self.count.next = self.count.prev + 1
        return h


def gradients_of(result, model):
    value = result[0].square().sum()
    return torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("feed", [False, True])
def test_a_strange_cell_compiled(feed):
    torch.manual_seed(2)
    model = attention_model(Leaky(), backend="auto")
    plain = copy.deepcopy(model)
    plain.backend = "reference"
    for source, target, batch in ((5, 4, 3), (1, 1, 1), (2, 7, 2)):
        inputs = ids(source, batch, NE), ids(target, batch)
        found, expected = (m(*inputs, feed_previous=feed) for m in (model, plain))
        torch.testing.assert_close(found, expected)
        grads = [gradients_of(*pair) for pair in ((found, model), (expected, plain))]
        torch.testing.assert_close(*grads)


def test_copies_pickles_and_state_dicts():
    model = attention_model(num_heads=2, feed_previous=True)
    source, target = ids(5, 3, NE), ids(4, 3)
    expected, _ = model(source, target)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(source, target)[0], expected)
        with torch.no_grad():
            other.decoder.one_step.embedding.zero_()
            next(other.encoder.parameters()).zero_()
        torch.testing.assert_close(model(source, target)[0], expected)
    fresh = attention_model(num_heads=2, feed_previous=True)
    fresh.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(fresh(source, target)[0], expected)
    assert len(model.state_dict()) == len(list(model.parameters()))


def test_replaced_parameters_are_seen_when_fed_back():
    model = attention_model(feed_previous=True, backend="auto")
    source, target = ids(5, 3, NE), ids(4, 3)
    model(source, target)
    model.decoder.one_step.embedding = nn.Parameter(torch.randn(ND, E))
    plain = copy.deepcopy(model)
    plain.backend = "reference"
    torch.testing.assert_close(model(source, target)[0], plain(source, target)[0])


def test_dtype_is_that_of_all_parameters():
    model = attention_model(dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(ids(3, 2, NE), ids(2, 2))[0].dtype == torch.float64


@pytest.mark.parametrize("feed", [False, True])
def test_autocast(feed):
    """Products in half precision; states keep the parameters' dtype."""
    model = attention_model(tf_cells.BasicLSTMCell(H), initial_state_attention=feed, backend="auto")
    source, target = ids(5, 3, NE), ids(4, 3)
    plain, _ = model(source, target, feed_previous=feed)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, state = model(source, target, feed_previous=feed)
    assert {part.dtype for part in (outputs, *state)} == {torch.float32}
    torch.testing.assert_close(outputs[0], plain[0], rtol=0.1, atol=0.1)
    outputs.sum().backward()


def test_the_backend_is_that_of_all_parts():
    model = attention_model(backend="auto")
    model.backend, model.save = "reference", "states"
    assert model.decoder.backend == "reference" and model.decoder.save == "states"
    with pytest.raises(sl.InputError, match="backend"):
        model.backend = "quick"


def test_no_steps():
    """A tensor of no steps gives no outputs, and the state as it was; an attention decoder refuses, as TF's."""
    model = legacy.EmbeddingRNNSeq2Seq(tf_cells.GRUCell(H), NE, ND, E, backend="reference")
    for feed in (False, True):
        outputs, state = model(ids(3, 2, NE), ids(0, 2), feed_previous=feed)
        assert outputs.shape == (0, 2, ND) and state.any()
    _, state = model(ids(0, 2, NE), ids(0, 2))
    assert not state.any()


def test_one_loop_function_for_scheduled_sampling():
    """Closes over the given inputs and picks them by the number of the step."""
    given = torch.randn(5, 2, E)

    def own_or_given(prev, i):
        return torch.where(i % 2 == 0, given[i.squeeze(1), torch.arange(len(i))], torch.tanh(prev[:, :E]))

    cell = tf_cells.GRUCell(H)
    loop = legacy.RNNDecoder(cell, own_or_given, input_size=E, backend="reference")
    one = legacy.RNNDecoder(cell, backend="reference")
    state = torch.randn(2, H)
    found, _ = loop(given, state)
    for k in range(5):
        x = given[k] if k % 2 == 0 else torch.tanh(found[k - 1][:, :E])
        expected, state = one([x], state)
        torch.testing.assert_close(found[k], expected[0])


# ---- what leaves the loop ----------------------------------------------------------------------------------


def names(ops):
    return [op.name for op in ops]


def test_with_given_labels_only_the_recurrence_is_in_the_loop():
    cell = tf_cells.MultiRNNCell([tf_cells.BasicLSTMCell(H) for _ in range(2)])
    model = attention_model(cell, num_heads=2, backend="eager")
    encoder, decoder = model.plans(ids(5, 3, NE), ids(4, 3))
    assert [len(loop.states) for loop in encoder.loops] == [2, 2]
    (loop,) = decoder.loops
    # [x, attended] and [x, h] of two layers, and the query: the parts that hang on the states.
    assert names(loop.ops).count("mm") == 4
    assert not {"embedding", "argmax"} & set(names(loop.ops))
    outside = names([*decoder.before, *decoder.after])
    # The embedded labels' part of the first Linear; the projection of the cell, and that of [it, attended].
    assert outside.count("mm") == 3 and "embedding" in outside
    backward = names([op for loop in decoder.backward.loops for op in loop.ops])
    assert "embedding_dense_backward" not in backward


def test_labels_fed_back_are_one_loop():
    model = attention_model(tf_cells.BasicLSTMCell(H), num_heads=2, feed_previous=True, backend="eager")
    _, decoder = model.plans(ids(5, 3, NE), ids(4, 3))
    (loop,) = decoder.loops
    assert {"argmax", "embedding"} <= set(names(loop.ops))
    assert "mm" not in names([*decoder.before, *decoder.after])
    decoder = legacy.RNNDecoder(
        tf_cells.GRUCell(H), lambda prev, i: torch.tanh(prev) + i, input_size=H, backend="eager"
    )
    (plan,) = decoder.plans(torch.randn(4, 2, H), torch.randn(2, H))
    assert len(plan.loops) == 1


def test_the_rnn_decoders_leave_one_product_in_the_loop():
    for cell, products in ((tf_cells.BasicLSTMCell(H), 1), (tf_cells.GRUCell(H), 2), (tf_cells.BasicRNNCell(H), 1)):
        model = legacy.EmbeddingRNNSeq2Seq(cell, NE, ND, E, backend="eager")
        for plan in model.plans(ids(5, 3, NE), ids(4, 3)):
            (loop,) = plan.loops
            assert names(loop.ops).count("mm") == products, plan
            assert "embedding" not in names(loop.ops)


# ---- extensions --------------------------------------------------------------------------------------------


def test_attention_lengths_leave_the_rest_unread():
    decoder = attention_decoder(initial_state_attention=True, num_heads=2)
    inputs, state, memory = torch.randn(4, 3, E), torch.randn(3, H), torch.randn(3, 6, 5)
    lengths = [6, 2, 1]
    dirty = memory.clone()
    dirty[1, 2:], dirty[2, 1:] = float("nan"), float("inf")
    dirty.requires_grad_()
    found, _ = decoder(inputs, state, dirty, attention_lengths=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone, _ = decoder(inputs[:, row : row + 1], state[row : row + 1], memory[row : row + 1, :length])
        torch.testing.assert_close(found[:, row : row + 1], alone)
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())
    assert dirty.grad.isfinite().all() and not dirty.grad[1, 2:].any()


def test_nothing_to_attend_to_gives_zeros():
    decoder = attention_decoder()
    inputs, state = torch.randn(2, 2, E), torch.randn(2, H)
    none, _ = decoder(inputs, state, torch.randn(2, 0, 5))
    zero, _ = decoder(inputs, state, torch.randn(2, 3, 5), attention_lengths=torch.tensor([0, 0]))
    torch.testing.assert_close(none, zero)


@pytest.mark.parametrize("feed", [False, True])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_lengths_are_as_rows_alone(feed, backend):
    model = attention_model(tf_cells.BasicLSTMCell(H), feed_previous=feed, backend=backend)
    source, target = ids(6, 3, NE), ids(5, 3)
    source_lengths, target_lengths = torch.tensor([6, 3, 1]), torch.tensor([2, 5, 0])
    found, state = model(source, target, encoder_lengths=source_lengths, decoder_lengths=target_lengths)
    for row in range(3):
        s, t = source_lengths[row], target_lengths[row]
        if t == 0:
            assert not found[:, row].any()
            continue
        alone, last = model(source[:s, row : row + 1], target[:t, row : row + 1])
        torch.testing.assert_close(found[:t, row : row + 1], alone)
        assert not found[t:, row].any()
        torch.testing.assert_close([part[row : row + 1] for part in state], list(last))


def test_inside_a_step_a_model_is_an_inner_sequence():
    class Outer(sl.Step):
        def __init__(self):
            super().__init__()
            self.model, self.h = legacy.EmbeddingRNNSeq2Seq(tf_cells.GRUCell(H), NE, ND, E), sl.State(ND)

        def step(self, words):  # (B, S)
            outputs, _ = self.model(words.t(), words.t()[:2] % ND)
            self.h.next = self.h.prev * 0.5 + outputs[-1]
            return self.h.next

    step = Outer()
    words = torch.randint(NE, (3, 2, 5))
    found, state = sl.Loop(step)(words)
    assert list(state) == ["h"]
    expected = torch.zeros(2, ND)
    for k in range(3):
        expected = expected * 0.5 + step.model(words[k].t(), words[k].t()[:2] % ND)[0][-1]
        torch.testing.assert_close(found[k], expected)


# ---- buckets -----------------------------------------------------------------------------------------------


def test_buckets_share_one_model_and_one_of_them_may_be_run():
    model = legacy.ModelWithBuckets([(2, 3), (5, 4)], attention_model())
    inputs = ids(5, 3, NE), ids(4, 3), ids(4, 3), torch.rand(4, 3)
    outputs, losses = model(*inputs)
    assert [len(o) for o in outputs] == [3, 4] and [loss.dim() for loss in losses] == [0, 0]
    expected, _ = model.seq2seq(inputs[0][:2], inputs[1][:3])
    torch.testing.assert_close(outputs[0], expected)
    torch.testing.assert_close(losses[0], legacy.sequence_loss(expected, inputs[2][:3], inputs[3][:3]))
    (one,), (loss,) = model(*(list(part[: (2 if k == 0 else 3)]) for k, part in enumerate(inputs)), bucket=0)
    assert isinstance(one, list)
    torch.testing.assert_close(loss, losses[0])
    seen = []

    def custom(labels, logits):
        seen.append(len(labels))
        return F.cross_entropy(logits, labels, reduction="none")

    _, rows = legacy.ModelWithBuckets([(5, 4)], model.seq2seq, custom, per_example_loss=True)(*inputs)
    assert rows[0].shape == (3,) and seen == [12]


def test_buckets_longer_than_what_is_given():
    model = legacy.ModelWithBuckets([(2, 3), (5, 4)], attention_model())
    inputs = [ids(5, 3, NE), ids(4, 3), ids(4, 3), torch.rand(4, 3)]
    for k, name in ((0, "encoder_inputs"), (2, "targets"), (3, "weights")):
        short = [*inputs]
        short[k] = short[k][:3]
        with pytest.raises(ValueError, match=f"{name} is shorter than the last bucket"):
            model(*short)
    for wrong in ([], [(2,)], [(0, 1)], 3):
        with pytest.raises(sl.InputError, match="pairs of sizes"):
            legacy.ModelWithBuckets(wrong, attention_model())


# ---- checkpoints -------------------------------------------------------------------------------------------


def test_names_with_and_without_zero_and_there_and_back():
    model = attention_model(num_heads=2)
    given = model.to_tf_variables()
    assert all(name.endswith(":0") for name in given)
    assert given["embedding_attention_seq2seq/rnn/embedding_wrapper/embedding"].shape == (NE, E)
    other = attention_model(num_heads=2)
    other.load_tf_variables({name.removesuffix(":0"): value for name, value in given.items()})
    for name, value in other.to_tf_variables().items():
        np.testing.assert_array_equal(value, given[name])
    given["embedding_attention_seq2seq/rnn/embedding_wrapper/embedding:0"][:] = 0
    assert model.encoder.embedding.all()  # copies
    with pytest.raises(KeyError):
        given["nothing"]


def test_one_error_lists_all_that_is_wrong_and_nothing_is_loaded():
    model = attention_model()
    given = dict(model.to_tf_variables())
    before = copy.deepcopy(model.state_dict())
    scope = "embedding_attention_seq2seq"
    given["global_step"] = np.array(3)
    del given[f"{scope}/rnn/embedding_wrapper/embedding:0"]
    given[f"{scope}/embedding_attention_decoder/embedding:0"] = np.zeros((2, 2), np.float32)
    with pytest.raises(sl.InputError) as error:
        model.load_tf_variables(given)
    text = str(error.value)
    assert "unknown: global_step ()" in text
    assert f"missing: {scope}/rnn/embedding_wrapper/embedding (7, 3)" in text
    assert f"wrong shape: {scope}/embedding_attention_decoder/embedding is (2, 2), the model has (6, 3)" in text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(sl.InputError, match='with ":0" and without'):
        model.load_tf_variables({"a": np.zeros(1), "a:0": np.zeros(1)})
    with pytest.raises(sl.InputError, match="arrays by name"):
        model.load_tf_variables([1])


def test_a_scope_of_ones_own():
    model = attention_model(scope="model/seq2seq")
    given = model.to_tf_variables()
    assert all(name.startswith("model/seq2seq/") for name in given)
    again = legacy.from_tf_variables(given, "embedding_attention_seq2seq", "model/seq2seq", backend="reference")
    inputs = ids(3, 2, NE), ids(3, 2)
    torch.testing.assert_close(again(*inputs), model(*inputs))
    under = {f"outer/{name}": value for name, value in attention_model().to_tf_variables().items()}
    assert legacy.from_tf_variables(under).scope == "outer/embedding_attention_seq2seq"


def test_what_a_checkpoint_does_not_tell():
    with pytest.raises(sl.InputError, match="do not tell which function"):
        legacy.from_tf_variables({"a/b": np.zeros(1)})
    with pytest.raises(sl.InputError, match="No such function"):
        legacy.from_tf_variables({}, "transformer")
    projection = torch.randn(H, ND), torch.randn(ND)
    given = attention_model(output_projection=projection).to_tf_variables()
    with pytest.raises(sl.InputError, match="go with an output_projection"):
        legacy.from_tf_variables(given)
    model = legacy.from_tf_variables(given, output_projection=projection)
    assert model.decoder.output_projection is projection or model.decoder.output_projection == projection
    with pytest.raises(sl.InputError, match="needed to tell the model's sizes"):
        legacy.from_tf_variables({"rnn_decoder/gru_cell/candidate/bias": np.zeros(4)})
    with pytest.raises(sl.InputError, match="There is no cell"):
        legacy.from_tf_variables({"rnn_decoder/other": np.zeros(4)})


# ---- errors ------------------------------------------------------------------------------------------------


def wrong(make, *words):
    with pytest.raises(sl.SteploopError) as error:
        make()
    for word in words:
        assert word in str(error.value), str(error.value)
    assert "test_legacy_models.py" in str(error.value)
    return error.value


def test_attention_decoder_errors():
    state, memory = torch.randn(3, H), torch.randn(3, 6, 5)
    decoder = attention_decoder()
    for none in ([], torch.randn(0, 3, E)):
        assert isinstance(wrong(lambda: decoder(none, state, memory), "at least one"), ValueError)
    for heads in (0, -1):
        error = wrong(lambda: attention_decoder(num_heads=heads), "less than one head")
        assert isinstance(error, ValueError)
    error = wrong(lambda: attention_decoder(attention_size=None), "attention_size=")
    assert isinstance(error, ValueError)
    wrong(lambda: decoder(torch.randn(2, 3, E), state, memory[:, :, :4]), "attention_states", "(3, L, 5)")
    wrong(lambda: decoder(torch.randn(2, 3, E), state, memory[0]), "attention_states")
    wrong(lambda: decoder(torch.randn(2, 3, E), state, memory, attention_lengths=[1.0] * 3), "attention_lengths")
    wrong(lambda: decoder(torch.randn(2, 3, E), state, memory, attention_lengths=[1, 2]), "(3,) integers")


def test_inputs_that_are_none():
    model = legacy.RNNDecoder(tf_cells.GRUCell(H), input_size=E, backend="reference")
    state = torch.randn(2, H)
    wrong(lambda: model([], state), "decoder_inputs", "an empty list")
    wrong(lambda: model(np.zeros((2, 2, E)), state), "neither a tensor nor a list", "a ndarray")
    wrong(lambda: model([np.zeros((2, E))], state), "a list with a ndarray")
    wrong(lambda: model(torch.randn(2, 2, 9), state), "(T, B, 3)", "(2, 2, 9)")
    wrong(lambda: model([torch.randn(2, E), torch.randn(3, E)], state), "differ in shape")
    labels = legacy.EmbeddingRNNSeq2Seq(tf_cells.GRUCell(H), NE, ND, E, backend="reference")
    wrong(lambda: labels(torch.randn(2, 2), ids(2, 2)), "encoder_inputs", "not a sequence of labels")
    wrong(lambda: labels(ids(2, 2, NE), [torch.zeros(2, 2).long()]), "decoder_inputs", "not a sequence of labels")


def test_states_that_do_not_fit():
    lstm = legacy.RNNDecoder(tf_cells.BasicLSTMCell(H), input_size=E, backend="reference")
    x = torch.randn(2, 2, E)
    error = wrong(lambda: lstm(x, torch.randn(2, H)), "BasicLSTMCell", "LSTMStateTuple(c=4, h=4)")
    assert isinstance(error, sl.StateError)
    wrong(lambda: lstm(x, (torch.randn(2, H), torch.randn(2, H + 1))), "initial state")
    wrong(lambda: lstm(x, {"h": torch.randn(2, H)}), "initial state")
    wrong(lambda: lstm(x, (torch.randn(3, H), torch.randn(3, H))), "(2, 4)")
    outputs, _ = lstm(x, {"c": torch.zeros(2, H), "h": torch.zeros(2, H)})
    assert outputs.shape == (2, 2, H)


def test_projections_of_another_shape():
    cell = lambda: tf_cells.GRUCell(H)
    w, b = torch.randn(H, ND), torch.randn(ND)
    for pair in ((w.t(), b), (w, b[1:]), (w,), w, (w, "b")):
        makes = (
            lambda: legacy.EmbeddingRNNDecoder(cell(), ND, E, pair),
            lambda: legacy.EmbeddingRNNSeq2Seq(cell(), NE, ND, E, pair),
            lambda: legacy.EmbeddingTiedRNNSeq2Seq(cell(), ND, E, None, pair),
            lambda: attention_model(output_projection=pair),
            lambda: legacy.EmbeddingAttentionDecoder(cell(), ND, E, output_projection=pair, attention_size=5),
        )
        for make in makes:
            assert isinstance(wrong(make, "output_projection has the wrong shape", "(4, 6)"), ValueError)


def test_feed_previous_is_a_truth():
    for other in (1, "yes", torch.tensor(1), torch.tensor([True])):
        model = attention_model(feed_previous=other)
        wrong(lambda: model(ids(2, 2, NE), ids(2, 2)), "feed_previous is True or False")


def test_loop_functions_that_give_no_input():
    model = legacy.RNNDecoder(tf_cells.GRUCell(H), lambda prev, i: prev, input_size=E, backend="reference")
    wrong(lambda: model(torch.randn(3, 2, E), torch.randn(2, H)), "loop_function", "(2, 3) float32", "(2, 4)")


def test_one2many_errors():
    cells = lambda: {"a": tf_cells.GRUCell(H), "b": tf_cells.GRUCell(H)}
    make = lambda **other: legacy.One2ManyRNNSeq2Seq(
        **{"enc_cell": tf_cells.GRUCell(H), "dec_cells_dict": cells(), "num_encoder_symbols": NE,
           "num_decoder_symbols_dict": {"a": ND, "b": 5}, "embedding_size": E, "backend": "reference", **other}
    )  # fmt: skip
    error = wrong(lambda: make()(ids(3, 2, NE), {"a": ids(2, 2)}), "do not name the same decoders", "'a', 'b'")
    assert isinstance(error, ValueError)
    wrong(lambda: make(num_decoder_symbols_dict={"a": ND}), "num_decoder_symbols_dict")
    for name, cell in (("enc_cell", 3), ("dec_cells_dict", {"a": None, "b": cells()["b"]})):
        error = wrong(lambda: make(**{name: cell}), f"{name}", "is no cell")
        assert isinstance(error, TypeError)
    wrong(lambda: make()(ids(3, 2, NE), [ids(2, 2)]), "a dict by decoder name")


def test_sizes_that_nobody_knows():
    for make in (legacy.RNNDecoder, legacy.BasicRNNSeq2Seq, legacy.TiedRNNSeq2Seq):
        wrong(lambda: make(tf_cells.GRUCell(H)), "has to know how many features", "input_size=")
    wrong(lambda: legacy.AttentionDecoder(tf_cells.GRUCell(H), attention_size=3), "input_size=")
    wrong(lambda: legacy.RNNDecoder(tf_cells.GRUCell(H), input_size=E, backend="quick"), "backend")
