"""one2many_rnn_seq2seq: one encoder, several decoders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import InputError, StepError, describe, message
from ...search.started import Started
from ...step import Step
from .. import tf_state
from ..tf_cells import EmbeddingWrapper, OutputProjectionWrapper
from ..tf_variables import Variable, joined
from . import sequences
from .decoders import EmbeddingRNNDecoder, Model
from .search_step import started


class One2ManyRNNSeq2Seq(Model):
    """tf.contrib.legacy_seq2seq.one2many_rnn_seq2seq (Luong et al. 2016, arXiv:1511.06114): one encoder, several
    decoders by name.

    enc_cell: the encoder's.  dec_cells_dict, num_decoder_symbols_dict: by decoder name; each cell is projected
        to its number of symbols. Their states must be like the encoder's.
    feed_previous: see LabelDecoder.
    update_embedding_for_previous: True as in TF1, which here trains the embedding with a tensor too.

    model(encoder_inputs, decoder_inputs_dict, feed_previous=None) -> (outputs_dict, state_dict), by name.
    encoder_lengths: (B,), an extension: rows end there.

    Raises StepError (a TypeError) for what is no cell, InputError (a ValueError) where the names differ.
    """

    def __init__(
        self,
        enc_cell: Step,
        dec_cells_dict: Mapping[str, Step],
        num_encoder_symbols: int,
        num_decoder_symbols_dict: Mapping[str, int],
        embedding_size: int,
        feed_previous: bool | Tensor = False,
        dtype: torch.dtype | None = None,
        scope: str | None = None,
        *,
        update_embedding_for_previous: bool = True,
        backend: str = "auto",
        save: str = "auto",
    ) -> None:
        super().__init__(scope or "one2many_rnn_seq2seq", backend, save)
        _check_cells({"enc_cell": enc_cell} | {f"dec_cells_dict[{n!r}]": c for n, c in dec_cells_dict.items()})
        _check_names(dec_cells_dict, num_decoder_symbols_dict, "dec_cells_dict", "num_decoder_symbols_dict")
        self.encoder = EmbeddingWrapper(enc_cell, num_encoder_symbols, embedding_size)
        self.names = list(dec_cells_dict)
        self.decoders = nn.ModuleList()
        for name, cell in dec_cells_dict.items():
            symbols = num_decoder_symbols_dict[name]
            cell = OutputProjectionWrapper(cell, symbols)
            options: dict[str, Any] = {"backend": backend, "save": save}
            self.decoders.append(EmbeddingRNNDecoder(cell, symbols, embedding_size, **options))
        self.feed_previous = feed_previous
        self.update_embedding_for_previous = update_embedding_for_previous
        self.cast(dtype)

    def forward(
        self,
        encoder_inputs: Any,
        decoder_inputs_dict: Mapping[str, Any],
        *,
        feed_previous: bool | Tensor | None = None,
        encoder_lengths: Any = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        _check_names(dict.fromkeys(self.names), decoder_inputs_dict, "dec_cells_dict", "decoder_inputs_dict")
        inputs = sequences.labels(encoder_inputs, "encoder_inputs")
        _, values = self.encode(self.encoder, inputs, encoder_lengths)
        state = tf_state.pack(self.encoder, values)
        feed = self.feed_previous if feed_previous is None else feed_previous
        outputs, states = {}, {}
        feeding = {"feed_previous": feed, "update_embedding_for_previous": self.update_embedding_for_previous}
        for name, decoder in zip(self.names, self.decoders):
            outputs[name], states[name] = decoder(decoder_inputs_dict[name], state, **feeding)
        return outputs, states

    def search_step(self, encoder_inputs: Any, *, encoder_lengths: Any = None) -> dict[str, Started]:
        """Each decoder after these inputs, by name, for searches; see EmbeddingRNNSeq2Seq."""
        inputs = sequences.labels(encoder_inputs, "encoder_inputs")
        _, values = self.encode(self.encoder, inputs, encoder_lengths)
        return {
            name: started(decoder, values, {})
            for name, decoder in zip(self.names, cast("Iterable[EmbeddingRNNDecoder]", self.decoders), strict=True)
        }

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        yield from self.encoder.tf_variables(joined(scope, "rnn"))
        for name, decoder in zip(self.names, cast("Iterable[EmbeddingRNNDecoder]", self.decoders)):
            yield from decoder.tf_variables(joined(scope, f"one2many_decoder_{name}/{decoder.scope}"))


def _check_cells(cells: Mapping[str, Any]) -> None:
    for name, cell in cells.items():
        if not isinstance(cell, Step):
            raise StepError(message(f"{name} is no cell.", expected="a Step", found=describe(cell)))


def _check_names(one: Mapping[str, Any], other: Any, first: str, second: str) -> None:
    if not isinstance(other, Mapping):
        raise InputError(message(f"{second} is a dict by decoder name.", found=describe(other)))
    if set(one) != set(other):
        raise InputError(
            message(
                f"{first} and {second} do not name the same decoders.",
                expected=", ".join(map(repr, one)) or "no decoders",
                found=", ".join(map(repr, other)) or "no decoders",
            )
        )
