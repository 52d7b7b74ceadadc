"""A decoder that looks at a memory at every step, with input feeding (Luong, Pham & Manning 2015)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import StepError, describe, message
from ...state import State
from ...step import Step
from .._constants import check_constants_used, constants_for


class DecoderWithAttention(Step):
    """Scores of the next label from the label before it, a cell, and an attention.

        x = [embedding(label); fed],  h = cell(x),  c, a = attention(h, ...)
        fed' = tanh(combine([c; h])) (eq. 5),  scores = output(fed') (eq. 6 before its softmax)

    `fed` is the attentional vector of the step before, zeros before the first: input feeding (Luong et al. 2015,
    arXiv:1508.04025, section 3.3).

        decoder = DecoderWithAttention(
            nn.Embedding(V, E), sl.nn.GRUCell(E + A, H), AdditiveAttention(H, D, 64),
            combine=nn.Linear(D + H, A), output=nn.Linear(A, V),
        )
        scores, state = decoder(labels, memory=memory, memory_lengths=lengths)       # labels (T, B): teacher forcing

    embedding: a module, labels (B,) -> (B, E).
    cell:      any Step that takes (B, E + A), or (B, E) without input feeding, and returns (B, H): a Stack, say.
    attention: any Step that takes (B, H) and returns (context (B, C), weights).
    combine:   a module (B, C + H) -> (B, A); a Linear without bias is the paper's.  output: (B, A) -> (B, V).
    size:      A, where `combine` has no `out_features` that says it.
    input_feeding: False leaves `fed` out of x.
    return_weights: what a step returns: scores (B, V), or {"scores": ..., "weights": ...}.

    label: (B,) int64, the label before this step, so a decoder is a model for search; or floating (B, V), weights of
    the labels (a distribution; a label that carries a gradient): then `embedding` is an nn.Embedding.
    Constants go to those of the cell and the attention that name them. To start the cell from the memory, subclass:
    `def begin(self, memory): self.cell.h.prev = ...`.

    States: `fed` (B, A) with input feeding, `cell.<name>`, `attention.<name>`.
    Raises StepError for a cell or an attention that is no Step, and where A is not known.
    """

    def __init__(
        self,
        embedding: nn.Module,
        cell: Step,
        attention: Step,
        combine: nn.Module,
        output: nn.Module,
        *,
        size: int | None = None,
        input_feeding: bool = True,
        return_weights: bool = False,
    ) -> None:
        super().__init__()
        for name, part in (("cell", cell), ("attention", attention)):
            if not isinstance(part, Step):
                raise StepError(
                    message(f"DecoderWithAttention: {name} is a Step.", expected="an sl.Step", found=describe(part))
                )
        self.embedding, self.cell, self.attention = embedding, cell, attention
        self.combine, self.output = combine, output
        self.return_weights = return_weights
        self.fed = None
        if input_feeding:
            size = getattr(combine, "out_features", None) if size is None else size
            if size is None:
                raise StepError(
                    message(
                        "DecoderWithAttention: nothing says how many features `combine` gives.",
                        expected="an nn.Linear, or size=",
                        found=describe(combine),
                        fix="DecoderWithAttention(..., size=A)",
                    )
                )
            self.fed = State(size)

    def _hands_constants_to(self) -> list[Step]:
        return [self.attention, self.cell]

    def step(self, label: Tensor, **constants: Any) -> Tensor | dict[str, Tensor]:
        check_constants_used(self, [self.attention, self.cell], constants)
        x = self._embedded(label)
        if self.fed is not None:
            x = torch.cat([x, self.fed.prev], -1)
        h = self.cell(x, **constants_for(self.cell, constants))
        context, weights = self.attention(h, **constants_for(self.attention, constants))
        attentional = torch.tanh(self.combine(torch.cat([context, h], -1)))
        if self.fed is not None:
            self.fed.next = attentional
        scores = self.output(attentional)
        return {"scores": scores, "weights": weights} if self.return_weights else scores

    def _embedded(self, label: Tensor) -> Tensor:
        return label @ cast(Tensor, self.embedding.weight) if label.is_floating_point() else self.embedding(label)

    def extra_repr(self) -> str:
        return "" if self.fed is not None else "input_feeding=False"
