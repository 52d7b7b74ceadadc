"""rnn_decoder and embedding_rnn_decoder, and what all decoders share."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ... import dispatch
from ...errors import InputError, describe, message
from ...step import Step
from .. import tf_state
from ..tf_cells import EmbeddingWrapper, build
from ..tf_variables import HasTFVariables, Variable, joined, variables_of
from . import sequences
from .feeding import (
    FeedLabels,
    FeedPrevious,
    LoopFunction,
    Projection,
    checked_projection,
    is_fed,
    numbers_of_next_steps,
)

_plans: ContextVar[list[Any] | None] = ContextVar("plans", default=None)


class Model(HasTFVariables):
    """What all models of this family share.

    scope:   TF's name of the outermost scope of the variables.
    dtype:   of the parameters; None: torch's default, and the cell's own.
    backend, save: as for sl.Loop.
    """

    _holds_own_states = True  # inside a Step, a model is an inner sequence

    def __init__(self, scope: str, backend: str, save: str) -> None:
        super().__init__()
        self.scope = scope
        self.backend, self.save = backend, save

    @property
    def backend(self) -> str:
        """That of all of the model's Loops."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        self._backend = dispatch.checked_backend(name)
        for model in self._parts():
            model.backend = name

    @property
    def save(self) -> str:
        """What all of the model's Loops keep for the backward."""
        return self._save

    @save.setter
    def save(self, policy: str) -> None:
        self._save = dispatch.checked_save(policy)
        for model in self._parts():
            model.save = policy

    def _parts(self) -> Iterator[Model]:
        return (module for module in self.modules() if isinstance(module, Model) and module is not self)

    def cast(self, dtype: torch.dtype | None) -> None:
        """Parameters to `dtype`, unless it is None."""
        if dtype is not None:
            self.to(dtype)

    def run(self, step: Step, *xs: Any, **arguments: Any) -> tuple[Any, dict[str, Tensor]]:
        """A Step over a whole sequence, under this model's backend."""
        loop = step.whole_sequence()
        loop.backend, loop.save = self.backend, self.save
        plans = _plans.get()
        if plans is not None:
            plans.append(loop.plan(*xs, **arguments))
        return loop(*xs, **arguments)

    def plans(self, *inputs: Any, **arguments: Any) -> list[Any]:
        """The Plans by which a call with these arguments runs, one for each Loop: the encoder's, the decoders'."""
        found: list[Any] = []
        token = _plans.set(found)
        try:
            self(*inputs, **arguments)
        finally:
            _plans.reset(token)
        return found

    def encode(self, step: Step, inputs: Tensor, lengths: Any) -> tuple[Tensor, list[Tensor]]:
        """The outputs (T, B, ...), and the values of the States after the last step of each row."""
        outputs, after = self.run(step, inputs, lengths=lengths)
        return outputs, [after[name] for name in tf_state.state_names(step)]


