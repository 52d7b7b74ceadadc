"""attention_decoder and embedding_attention_decoder (Vinyals et al. 2015, arXiv:1412.7449)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError, describe, message
from ...state import State
from ...step import Step, states_below
from .. import tf_state
from ..tf_cells import Linear, build
from ..tf_variables import Variable, joined, variables_of
from . import sequences
from .decoders import Decoder, LabelDecoder, attention_mask
from .feeding import FeedPrevious, LoopFunction, Projection, checked_projection


class AttentionStep(Step):
    """One step of an attention decoder: x (B, input_size) -> output (B, output_size).

    x' = Linear([x, a]) with what was attended to before, a (B, heads A);  out = cell(x');
    q = all of the cell's States side by side (LSTM: c before h; all layers);
    per head: s = sum(v tanh(H K + Linear(q)));  a = sum(softmax(s) H);  output = Linear([out, a]).

    Constants, made by `constants`: attention_states H (B, L, A); attention_keys H K (B, L, heads A), which no
    step changes; attention_mask (B, L) bool or None: all of H.
    States: the cell's, below `cell`, and `attention` (B, heads A).
    The parameters of all heads stand side by side, so that one product serves all of them.
    """

    def __init__(self, cell: Step, input_size: int, attention_size: int, output_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.attention_size, self.output_size = num_heads, attention_size, output_size
        attended = num_heads * attention_size
        self.input_projection = Linear(input_size + attended, input_size)
        build(cell, input_size)
        self.cell = cell
        self.attention_kernel = nn.Parameter(torch.empty(attention_size, attended))
        self.attention_v = nn.Parameter(torch.empty(num_heads, attention_size))
        self.query = Linear(sum(tf_state.state_widths(cell)), attended)
        self.output_projection = Linear(tf_state.output_size(cell) + attended, output_size)
        self.attention = State(attended)
        self._draw()

    def _draw(self) -> None:
        """Each head Glorot-uniform by itself, as TF's separate variables are."""
        nn.init.uniform_(self.attention_v, -1, 1).data.mul_(math.sqrt(3 / self.attention_size))
        for parameter in (self.attention_kernel, self.query.kernel):
            for head in range(self.num_heads):
                nn.init.xavier_uniform_(parameter.data[:, self._columns(head)])

    def constants(self, states: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """What is the same at every step, of states (B, L, A) and mask (B, L) or None."""
        if mask is not None:  # what stands beyond the lengths is never read, a NaN neither
            states = torch.where(mask.unsqueeze(-1), states, 0.0)
        made = {"attention_states": states, "attention_keys": states @ self.attention_kernel}
        return made if mask is None else made | {"attention_mask": mask}

    def step(
        self,
        x: Tensor,
        *,
        attention_states: Tensor,
        attention_keys: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        out = self.cell(self.input_projection(x, self.attention.prev))
        attended = self.attend(self._query(), attention_states, attention_keys, attention_mask)
        self.attention.next = attended
        return self.output_projection(out, attended)

    def _query(self) -> Tensor:
        return torch.cat([state.latest for _, state in states_below(self.cell)], -1)

    def attend(
        self,
        query: Tensor,
        attention_states: Tensor,
        attention_keys: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """query (B, Q) and the constants -> (B, heads A), head by head."""
        heads, mask = (self.num_heads, self.attention_size), attention_mask
        y = self.query(query).unflatten(-1, heads).unsqueeze(1)
        scores = (self.attention_v * torch.tanh(attention_keys.unflatten(-1, heads) + y)).sum(-1)
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(-1), torch.finfo(scores.dtype).min)
        weights = scores.softmax(1)
        if mask is not None:  # a row without anything to attend to gets zeros
            weights = weights * mask.unsqueeze(-1)
        return torch.einsum("blh,bla->bha", weights, attention_states).flatten(1)

    def _columns(self, head: int) -> slice:
        return slice(head * self.attention_size, (head + 1) * self.attention_size)

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        for head in range(self.num_heads):
            yield from self._variables_of_head(head, scope)
        yield from self.input_projection.tf_variables(scope)
        yield from self.output_projection.tf_variables(joined(scope, "AttnOutputProjection"))
        yield from variables_of(self.cell, scope)

    def _variables_of_head(self, head: int, scope: str) -> Iterator[Variable]:
        part = self._columns(head)
        yield Variable(joined(scope, f"AttnW_{head}"), self.attention_kernel, lambda t: t[None, None, :, part])
        yield Variable(joined(scope, f"AttnV_{head}"), self.attention_v, lambda t: t[head])
        name = joined(scope, f"Attention_{head}")
        yield Variable(joined(name, "kernel"), self.query.kernel, lambda t: t[:, part])
        yield Variable(joined(name, "bias"), self.query.bias, lambda t: t[part])


class _Attends(Decoder):
    """What both attention decoders share."""

    initial_state_attention: bool

    def _core(
        self,
        cell: Step,
        input_size: int,
        attention_size: int | None,
        output_size: int | None,
        num_heads: int,
        initial_state_attention: bool,
    ) -> AttentionStep:
        owner = type(self).__name__
        if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
            raise InputError(
                message(
                    f"{owner}: with less than one head, use a decoder without attention.",
                    expected="num_heads >= 1",
                    found=describe(num_heads),
                    fix="RNNDecoder or EmbeddingRNNDecoder",
                )
            )
        if not isinstance(attention_size, int) or attention_size < 1:
            raise InputError(
                message(
                    f"{owner} has to know the size of what it attends to.",
                    expected="attention_size=, the last axis of attention_states (B, L, A)",
                    found=describe(attention_size),
                    fix=f"{owner}(cell, ..., attention_size=8)",
                )
            )
        if output_size is None:
            output_size = tf_state.output_size(cell)
        self.initial_state_attention = initial_state_attention
        self.attention_size = attention_size
        return AttentionStep(cell, input_size, attention_size, output_size, num_heads)

    @property
    def attention_step(self) -> AttentionStep:
        """The step that takes vectors."""
        raise NotImplementedError

    @property
    def cell(self) -> Step:
        return self.attention_step.cell

    def start(self, inputs: Tensor, initial_state: Any, states: Any, lengths: Any) -> tuple[list[Any], dict[str, Any]]:
        """The States' values before the first step, and the constants of the loop."""
        if not len(inputs):
            raise InputError(
                message(
                    f"{type(self).__name__} must be given at least one input.",
                    expected="decoder_inputs of one step or more",
                    found=describe(inputs),
                )
            )
        states = self._checked(states, inputs.shape[1])
        values = tf_state.unpack(self.cell, initial_state)
        step = self.attention_step
        constants = step.constants(states, attention_mask(lengths, states))
        kernel = step.attention_kernel
        if self.initial_state_attention:
            attended = step.attend(torch.cat(values, -1), **constants).to(kernel.dtype)
        else:
            attended = kernel.new_zeros(inputs.shape[1], kernel.shape[1])
        return [*values, attended], constants

    def _checked(self, states: Any, batch: int) -> Tensor:
        wanted = (batch, "L", self.attention_size)
        if isinstance(states, Tensor) and states.dim() == 3:
            if (states.shape[0], states.shape[2]) == (batch, self.attention_size):
                return states
        raise InputError(
            message(
                "attention_states: not of this decoder's size.",
                expected=f"({', '.join(map(str, wanted))}) floats",
                found=describe(states),
                fix="the batch comes first: encoder_outputs.transpose(0, 1)",
            )
        )


class AttentionDecoder(_Attends):
    """tf.contrib.legacy_seq2seq.attention_decoder. AttentionStep has its formulas.

    cell, loop_function, input_size: as for RNNDecoder; `prev` is the output after its last Linear.
    output_size: None: the cell's.  num_heads: how many places are read at each step.
    attention_size: A, the last axis of attention_states.
    initial_state_attention: the first step sees what the initial state attends to, instead of zeros.

    decoder(decoder_inputs, initial_state, attention_states) -> (outputs, state), as RNNDecoder;
    attention_states: (B, L, A).
    attention_lengths: (B,), an extension (TF has no mask): a row attends to that many entries only.
    decoder_lengths: (B,), an extension: rows end there, later outputs are zeros.

    Raises InputError for no inputs, fewer heads than one, an attention_size that is not given, attention_states
    of another; and as RNNDecoder.
    """

    one_step: AttentionStep

    def __init__(
        self,
        cell: Step,
        output_size: int | None = None,
        num_heads: int = 1,
        loop_function: LoopFunction | None = None,
        dtype: torch.dtype | None = None,
        scope: str | None = None,
        initial_state_attention: bool = False,
        *,
        input_size: int | None = None,
        attention_size: int | None = None,
        backend: str = "auto",
        save: str = "auto",
    ) -> None:
        super().__init__(scope or "attention_decoder", backend, save)
        self.input_size = sequences.size_of_inputs("AttentionDecoder", cell, input_size)
        self.one_step = self._core(
            cell, self.input_size, attention_size, output_size, num_heads, initial_state_attention
        )
        self.loop_function = loop_function
        self._feeding = (FeedPrevious(self.one_step, self.input_size, loop_function),)
        self.cast(dtype)

    @property
    def attention_step(self) -> AttentionStep:
        return self.one_step

    def forward(
        self,
        decoder_inputs: Any,
        initial_state: Any,
        attention_states: Tensor,
        *,
        attention_lengths: Any = None,
        decoder_lengths: Any = None,
    ) -> tuple[Any, Any]:
        inputs = sequences.vectors(decoder_inputs, "decoder_inputs", self.input_size)
        values, constants = self.start(inputs, initial_state, attention_states, attention_lengths)
        step = self.fed_by(self.loop_function)
        outputs, values = self.decode(inputs, values, step, decoder_lengths, **constants)
        return sequences.as_given(outputs, decoder_inputs), tf_state.pack(self.cell, values[:-1])

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        return self.one_step.tf_variables(scope)


class EmbeddingAttentionDecoder(LabelDecoder, _Attends):
    """tf.contrib.legacy_seq2seq.embedding_attention_decoder: labels are embedded and go through AttentionStep.

    cell, num_symbols, embedding_size, feed_previous, update_embedding_for_previous: as for EmbeddingRNNDecoder.
    num_heads, output_size, attention_size, initial_state_attention: as for AttentionDecoder.
    output_projection: (W, B), (output_size, num_symbols) and (num_symbols,); acts on what is fed back only.

    decoder(decoder_inputs, initial_state, attention_states, feed_previous=None, attention_lengths=None,
    decoder_lengths=None) -> (outputs, state), as AttentionDecoder, with labels: a list of T tensors (B,), or
    (T, B).
    Raises InputError as AttentionDecoder, and for a projection of another shape.
    """

    def __init__(
        self,
        cell: Step,
        num_symbols: int,
        embedding_size: int,
        num_heads: int = 1,
        output_size: int | None = None,
        output_projection: Projection | None = None,
        feed_previous: bool | Tensor = False,
        update_embedding_for_previous: bool = True,
        dtype: torch.dtype | None = None,
        scope: str | None = None,
        initial_state_attention: bool = False,
        *,
        attention_size: int | None = None,
        backend: str = "auto",
        save: str = "auto",
    ) -> None:
        super().__init__(scope or "embedding_attention_decoder", backend, save)
        output_size = tf_state.output_size(cell) if output_size is None else output_size
        core = self._core(cell, embedding_size, attention_size, output_size, num_heads, initial_state_attention)
        projection = checked_projection(output_projection, output_size, num_symbols)
        self._embed(core, num_symbols, embedding_size, projection)
        self.feed_previous = feed_previous
        self.update_embedding_for_previous = update_embedding_for_previous
        self.cast(dtype)

    @property
    def attention_step(self) -> AttentionStep:
        step: Any = self.one_step.cell
        return step

    def forward(
        self,
        decoder_inputs: Any,
        initial_state: Any,
        attention_states: Tensor,
        *,
        feed_previous: bool | Tensor | None = None,
        update_embedding_for_previous: bool | None = None,
        attention_lengths: Any = None,
        decoder_lengths: Any = None,
    ) -> tuple[Any, Any]:
        inputs = sequences.labels(decoder_inputs, "decoder_inputs")
        values, constants = self.start(inputs, initial_state, attention_states, attention_lengths)
        step = self.fed_when(feed_previous, update_embedding_for_previous)
        outputs, values = self.decode(inputs, values, step, decoder_lengths, **constants)
        return sequences.as_given(outputs, decoder_inputs), tf_state.pack(self.cell, values[:-1])

    def tf_variables(self, scope: str) -> Iterator[Variable]:
        yield Variable(joined(scope, "embedding"), self.one_step.embedding)
        yield from variables_of(self.attention_step, joined(scope, "attention_decoder"))
