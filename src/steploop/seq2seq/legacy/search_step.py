"""The legacy decoders as models for `sl.search`: from the label before to scores of the next."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...search.started import Started
from ...step import Step
from .. import tf_state
from .decoders import LabelDecoder


class LabelScores(Step):
    """A decoder's step from labels, with the output projection that its fed-back labels are chosen by."""

    def __init__(self, decoder: LabelDecoder) -> None:
        super().__init__()
        self.one_step = decoder.one_step
        self.decoder = (decoder,)  # in a tuple: its parameters are here once

    def _hands_constants_to(self) -> list[Step]:
        return [self.one_step]

    def step(self, label: Tensor, **constants: Any) -> Tensor:
        output = self.one_step(label, **constants)
        projection = self.decoder[0].output_projection
        return output if projection is None else output @ projection[0] + projection[1]


def started(decoder: LabelDecoder, values: list[Tensor], constants: dict[str, Any]) -> Started:
    """The decoder as a model for search.

    values: of its States before the first step, in the order of `tf_state.state_names`.
    """
    step = decoder.one_step._kept.get("search_step")
    if step is None or step.decoder[0] is not decoder:
        step = decoder.one_step._kept["search_step"] = LabelScores(decoder)
    names = [f"one_step.{name}" for name in tf_state.state_names(decoder.one_step)]
    return Started(step, dict(zip(names, values, strict=True)), constants)
