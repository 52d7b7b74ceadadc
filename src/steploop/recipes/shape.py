"""The sizes of a recipe's model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import steploop as sl

CELLS = {"gru": sl.nn.GRUCell, "lstm": sl.nn.LSTMCell}


@dataclass(frozen=True)
class ModelShape:
    """What decides which weights a model has; kept in its checkpoint. Each recipe has its own defaults."""

    cell: str = "gru"
    layers: int = 1
    units: int = 256
    embedding: int = 64
    dropout: float = 0.1

    def __str__(self) -> str:
        return f"{self.layers} x {self.units} {self.cell.upper()}, embedding {self.embedding}"

    def fits(self, other: ModelShape) -> bool:
        """Whether weights of one can be loaded into the other: dropout has none."""
        return dataclasses.replace(self, dropout=other.dropout) == other
