"""Decoders that read their own output: loop functions, and the Step that closes the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError, describe, describe_type, message
from ...state import State
from ...step import Step
from ..tf_cells import EmbeddingWrapper

LoopFunction = Callable[[Tensor, Any], Tensor]
Projection = tuple[Tensor, Tensor]


def extract_argmax_and_embed(
    embedding: Tensor, output_projection: Projection | None = None, update_embedding: bool = True
) -> LoopFunction:
    """A loop function: the embedding of the best label of the previous output. TF's _extract_argmax_and_embed.

    embedding: (labels, embedding_size).
    output_projection: (W, B), (output_size, labels) and (labels,): the label is the argmax of prev W + B.
    update_embedding: False stops the gradient into the embedding.

    Returns loop_function(prev, i) -> (B, embedding_size), prev (B, output_size), i not looked at. No gradient
    flows into prev or the projection.
    """

    def loop_function(prev: Tensor, _: Any = None) -> Tensor:
        if output_projection is not None:
            weight, bias = output_projection
            prev = prev @ weight + bias
        return F.embedding(prev.argmax(-1), embedding if update_embedding else embedding.detach())

    return loop_function


class FeedPrevious(Step):
    """A decoder's step, whose input is `loop_function` of its output at the step before.

    cell:          the step, input (B, input_size) -> output (B, ...).
    loop_function: (output, i) -> the input of step i. i is (B, 1) int64 and broadcasts against vectors.
    State `fed`:   the next input, (B, input_size); the caller gives the first one as part of `state=`.

    loop(steps=T, ...), or loop(i, ...) with i (T, B, 1), the number of the step after each, where the loop
    function wants it. At the last step the function is called once more, and what it gives is not used.
    """

    def __init__(self, cell: Step, input_size: int, loop_function: LoopFunction | None) -> None:
        super().__init__()
        self.cell = cell
        self.loop_function = loop_function
        self.fed = State(input_size)

    def step(self, i: Tensor | None = None, **constants: Any) -> Any:
        output = self.cell(self.fed.prev, **constants)
        self.fed.next = self._checked(self.next_input(output, i))
        return output

    def next_input(self, output: Tensor, i: Tensor | None) -> Tensor:
        """What the next step reads."""
        return cast("Callable[[Tensor, Any], Tensor]", self.loop_function)(output, i)

    def _checked(self, fed: Any) -> Tensor:
        wanted = self.fed.prev
        if isinstance(fed, Tensor) and fed.shape == wanted.shape:
            return fed  # the State checks the dtype, which autocast may change
        raise InputError(
            message(
                "loop_function returned something that is no input of this decoder.",
                expected=describe_type(wanted.shape, wanted.dtype),
                found=describe(fed),
                fix="loop_function(prev, i) -> (B, input_size); prev is the decoder's output, i is (B, 1)",
            )
        )


class FeedLabels(FeedPrevious):
    """FeedPrevious with the embedding of the best label.

    projection: (W, B) or None.  update_embedding: whether labels that are fed back train the embedding.
    """

    def __init__(self, embedded: EmbeddingWrapper, projection: Projection | None, update_embedding: bool) -> None:
        super().__init__(embedded.cell, embedded.embedding.shape[1], None)
        self.embedded = embedded
        self.projection = projection
        self.update_embedding = update_embedding

    def next_input(self, output: Tensor, i: Tensor | None) -> Tensor:
        choose = extract_argmax_and_embed(self.embedded.embedding, self.projection, self.update_embedding)
        return choose(output, i)


def numbers_of_next_steps(steps: int, batch: int, device: torch.device) -> Tensor:
    """(T, B, 1) int64: 1, 2, ..., T - 1, and T - 1 again where nothing follows, so that it stays an index."""
    numbers = torch.arange(1, steps + 1, device=device).clamp(max=max(steps - 1, 0))
    return numbers.reshape(-1, 1, 1).expand(steps, batch, 1)


def checked_projection(projection: Any, inputs: int | None, labels: int) -> Projection | None:
    """(W, B), or None. InputError for other shapes. inputs: None where any number of rows will do."""
    if projection is None:
        return None
    pair = tuple(projection) if isinstance(projection, (tuple, list)) else (projection,)
    fits = len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)
    if fits:
        weight, bias = pair
        rows = inputs if inputs is not None else (weight.shape[0] if weight.dim() == 2 else None)
        fits = tuple(weight.shape) == (rows, labels) and tuple(bias.shape) == (labels,)
    if not fits:
        raise InputError(
            message(
                "output_projection has the wrong shape.",
                expected=f"(W, B) with W ({'output_size' if inputs is None else inputs}, {labels}) and B ({labels},)",
                found=", ".join(describe(t) for t in pair),
                fix="W is (inputs, labels), TF's layout: linear.weight.t()",
            )
        )
    return pair


def is_fed(feed_previous: Any) -> bool:
    """The truth of a `feed_previous`, a bool or a 0-d bool tensor. InputError for anything else."""
    if isinstance(feed_previous, bool):
        return feed_previous
    if isinstance(feed_previous, Tensor) and feed_previous.dim() == 0 and feed_previous.dtype == torch.bool:
        return bool(feed_previous)
    raise InputError(
        message(
            "feed_previous is True or False.",
            expected="a bool, or a tensor of no axes and dtype bool",
            found=describe(feed_previous),
        )
    )