class Decoder(Model):
    """one_step: the decoder's Step, from this step's input (a vector or a label) to its output.

    With given inputs, a Loop over it is the decoder. With a loop function it is in a FeedPrevious.
    """

    one_step: Step
    # In a tuple: no child of this module. Its one_step is, and a state_dict holds that once.
    _feeding: tuple[FeedPrevious, ...] = ()

    def decode(
        self,
        inputs: Tensor,
        values: list[Tensor],
        step: FeedPrevious | None,
        lengths: Any,
        **constants: Any,
    ) -> tuple[Tensor, list[Tensor]]:
        """Outputs (T, B, ...), and the States' values after them.

        values: of the States of one_step before the first step.  step: one of `_feeding`; then only inputs[0] is
        read. None: all inputs are.
        """
        names = tf_state.state_names(self.one_step)
        if step is not None and len(inputs):
            names = self._names_when_fed(names)
            state = {**dict(zip(names, values)), "fed": self.first_input(inputs[0])}
            xs, steps = self._numbers(inputs)
            outputs, after = self.run(step, *xs, steps=steps, state=state, lengths=lengths, **constants)
        else:
            state = dict(zip(names, values))
            outputs, after = self.run(self.one_step, inputs, state=state, lengths=lengths, **constants)
        return outputs, [after[name] for name in names]

    def fed_by(self, loop_function: LoopFunction | None) -> FeedPrevious | None:
        """The Step that feeds outputs back through the function; None without one."""
        if loop_function is None:
            return None
        self._feeding[0].loop_function = loop_function
        return self._feeding[0]

    def first_input(self, given: Tensor) -> Tensor:
        """The vector that stands for the first given input."""
        return given

    def _names_when_fed(self, names: list[str]) -> list[str]:
        return [f"cell.{name}" for name in names]

    def _numbers(self, inputs: Tensor) -> tuple[tuple[Tensor, ...], int | None]:
        return (numbers_of_next_steps(inputs.shape[0], inputs.shape[1], inputs.device),), None

    @property
    def cell(self) -> Step:
        """The cell whose state the decoder takes and returns."""
        return self.one_step


class RNNDecoder(Decoder):
    """tf.contrib.legacy_seq2seq.rnn_decoder.

    cell:          a cell of tf_cells, or any Step with States (B, features).
    loop_function: None: every input is read. Else step 0 reads inputs[0], and step i >= 1
                   loop_function(output of step i - 1, i), (B, input_size); i is (B, 1) int64.
    input_size:    of the inputs; may be left out where the cell knows it.

    decoder(decoder_inputs, initial_state) -> (outputs, state). decoder_inputs: a list of T tensors
    (B, input_size), or (T, B, input_size). initial_state: the cell's TF state: a tensor, an LSTMStateTuple, a
    tuple of layers. outputs: in the form of the inputs, (B, output_size) at every step. state: after the last.
    decoder_lengths: (B,), an extension: rows end there, later outputs are zeros.

    Raises InputError, StateError, StepError.
    """

    def __init__(
        self,
        cell: Step,
        loop_function: LoopFunction | None = None,
        scope: str | None = None,
        *,
        input_size: int | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        save: str = "auto",
    ) -> None:
        super().__init__(scope or "rnn_decoder", backend, save)
        self.input_size = sequences.size_of_inputs("RNNDecoder", cell, input_size)
        build(cell, self.input_size)
        self.one_step = cell
        self.loop_function = loop_function
        self._feeding = (FeedPrevious(cell, self.input_size, loop_function),)
        self.cast(dtype)

    def forward(self, decoder_inputs: Any, initial_state: Any, *, decoder_lengths: Any = None) -> tuple[Any, Any]:
        inputs = sequences.vectors(decoder_inputs, "decoder_inputs", self.input_size)
        values = tf_state.unpack(self.cell, initial_state)
        outputs, values = self.decode(inputs, values, self.fed_by(self.loop_function), decoder_lengths)
        return sequences.as_given(outputs, decoder_inputs), tf_state.pack(self.cell, values)

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        return variables_of(self.one_step, scope)


