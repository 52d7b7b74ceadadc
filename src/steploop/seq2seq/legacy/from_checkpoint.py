"""The model that a TF1 checkpoint is of, from nothing but the names and shapes of its variables."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ...errors import InputError, message
from ...step import Step
from ..tf_cells import BasicLSTMCell, BasicRNNCell, GRUCell, MultiRNNCell, OutputProjectionWrapper
from ..tf_state import output_size
from ..tf_variables import plain_name
from .attention import AttentionDecoder, EmbeddingAttentionDecoder
from .decoders import EmbeddingRNNDecoder, Model, RNNDecoder
from .models import (
    BasicRNNSeq2Seq,
    EmbeddingAttentionSeq2Seq,
    EmbeddingRNNSeq2Seq,
    EmbeddingTiedRNNSeq2Seq,
    TiedRNNSeq2Seq,
)
from .one2many import One2ManyRNNSeq2Seq


def from_tf_variables(
    variables: Mapping[str, Any], function: str | None = None, scope: str | None = None, **options: Any
) -> Model:
    """The model whose variables these are, filled with them.

    variables: {name: array} as for `load_tf_variables`.
    function:  TF's name of the function that made them; None: its scope is found among the names.
    scope:     the scope below which they are, where it is not the function's own.
    options:   arguments of the constructor that weights do not tell (feed_previous, loop_function,
               initial_state_attention, output_projection, backend, ...). Cells are made with TF's defaults
               (forget_bias=1.0, states as tuples).

    Raises InputError where no function or cell can be told, where an output_projection is needed, and as
    `load_tf_variables`.
    """
    shapes = {plain_name(name): np.shape(value) for name, value in variables.items()}
    function, scope = _function_and_scope(shapes, function, scope)
    model = FUNCTIONS[function](_Scope(shapes, scope), options)
    model.scope = scope
    model.load_tf_variables(variables)
    return model


ANY_PROJECTION = "any"  # output_projection=: zeros where one is needed, for who wants nothing but the weights


class _Scope:
    """The shapes of the variables below a scope."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], scope: str) -> None:
        self.scope = scope
        start = f"{scope}/"
        self.shapes = {n.removeprefix(start): s for n, s in shapes.items() if n.startswith(start)}

    def __call__(self, scope: str) -> _Scope:
        below = _Scope(self.shapes, scope)
        below.scope = f"{self.scope}/{scope}"
        return below

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """InputError unless it is there, with so many axes."""
        found = self.shapes.get(name)
        if found is not None and len(found) == axes:
            return found
        raise InputError(
            message(
                f"The variable {self.scope}/{name} is needed to tell the model's sizes.",
                expected=f"an array of {axes} axes",
                found="missing" if found is None else f"shape {tuple(found)}",
                fix="make the model yourself and call its load_tf_variables, which lists all that differs",
            )
        )

    def first(self) -> set[str]:
        """The names directly below."""
        return {name.split("/")[0] for name in self.shapes}


def _function_and_scope(shapes: Mapping[str, Any], function: str | None, scope: str | None) -> tuple[str, str]:
    if function is not None and function not in FUNCTIONS:
        raise InputError(message("No such function.", expected=", ".join(FUNCTIONS), found=repr(function)))
    if scope is not None and function is not None:
        return function, scope
    found = {}
    for name in shapes:
        parts = name.split("/")
        # the outermost of the scopes that functions make: the others are calls inside of it
        at = next((i for i, part in enumerate(parts[:-1]) if part in SCOPES), None)
        if at is not None:
            found["/".join(parts[: at + 1])] = SCOPES[parts[at]]
    if scope is not None:
        found = {name: made for name, made in found.items() if name == scope}
    if len(found) != 1:
        raise InputError(
            message(
                "The names do not tell which function made these variables.",
                expected="one scope, such as " + ", ".join(sorted(SCOPES)[:3]),
                found=", ".join(sorted(found)) or f"none in {', '.join(list(shapes)[:3]) or 'no variables'}",
                fix="from_tf_variables(variables, function=..., scope=...); on the command line --function, --scope",
            )
        )
    ((scope, made),) = found.items()
    return function or made, scope


