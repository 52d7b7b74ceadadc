"""The legacy models against numbers of TensorFlow: values and all gradients, under both backends.

The files in legacy_seq2seq/ hold runs of TF 1.15.5's own code: var:<TF name> weights, in:* inputs, out:* and state:*
results, extra:* losses, cot:* cotangents, L = the sum of results times cotangents, and L's gradients grad:<TF name>
and gin:<input>. `meta` says which function, with which arguments; what it says decides how a file is read, so that
more files of the kind are tested by being put there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from steploop.seq2seq import legacy, tf_cells
from steploop.seq2seq.legacy.from_checkpoint import _Scope, cell_of

FILES = sorted((Path(__file__).parent / "legacy_seq2seq").glob("*.npz"))
SYMBOLS = {"NE": 7, "ND": 6, "E": 3}


class Golden:
    """One file. `inputs[name]`: a tensor, or a list of tensors over time (or of a state's parts)."""

    def __init__(self, path):
        with np.load(path) as archive:
            self.arrays = {key: archive[key] for key in archive.files if key != "meta"}
            self.meta = json.loads(str(archive["meta"]))
        self.variables = self.under("var:")
        self.leaves = {name: _tensor(value) for name, value in self.under("in:").items()}
        self.inputs = _listed(self.leaves)
        self.shapes = {name.removesuffix(":0"): value.shape for name, value in self.variables.items()}

    def under(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    def cell(self, scope):
        """A new cell of the kind that the variables below a scope are of."""
        cell = cell_of(_Scope(self.shapes, scope))
        kind = self.meta.get("cell", self.meta.get("enc_cell", ""))
        return flat_states(cell) if "concat" in str(kind) else cell

    @property
    def projection(self):
        return (self.inputs["proj_w"], self.inputs["proj_b"]) if "proj_w" in self.inputs else None

    @property
    def feed_previous(self):
        """b0, b1: a Python bool; t0, t1: a tensor."""
        given = self.meta.get("feed_previous", False)
        if isinstance(given, str):
            return torch.tensor(given == "t1") if given[0] == "t" else given == "b1"
        return given


def _tensor(array):
    tensor = torch.from_numpy(np.array(array))
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor


def _listed(leaves):
    """{"x:0": a, "x:1": b, "y:n:0": c} -> {"x": [a, b], "y": {"n": [c]}}."""
    found = {}
    for name, value in leaves.items():
        *path, last = name.split(":")
        if not last.isdigit():
            found[name] = value
            continue
        place = found
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place.setdefault(path[-1], []).append((int(last), value))
    return {name: _in_order(value) for name, value in found.items()}


def _in_order(value):
    if isinstance(value, dict):
        return {name: _in_order(part) for name, part in value.items()}
    if isinstance(value, list):
        return [part for _, part in sorted(value, key=lambda pair: pair[0])]
    return value


def flat_states(cell):
    """The same cell with state_is_tuple=False."""
    if isinstance(cell, tf_cells.OutputProjectionWrapper):
        return tf_cells.OutputProjectionWrapper(flat_states(cell.cell), cell.output_size)
    if isinstance(cell, tf_cells.MultiRNNCell):
        return tf_cells.MultiRNNCell([flat_states(c) for c in cell.children()], state_is_tuple=False)
    if isinstance(cell, tf_cells.BasicLSTMCell):
        return tf_cells.BasicLSTMCell(cell.num_units, state_is_tuple=False)
    return cell


def nested(parts, size):
    """The parts of a state in the structure of a cell's state_size."""
    return torch.utils._pytree.tree_unflatten(parts, torch.utils._pytree.tree_flatten(size)[1])


def loop_function(golden):
    if not golden.meta.get("loop_function"):
        return None
    assert golden.meta["loop_function"] == "tanh(prev@P)+0.1*i"
    p = golden.inputs["P"]
    return lambda prev, i: torch.tanh(prev @ p) + 0.1 * i


def number(value):
    """6 from 6 or "ND"."""
    return SYMBOLS.get(value, value)


RUN = {}


def runs(function):
    """Marks what builds a function's model and runs it: golden, options -> (model, results by name)."""

    def mark(run):
        RUN[function] = run
        return run

    return mark


def steps(prefix, outputs):
    return {f"{prefix}:{i}": output for i, output in enumerate(outputs)}


def results(outputs, state):
    return steps("out", outputs) | steps("state", torch.utils._pytree.tree_leaves(state))


@runs("rnn_decoder")
def rnn_decoder(golden, options):
    cell = golden.cell("rnn_decoder")
    model = legacy.RNNDecoder(cell, loop_function(golden), input_size=3, **options)
    state = nested(golden.inputs["state"], cell.state_size)
    return model, lambda: results(*model(golden.inputs["decoder_inputs"], state))


@runs("basic_rnn_seq2seq")
def basic_rnn_seq2seq(golden, options):
    model = legacy.BasicRNNSeq2Seq(golden.cell("basic_rnn_seq2seq/rnn_decoder"), input_size=3, **options)
    return model, lambda: results(*model(golden.inputs["encoder_inputs"], golden.inputs["decoder_inputs"]))


@runs("tied_rnn_seq2seq")
def tied_rnn_seq2seq(golden, options):
    cell = golden.cell("combined_tied_rnn_seq2seq/tied_rnn_seq2seq")
    model = legacy.TiedRNNSeq2Seq(cell, loop_function(golden), input_size=3, **options)
    return model, lambda: results(*model(golden.inputs["encoder_inputs"], golden.inputs["decoder_inputs"]))


@runs("embedding_rnn_decoder")
def embedding_rnn_decoder(golden, options):
    cell = golden.cell("embedding_rnn_decoder/rnn_decoder")
    meta = golden.meta
    model = legacy.EmbeddingRNNDecoder(
        cell,
        number(meta["num_symbols"]),
        number(meta["embedding_size"]),
        golden.projection,
        golden.feed_previous,
        meta["update_embedding_for_previous"],
        **options,
    )
    state = nested(golden.inputs["state"], cell.state_size)
    return model, lambda: results(*model(golden.inputs["decoder_inputs"], state))


def seq2seq_cell(golden, scope):
    """The cell that was given: without an output_projection the function projects it."""
    cell = golden.cell(scope)
    return cell if golden.projection else cell.cell


@runs("embedding_rnn_seq2seq")
def embedding_rnn_seq2seq(golden, options):
    cell = seq2seq_cell(golden, "embedding_rnn_seq2seq/embedding_rnn_decoder/rnn_decoder")
    model = legacy.EmbeddingRNNSeq2Seq(cell, 7, 6, 3, golden.projection, golden.feed_previous, **options)
    return model, lambda: results(*model(golden.inputs["encoder_inputs"], golden.inputs["decoder_inputs"]))


@runs("embedding_tied_rnn_seq2seq")
def embedding_tied_rnn_seq2seq(golden, options):
    cell = seq2seq_cell(golden, "embedding_tied_rnn_seq2seq/combined_tied_rnn_seq2seq/tied_rnn_seq2seq")
    symbols = golden.shapes["embedding_tied_rnn_seq2seq/embedding"][0]
    labels = golden.meta.get("num_decoder_symbols")
    model = legacy.EmbeddingTiedRNNSeq2Seq(cell, symbols, 3, labels, golden.projection, golden.feed_previous, **options)
    return model, lambda: results(*model(golden.inputs["encoder_inputs"], golden.inputs["decoder_inputs"]))


@runs("attention_decoder")
def attention_decoder(golden, options):
    cell, meta, given = golden.cell("attention_decoder"), golden.meta, golden.inputs
    model = legacy.AttentionDecoder(
        cell,
        meta["output_size"],
        meta["num_heads"],
        loop_function(golden),
        initial_state_attention=meta["initial_state_attention"],
        input_size=3,
        attention_size=given["attention_states"].shape[2],
        **options,
    )
    state = nested(given["state"], cell.state_size)
    return model, lambda: results(*model(given["decoder_inputs"], state, given["attention_states"]))


@runs("embedding_attention_decoder")
def embedding_attention_decoder(golden, options):
    cell = golden.cell("embedding_attention_decoder/attention_decoder")
    meta, given = golden.meta, golden.inputs
    model = legacy.EmbeddingAttentionDecoder(
        cell,
        number(meta["num_symbols"]),
        number(meta["embedding_size"]),
        meta.get("num_heads", 1),
        meta["output_size"],
        golden.projection,
        golden.feed_previous,
        meta["update_embedding_for_previous"],
        initial_state_attention=meta.get("initial_state_attention", False),
        attention_size=given["attention_states"].shape[2],
        **options,
    )
    state = nested(given["state"], cell.state_size)
    return model, lambda: results(*model(given["decoder_inputs"], state, given["attention_states"]))


def attention_seq2seq(golden, options, feed_previous):
    scope = "embedding_attention_seq2seq/embedding_attention_decoder/attention_decoder"
    return legacy.EmbeddingAttentionSeq2Seq(
        seq2seq_cell(golden, scope),
        7,
        6,
        3,
        golden.meta.get("num_heads", 1),
        golden.projection,
        feed_previous,
        initial_state_attention=golden.meta.get("initial_state_attention", False),
        **options,
    )


@runs("embedding_attention_seq2seq")
def embedding_attention_seq2seq(golden, options):
    model = attention_seq2seq(golden, options, golden.feed_previous)
    return model, lambda: results(*model(golden.inputs["encoder_inputs"], golden.inputs["decoder_inputs"]))


@runs("one2many_rnn_seq2seq")
def one2many_rnn_seq2seq(golden, options):
    scope, symbols = "one2many_rnn_seq2seq", golden.meta["num_decoder_symbols"]
    cells = {
        name: golden.cell(f"{scope}/one2many_decoder_{name}/embedding_rnn_decoder/rnn_decoder").cell for name in symbols
    }
    encoder = golden.cell(f"{scope}/rnn/embedding_wrapper")
    model = legacy.One2ManyRNNSeq2Seq(encoder, cells, 7, symbols, 3, golden.feed_previous, **options)

    def run():
        outputs, states = model(golden.inputs["encoder_inputs"], golden.inputs["decoder_inputs"])
        found = {}
        for name in symbols:
            found |= steps(f"out:{name}", outputs[name])
            found |= steps(f"state:{name}", torch.utils._pytree.tree_leaves(states[name]))
        return found

    return model, run


@runs("model_with_buckets")
def model_with_buckets(golden, options):
    assert golden.meta["seq2seq"] == "embedding_attention_seq2seq(gru,NE,ND,E)"
    model = attention_seq2seq(golden, options, False)
    buckets = legacy.ModelWithBuckets(golden.meta["buckets"], model, per_example_loss=golden.meta["per_example_loss"])

    def run():
        names = ("encoder_inputs", "decoder_inputs", "targets", "weights")
        outputs, losses = buckets(*(golden.inputs[name] for name in names))
        found = {f"extra:loss:bucket{j}": loss for j, loss in enumerate(losses)}
        for j, output in enumerate(outputs):
            found |= steps(f"out:bucket{j}", output)
        return found

    return model, run


def smoothed(labels, logits, smoothing):
    """Cross entropy with label smoothing over all classes."""
    classes = logits.shape[-1]
    targets = F.one_hot(labels.long(), classes) * (1 - smoothing) + smoothing / classes
    return -(targets * logits.log_softmax(-1)).sum(-1)


@runs("sequence_loss + sequence_loss_by_example")
def losses(golden, _):
    name = golden.meta["softmax_loss_function"]
    custom = None
    if name:
        smoothing = float(re.fullmatch(r"smooth([\d.]+)", name).group(1))
        custom = lambda labels, logits: smoothed(labels, logits, smoothing)

    def run():
        given = [golden.inputs[name] for name in ("logits", "targets", "weights")]
        found = {}
        for time in (True, False):
            by_example = legacy.sequence_loss_by_example(*given, time, custom)
            found[f"extra:by_example_avgT{time:d}"] = by_example
            for batch in (True, False):
                loss = legacy.sequence_loss(*given, time, batch, custom)
                found[f"extra:loss_avgT{time:d}_avgB{batch:d}"] = loss
        return found

    return None, run


@runs("_extract_argmax_and_embed")
def extract_argmax_and_embed(golden, _):
    function = legacy.extract_argmax_and_embed(
        golden.inputs["embedding"], golden.projection, golden.meta["update_embedding"]
    )
    return None, lambda: {"out:0": function(golden.inputs["prev"], 1)}


def close(found, expected, what):
    """To 1e-5, of the largest entry where that is larger than 1."""
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    expected = torch.from_numpy(np.array(expected))
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5 * scale, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_values_and_gradients(path, backend):
    golden = Golden(path)
    model, run = RUN[golden.meta["function"]](golden, {"backend": backend})
    if model is not None:
        model.load_tf_variables(golden.variables)
    found = run()
    expected = {k: v for k, v in golden.arrays.items() if k.split(":")[0] in ("out", "state", "extra")}
    assert set(found) == set(expected)
    for name, value in expected.items():
        close(found[name], value, name)

    cotangents = golden.under("cot:")
    value = sum((found[name] * torch.from_numpy(np.array(c))).sum() for name, c in cotangents.items())
    close(value, golden.arrays["L"], "L")
    none = set(golden.meta["none_grads"])
    if not value.requires_grad:
        assert not golden.under("gin:") and not golden.under("grad:")
        return
    value.backward()
    check_gradients_of_inputs(golden, none)
    check_gradients_of_variables(golden, model, none)


def check_gradients_of_inputs(golden, none):
    expected = golden.under("gin:")
    for name, leaf in golden.leaves.items():
        if not leaf.is_floating_point() or (name not in expected and f"gin:{name}" not in none):
            continue
        found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        close(found, expected.get(name, np.zeros(leaf.shape, np.float32)), f"gin:{name}")


def check_gradients_of_variables(golden, model, none):
    if model is None:
        return
    variables = {f"{v.name}:0": v for v in model.tf_variables(model.scope)}
    assert set(variables) == set(golden.variables)
    for name, variable in variables.items():
        gradient = variable.parameter.grad
        found = variable.view(torch.zeros_like(variable.parameter) if gradient is None else gradient)
        expected = golden.arrays.get(f"grad:{name}")
        assert expected is not None or f"grad:{name}" in none, name
        close(found, np.zeros(found.shape, np.float32) if expected is None else expected, f"grad:{name}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_model_is_told_from_the_names_alone(path):
    golden = Golden(path)
    if not golden.variables:
        return
    projection = {"output_projection": golden.projection} if golden.projection else {}
    model = legacy.from_tf_variables(golden.variables, **projection)
    back = model.to_tf_variables()
    assert set(back) == set(golden.variables)
    for name, value in golden.variables.items():
        np.testing.assert_array_equal(back[name], value)


def test_the_golden_files_are_there():
    functions = {Golden(path).meta["function"] for path in FILES}
    assert functions == set(RUN)