class LabelDecoder(Decoder):
    """A decoder whose inputs are labels: one_step takes the previous label (B,) and gives its output.

    feed_previous: True or a 0-d bool tensor that is True: only the first of the given labels is read, later
        ones are the argmax of the output (of output W + B with an output_projection).
    update_embedding_for_previous: whether labels that are fed back train the embedding.
    Both may be changed at any time, and for one call by its arguments of the same name.
    """

    one_step: EmbeddingWrapper
    feed_previous: bool | Tensor
    update_embedding_for_previous: bool

    def _embed(self, core: Step, num_symbols: int, embedding_size: int, projection: Projection | None) -> None:
        """Make one_step of the step that takes vectors."""
        self.one_step = EmbeddingWrapper(core, num_symbols, embedding_size)
        nn.init.xavier_uniform_(self.one_step.embedding)
        self.num_symbols, self.embedding_size = num_symbols, embedding_size
        self._feeding = tuple(FeedLabels(self.one_step, projection, update) for update in (False, True))

    @property
    def output_projection(self) -> Projection | None:
        """(W, B), or None. It is the caller's: no parameter of this module."""
        feeding: Any = self._feeding[0]
        return feeding.projection

    def fed_when(self, feed: bool | Tensor | None, update: bool | None) -> FeedPrevious | None:
        """The Step that feeds labels back, or None; arguments of a call, None where it leaves them to the module."""
        feed = self.feed_previous if feed is None else feed
        update = self.update_embedding_for_previous if update is None else update
        return self._feeding[bool(update)] if is_fed(feed) else None

    def first_input(self, given: Tensor) -> Tensor:
        return nn.functional.embedding(given, self.one_step.embedding)

    def _names_when_fed(self, names: list[str]) -> list[str]:
        return names  # both Steps call it `cell`

    def _numbers(self, inputs: Tensor) -> tuple[tuple[Tensor, ...], int | None]:
        return (), len(inputs)


class EmbeddingRNNDecoder(LabelDecoder):
    """tf.contrib.legacy_seq2seq.embedding_rnn_decoder: labels are embedded and go through the cell.

    No projection of its own: outputs are (B, cell's output_size), with an output_projection too, which acts on
    what is fed back only.
    output_projection: (W, B), (output_size, num_symbols) and (num_symbols,).
    feed_previous, update_embedding_for_previous: see LabelDecoder.

    decoder(decoder_inputs, initial_state, feed_previous=None, decoder_lengths=None) -> (outputs, state), as
    RNNDecoder, with labels: a list of T tensors (B,), or (T, B).
    Raises InputError for a projection of another shape, and as RNNDecoder.
    """

    def __init__(
        self,
        cell: Step,
        num_symbols: int,
        embedding_size: int,
        output_projection: Projection | None = None,
        feed_previous: bool | Tensor = False,
        update_embedding_for_previous: bool = True,
        scope: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        save: str = "auto",
    ) -> None:
        super().__init__(scope or "embedding_rnn_decoder", backend, save)
        projection = checked_projection(output_projection, tf_state.output_size(cell), num_symbols)
        self._embed(cell, num_symbols, embedding_size, projection)
        self.feed_previous = feed_previous
        self.update_embedding_for_previous = update_embedding_for_previous
        self.cast(dtype)

    @property
    def cell(self) -> Step:
        return self.one_step.cell

    def forward(
        self,
        decoder_inputs: Any,
        initial_state: Any,
        *,
        feed_previous: bool | Tensor | None = None,
        update_embedding_for_previous: bool | None = None,
        decoder_lengths: Any = None,
    ) -> tuple[Any, Any]:
        inputs = sequences.labels(decoder_inputs, "decoder_inputs")
        values = tf_state.unpack(self.cell, initial_state)
        step = self.fed_when(feed_previous, update_embedding_for_previous)
        outputs, values = self.decode(inputs, values, step, decoder_lengths)
        return sequences.as_given(outputs, decoder_inputs), tf_state.pack(self.cell, values)

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        yield Variable(joined(scope, "embedding"), self.one_step.embedding)
        yield from variables_of(self.cell, joined(scope, "rnn_decoder"))


def attention_mask(lengths: Any, states: Tensor) -> Tensor | None:
    """(B, L) bool, True within a row's length; None without lengths."""
    if lengths is None:
        return None
    lengths = torch.as_tensor(lengths, device=states.device)
    if lengths.shape != states.shape[:1] or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise InputError(
            message(
                "attention_lengths: not one length per row.",
                expected=f"({states.shape[0]},) integers",
                found=describe(lengths),
            )
        )
    return torch.arange(states.shape[1], device=states.device) < lengths.unsqueeze(1)
