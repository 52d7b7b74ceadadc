"""A residual connection around one layer (He et al. 2016; in stacked LSTMs: Wu et al. 2016)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import StepError, describe, message
from ..step import Step
from ._constants import check_constants_used, constants_for


class Residual(Step):
    """`x + cell(x)`.  The child is named "cell": states "cell.h", parameters "cell.weight_ih".

    One step takes x (B, ...) and the cell's constants; the cell must return one tensor of x's shape.
    Raises StepError that names both shapes where they differ (nothing is broadcast).
    """

    def __init__(self, cell: nn.Module):
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise StepError(message("Residual wraps a Step or an nn.Module.", found=describe(cell)))
        self.cell = cell

    def _hands_constants_to(self) -> list[nn.Module]:
        return [self.cell]

    def step(self, x: Tensor, **constants: Any) -> Tensor:
        check_constants_used(self, [self.cell], constants)
        y = self.cell(x, **constants_for(self.cell, constants))
        name = type(self.cell).__name__
        if not isinstance(y, Tensor):
            raise StepError(
                message(
                    f"Residual adds one tensor to x, and {name} returned another thing.", found=describe(y)
                )
            )
        # B may be symbolic, and is the same
        if y.shape[1:] != x.shape[1:] or y.dim() != x.dim():
            raise StepError(
                message(
                    f"Residual: the shapes of x and of what {name} returns differ.",
                    expected=f"x: {_shape(x)}",
                    found=f"{name}: {_shape(y)}",
                    fix="give the cell a hidden size equal to its input size, or a projection to it: "
                    "Residual(Stack(cell, nn.Linear(hidden, input)))",
                )
            )
        return x + y


def _shape(t: Tensor) -> str:
    return "(" + ", ".join(["B", *map(str, t.shape[1:])]) + ")"
