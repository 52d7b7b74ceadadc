"""The sequence-to-sequence models: an encoder's last state starts a decoder."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...search.started import Started
from ...step import Step
from .. import tf_state
from ..tf_cells import EmbeddingWrapper, OutputProjectionWrapper, build
from ..tf_variables import Variable, joined, variables_of
from . import sequences
from .attention import EmbeddingAttentionDecoder
from .decoders import EmbeddingRNNDecoder, Model, RNNDecoder
from .feeding import LoopFunction, Projection, checked_projection
from .search_step import started


class BasicRNNSeq2Seq(Model):
    """tf.contrib.legacy_seq2seq.basic_rnn_seq2seq: the encoder is a copy of the cell with weights of its own.

    cell: as for RNNDecoder. The copy is made before its weights are, if the cell does not know its input size
        yet; else it starts with the cell's.
    input_size: of the decoder's inputs.  encoder_input_size: of the encoder's, None: the same.

    model(encoder_inputs, decoder_inputs) -> (outputs, state): lists of tensors (B, input_size) or tensors
    (T, B, input_size), as RNNDecoder.
    encoder_lengths, decoder_lengths: (B,), an extension: rows end there.
    """

    def __init__(
        self,
        cell: Step,
        dtype: torch.dtype | None = None,
        scope: str | None = None,
        *,
        input_size: int | None = None,
        encoder_input_size: int | None = None,
        backend: str = "auto",
        save: str = "auto",
    ) -> None:
        super().__init__(scope or "basic_rnn_seq2seq", backend, save)
        size = sequences.size_of_inputs("BasicRNNSeq2Seq", cell, input_size)
        self.encoder_input_size = encoder_input_size or size
        self.encoder = copy.deepcopy(cell)
        build(self.encoder, self.encoder_input_size)
        self.decoder = RNNDecoder(cell, input_size=size, backend=backend, save=save)
        self.cast(dtype)

    def forward(
        self,
        encoder_inputs: Any,
        decoder_inputs: Any,
        *,
        encoder_lengths: Any = None,
        decoder_lengths: Any = None,
    ) -> tuple[Any, Any]:
        inputs = sequences.vectors(encoder_inputs, "encoder_inputs", self.encoder_input_size)
        _, values = self.encode(self.encoder, inputs, encoder_lengths)
        state = tf_state.pack(self.encoder, values)
        return self.decoder(decoder_inputs, state, decoder_lengths=decoder_lengths)

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        yield from variables_of(self.encoder, joined(scope, "rnn"))
        yield from self.decoder.tf_variables(joined(scope, "rnn_decoder"))


class TiedRNNSeq2Seq(Model):
    """tf.contrib.legacy_seq2seq.tied_rnn_seq2seq: one cell encodes and decodes.

    cell, loop_function, input_size: as for RNNDecoder; input_size is that of both.
    model(encoder_inputs, decoder_inputs) -> (outputs, state), as BasicRNNSeq2Seq.
    """

    def __init__(
        self,
        cell: Step,
        loop_function: LoopFunction | None = None,
        dtype: torch.dtype | None = None,
        scope: str | None = None,
        *,
        input_size: int | None = None,
        backend: str = "auto",
        save: str = "auto",
    ) -> None:
        super().__init__("combined_tied_rnn_seq2seq", backend, save)
        self.decoder = RNNDecoder(
            cell,
            loop_function,
            scope or "tied_rnn_seq2seq",
            input_size=sequences.size_of_inputs("TiedRNNSeq2Seq", cell, input_size),
            backend=backend,
            save=save,
        )
        self.cast(dtype)

    def forward(
        self,
        encoder_inputs: Any,
        decoder_inputs: Any,
        *,
        encoder_lengths: Any = None,
        decoder_lengths: Any = None,
    ) -> tuple[Any, Any]:
        inputs = sequences.vectors(encoder_inputs, "encoder_inputs", self.decoder.input_size)
        _, values = self.encode(self.decoder.cell, inputs, encoder_lengths)
        state = tf_state.pack(self.decoder.cell, values)
        return self.decoder(decoder_inputs, state, decoder_lengths=decoder_lengths)

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        return self.decoder.tf_variables(joined(scope, self.decoder.scope))


class _FromLabels(Model):
    """A model from labels to labels.

    update_embedding_for_previous: None does as TF1: labels that are fed back train the embedding where
    feed_previous is a Python True, and do not where it is a tensor.
    """

    decoder: EmbeddingRNNDecoder | EmbeddingAttentionDecoder
    feed_previous: bool | Tensor
    update_embedding_for_previous: bool | None

    def feeding(self, given: bool | Tensor | None) -> dict[str, Any]:
        """What a call hands its decoder: feed_previous, and what it means for the embedding."""
        feed = self.feed_previous if given is None else given
        update = self.update_embedding_for_previous
        if update is None:
            update = not isinstance(feed, Tensor)
        return {"feed_previous": feed, "update_embedding_for_previous": update}


class EmbeddingRNNSeq2Seq(_FromLabels):
    """tf.contrib.legacy_seq2seq.embedding_rnn_seq2seq: encoder and decoder with an embedding and a cell each.

    cell: as for EmbeddingRNNDecoder; the encoder's is a copy of it (see BasicRNNSeq2Seq).
    output_projection: None: the decoder's cell is projected to num_decoder_symbols.  (W, B): outputs stay
        (B, cell's output_size), and W, B act on what is fed back only.
    feed_previous: see LabelDecoder.  update_embedding_for_previous: None as TF1: with a Python True labels that
        are fed back train the embedding, with a tensor they do not.

    model(encoder_inputs, decoder_inputs, feed_previous=None) -> (outputs, state): lists of labels (B,), or
    (T, B).
    encoder_lengths, decoder_lengths: (B,), an extension: rows end there.
    """

    def __init__(
        self,
        cell: Step,
        num_encoder_symbols: int,
        num_decoder_symbols: int,
        embedding_size: int,
        output_projection: Projection | None = None,
        feed_previous: bool | Tensor = False,
        dtype: torch.dtype | None = None,
        scope: str | None = None,
        *,
        update_embedding_for_previous: bool | None = None,
        backend: str = "auto",
        save: str = "auto",
    ) -> None:
        super().__init__(scope or "embedding_rnn_seq2seq", backend, save)
        self.encoder = EmbeddingWrapper(copy.deepcopy(cell), num_encoder_symbols, embedding_size)
        if output_projection is None:
            cell = OutputProjectionWrapper(cell, num_decoder_symbols)
        self.decoder = EmbeddingRNNDecoder(
            cell, num_decoder_symbols, embedding_size, output_projection, backend=backend, save=save
        )
        self.feed_previous = feed_previous
        self.update_embedding_for_previous = update_embedding_for_previous
        self.cast(dtype)

    def forward(
        self,
        encoder_inputs: Any,
        decoder_inputs: Any,
        *,
        feed_previous: bool | Tensor | None = None,
        encoder_lengths: Any = None,
        decoder_lengths: Any = None,
    ) -> tuple[Any, Any]:
        _, values = self.encode(self.encoder, sequences.labels(encoder_inputs, "encoder_inputs"), encoder_lengths)
        state = tf_state.pack(self.encoder, values)
        feeding = self.feeding(feed_previous)
        return self.decoder(decoder_inputs, state, decoder_lengths=decoder_lengths, **feeding)

    def search_step(self, encoder_inputs: Any, *, encoder_lengths: Any = None) -> Started:
        """The decoder after these inputs, for searches: `sl.search.beam(model.search_step(inputs), start=GO, ...)`.

        Arguments as for the model's call. Greedy search gives the labels that feed_previous=True feeds back.
        """
        _, values = self.encode(self.encoder, sequences.labels(encoder_inputs, "encoder_inputs"), encoder_lengths)
        return started(self.decoder, values, {})

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        yield from self.encoder.tf_variables(joined(scope, "rnn"))
        yield from self.decoder.tf_variables(joined(scope, self.decoder.scope))


class EmbeddingTiedRNNSeq2Seq(_FromLabels):
    """tf.contrib.legacy_seq2seq.embedding_tied_rnn_seq2seq: one embedding and one cell encode and decode.

    num_symbols: labels that are embedded, of both sides.
    num_decoder_symbols: labels of the output, which are the first of them; None: num_symbols.
    output_projection: (W, B), (cell's output_size, num_symbols) and (num_symbols,); else the cell is projected.
    The other arguments, and the call, as for EmbeddingRNNSeq2Seq.
    """

    def __init__(
        self,
        cell: Step,
        num_symbols: int,
        embedding_size: int,
        num_decoder_symbols: int | None = None,
        output_projection: Projection | None = None,
        feed_previous: bool | Tensor = False,
        dtype: torch.dtype | None = None,
        scope: str | None = None,
        *,
        update_embedding_for_previous: bool | None = None,
        backend: str = "auto",
        save: str = "auto",
    ) -> None:
        super().__init__(scope or "embedding_tied_rnn_seq2seq", backend, save)
        checked_projection(output_projection, tf_state.output_size(cell), num_symbols)
        if output_projection is None:
            cell = OutputProjectionWrapper(cell, num_decoder_symbols or num_symbols)
        self.decoder = EmbeddingRNNDecoder(
            cell, num_symbols, embedding_size, output_projection, backend=backend, save=save
        )
        self.feed_previous = feed_previous
        self.update_embedding_for_previous = update_embedding_for_previous
        self.cast(dtype)

    def forward(
        self,
        encoder_inputs: Any,
        decoder_inputs: Any,
        *,
        feed_previous: bool | Tensor | None = None,
        encoder_lengths: Any = None,
        decoder_lengths: Any = None,
    ) -> tuple[Any, Any]:
        inputs = sequences.labels(encoder_inputs, "encoder_inputs")
        _, values = self.encode(self.decoder.one_step, inputs, encoder_lengths)
        state = tf_state.pack(self.decoder.cell, values)
        feeding = self.feeding(feed_previous)
        return self.decoder(decoder_inputs, state, decoder_lengths=decoder_lengths, **feeding)

    def search_step(self, encoder_inputs: Any, *, encoder_lengths: Any = None) -> Started:
        """The decoder after these inputs, for searches: `sl.search.beam(model.search_step(inputs), start=GO, ...)`.

        Arguments as for the model's call. Greedy search gives the labels that feed_previous=True feeds back.
        """
        inputs = sequences.labels(encoder_inputs, "encoder_inputs")
        _, values = self.encode(self.decoder.one_step, inputs, encoder_lengths)
        return started(self.decoder, values, {})

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        yield Variable(joined(scope, "embedding"), self.decoder.one_step.embedding)
        tied = joined(scope, "combined_tied_rnn_seq2seq/tied_rnn_seq2seq")
        yield from variables_of(self.decoder.cell, tied)


class EmbeddingAttentionSeq2Seq(_FromLabels):
    """tf.contrib.legacy_seq2seq.embedding_attention_seq2seq: the decoder attends to the encoder's outputs.

    cell: as for EmbeddingRNNDecoder; the encoder's is a copy of it (see BasicRNNSeq2Seq).
    num_heads, initial_state_attention: as for AttentionDecoder.
    output_projection: None: the decoder's cell is projected to num_decoder_symbols, and a second projection
        maps [that, what is attended to] to num_decoder_symbols.  (W, B): outputs stay (B, cell's output_size),
        and W, B act on what is fed back only. With many labels that is far less work.
    feed_previous, update_embedding_for_previous: as for EmbeddingRNNSeq2Seq.

    model(encoder_inputs, decoder_inputs, feed_previous=None) -> (outputs, state): lists of labels (B,), or
    (T, B).
    attention_lengths: (B,), an extension: a row attends to its first entries only (None: encoder_lengths, if
        they are given).
    encoder_lengths, decoder_lengths: (B,), an extension: rows end there.
    """

    decoder: EmbeddingAttentionDecoder

    def __init__(
        self,
        cell: Step,
        num_encoder_symbols: int,
        num_decoder_symbols: int,
        embedding_size: int,
        num_heads: int = 1,
        output_projection: Projection | None = None,
        feed_previous: bool | Tensor = False,
        dtype: torch.dtype | None = None,
        scope: str | None = None,
        initial_state_attention: bool = False,
        *,
        update_embedding_for_previous: bool | None = None,
        backend: str = "auto",
        save: str = "auto",
    ) -> None:
        super().__init__(scope or "embedding_attention_seq2seq", backend, save)
        self.encoder = EmbeddingWrapper(copy.deepcopy(cell), num_encoder_symbols, embedding_size)
        attention_size = tf_state.output_size(cell)
        if output_projection is None:
            cell = OutputProjectionWrapper(cell, num_decoder_symbols)
        self.decoder = EmbeddingAttentionDecoder(
            cell,
            num_decoder_symbols,
            embedding_size,
            num_heads,
            output_projection=output_projection,
            initial_state_attention=initial_state_attention,
            attention_size=attention_size,
            backend=backend,
            save=save,
        )
        self.feed_previous = feed_previous
        self.update_embedding_for_previous = update_embedding_for_previous
        self.cast(dtype)

    def forward(
        self,
        encoder_inputs: Any,
        decoder_inputs: Any,
        *,
        feed_previous: bool | Tensor | None = None,
        attention_lengths: Any = None,
        encoder_lengths: Any = None,
        decoder_lengths: Any = None,
    ) -> tuple[Any, Any]:
        inputs = sequences.labels(encoder_inputs, "encoder_inputs")
        outputs, values = self.encode(self.encoder, inputs, encoder_lengths)
        return self.decoder(
            decoder_inputs,
            tf_state.pack(self.encoder, values),
            outputs.transpose(0, 1),
            attention_lengths=encoder_lengths if attention_lengths is None else attention_lengths,
            decoder_lengths=decoder_lengths,
            **self.feeding(feed_previous),
        )

    def search_step(
        self, encoder_inputs: Any, *, attention_lengths: Any = None, encoder_lengths: Any = None
    ) -> Started:
        """The decoder after these inputs, for searches: `sl.search.beam(model.search_step(inputs), start=GO, ...)`.

        Arguments as for the model's call. Greedy search gives the labels that feed_previous=True feeds back.
        """
        inputs = sequences.labels(encoder_inputs, "encoder_inputs")
        outputs, values = self.encode(self.encoder, inputs, encoder_lengths)
        lengths = encoder_lengths if attention_lengths is None else attention_lengths
        state = tf_state.pack(self.encoder, values)
        return started(self.decoder, *self.decoder.start(inputs, state, outputs.transpose(0, 1), lengths))

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        yield from self.encoder.tf_variables(joined(scope, "rnn"))
        yield from self.decoder.tf_variables(joined(scope, self.decoder.scope))