def cell_of(scope: _Scope) -> Step:
    """A new cell of the kind and sizes of the variables below a scope. InputError where there is none."""
    first = scope.first()
    if "output_projection_wrapper" in first:
        inside = scope("output_projection_wrapper")
        return OutputProjectionWrapper(cell_of(inside), inside.shape("kernel", 2)[1])
    if "multi_rnn_cell" in first:
        inside = scope("multi_rnn_cell")
        layers = [name for name in inside.first() if re.fullmatch(r"cell_\d+", name)]
        return MultiRNNCell([cell_of(inside(f"cell_{k}")) for k in range(len(layers))])
    if "gru_cell" in first:
        return GRUCell(scope("gru_cell/gates").shape("kernel", 2)[1] // 2)
    if "basic_lstm_cell" in first:
        return BasicLSTMCell(scope("basic_lstm_cell").shape("kernel", 2)[1] // 4)
    if "basic_rnn_cell" in first:
        return BasicRNNCell(scope("basic_rnn_cell").shape("kernel", 2)[1])
    raise InputError(
        message(
            f"There is no cell below {scope.scope}.",
            expected="gru_cell, basic_lstm_cell, basic_rnn_cell, multi_rnn_cell or output_projection_wrapper",
            found=", ".join(sorted(first)) or "nothing",
            fix="make the model yourself with a cell of your own",
        )
    )


def _input_size(scope: _Scope) -> int:
    """Of the first layer below a scope: rows of its kernel that are not the state's."""
    (name,) = [
        name
        for name in scope.shapes
        if re.fullmatch(
            r"(output_projection_wrapper/)*(multi_rnn_cell/cell_0/)?(gru_cell/gates|basic_\w+_cell)/kernel",
            name,
        )
    ]
    rows, columns = scope.shape(name, 2)
    return rows - columns // {"gates": 2, "basic_lstm_cell": 4, "basic_rnn_cell": 1}[name.split("/")[-2]]


def _given(scope: _Scope, options: dict[str, Any], labels: int) -> tuple[Step, dict[str, Any]]:
    """The cell that a function was given, and its options: without an output_projection it projects the cell."""
    cell, options = cell_of(scope), dict(options)
    projection = options.pop("output_projection", None)
    if projection is None or projection is ANY_PROJECTION:
        if isinstance(cell, OutputProjectionWrapper):
            return cell.cell, options
        if projection is None:
            raise InputError(_needs_projection(scope, cell, labels))
        projection = torch.zeros(output_size(cell), labels, device="cpu"), torch.zeros(labels, device="cpu")
    return cell, {**options, "output_projection": projection}


def _needs_projection(scope: _Scope, cell: Step, labels: int) -> str:
    return message(
        f"The cell below {scope.scope} is not projected: these weights go with an output_projection.",
        expected=f"output_projection=(W, B), ({output_size(cell)}, {labels}) and ({labels},)",
        found="none",
        fix="from_tf_variables(variables, output_projection=(torch.as_tensor(W), torch.as_tensor(B)))",
    )


def _no_placeholder(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a function that needs no projection to hold its weights."""
    return {name: value for name, value in options.items() if value is not ANY_PROJECTION}


def _rnn_decoder(scope: _Scope, options: dict[str, Any]) -> Model:
    options = _no_placeholder(options)
    return RNNDecoder(cell_of(scope), input_size=_input_size(scope), **options)


def _basic(scope: _Scope, options: dict[str, Any]) -> Model:
    options = _no_placeholder(options)
    encoder, decoder = scope("rnn"), scope("rnn_decoder")
    sizes: dict[str, Any] = {"input_size": _input_size(decoder), "encoder_input_size": _input_size(encoder)}
    return BasicRNNSeq2Seq(cell_of(decoder), **sizes, **options)


def _tied(scope: _Scope, options: dict[str, Any]) -> Model:
    options = _no_placeholder(options)
    inside = scope("tied_rnn_seq2seq")
    return TiedRNNSeq2Seq(cell_of(inside), input_size=_input_size(inside), **options)


def _embedding_rnn_decoder(scope: _Scope, options: dict[str, Any]) -> Model:
    options = _no_placeholder(options)
    labels, size = scope.shape("embedding", 2)
    return EmbeddingRNNDecoder(cell_of(scope("rnn_decoder")), labels, size, **options)


def _embedding_rnn(scope: _Scope, options: dict[str, Any]) -> Model:
    inputs, size = scope("rnn/embedding_wrapper").shape("embedding", 2)
    decoder = scope("embedding_rnn_decoder")
    labels = decoder.shape("embedding", 2)[0]
    cell, options = _given(decoder("rnn_decoder"), options, labels)
    return EmbeddingRNNSeq2Seq(cell, inputs, labels, size, **options)


def _embedding_tied(scope: _Scope, options: dict[str, Any]) -> Model:
    labels, size = scope.shape("embedding", 2)
    inside = scope("combined_tied_rnn_seq2seq/tied_rnn_seq2seq")
    cell, options = _given(inside, options, labels)
    if "output_projection" not in options:
        options = {"num_decoder_symbols": output_size(cell_of(inside)), **options}
    return EmbeddingTiedRNNSeq2Seq(cell, labels, size, **options)


def _attention_sizes(scope: _Scope) -> dict[str, Any]:
    heads = sum(re.fullmatch(r"AttnV_\d+", name) is not None for name in scope.first())
    size = scope.shape("AttnV_0", 1)[0]
    output = scope.shape("AttnOutputProjection/kernel", 2)[1]
    return {"num_heads": heads, "attention_size": size, "output_size": output}


def _attention_decoder(scope: _Scope, options: dict[str, Any]) -> Model:
    options = _no_placeholder(options)
    sizes = _attention_sizes(scope) | {"input_size": scope.shape("kernel", 2)[1]}
    return AttentionDecoder(cell_of(scope), **sizes, **options)


def _embedding_attention_decoder(scope: _Scope, options: dict[str, Any]) -> Model:
    inside, options = scope("attention_decoder"), _no_placeholder(options)
    labels, size = scope.shape("embedding", 2)
    return EmbeddingAttentionDecoder(cell_of(inside), labels, size, **_attention_sizes(inside), **options)


def _embedding_attention(scope: _Scope, options: dict[str, Any]) -> Model:
    inputs, size = scope("rnn/embedding_wrapper").shape("embedding", 2)
    decoder = scope("embedding_attention_decoder")
    labels, inside = decoder.shape("embedding", 2)[0], decoder("attention_decoder")
    cell, options = _given(inside, options, labels)
    heads = _attention_sizes(inside)["num_heads"]
    return EmbeddingAttentionSeq2Seq(cell, inputs, labels, size, num_heads=heads, **options)


def _one2many(scope: _Scope, options: dict[str, Any]) -> Model:
    options = _no_placeholder(options)
    encoder = scope("rnn/embedding_wrapper")
    cells, labels = {}, {}
    for name in sorted(scope.first() - {"rnn"}):
        decoder, short = scope(f"{name}/embedding_rnn_decoder"), name.removeprefix("one2many_decoder_")
        labels[short] = decoder.shape("embedding", 2)[0]
        cells[short], _ = _given(decoder("rnn_decoder"), {}, labels[short])
    inputs, size = encoder.shape("embedding", 2)
    return One2ManyRNNSeq2Seq(cell_of(encoder), cells, inputs, labels, size, **options)


FUNCTIONS: dict[str, Callable[[_Scope, dict[str, Any]], Model]] = {
    "rnn_decoder": _rnn_decoder,
    "basic_rnn_seq2seq": _basic,
    "tied_rnn_seq2seq": _tied,
    "embedding_rnn_decoder": _embedding_rnn_decoder,
    "embedding_rnn_seq2seq": _embedding_rnn,
    "embedding_tied_rnn_seq2seq": _embedding_tied,
    "attention_decoder": _attention_decoder,
    "embedding_attention_decoder": _embedding_attention_decoder,
    "embedding_attention_seq2seq": _embedding_attention,
    "one2many_rnn_seq2seq": _one2many,
}
SCOPES = {name: name for name in FUNCTIONS if name != "tied_rnn_seq2seq"}
SCOPES["combined_tied_rnn_seq2seq"] = "tied_rnn_seq2seq"
