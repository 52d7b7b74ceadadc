"""Several layers, one above the other, as one step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import StepError, message
from ..loop import Loop
from ..step import Step
from ._constants import check_constants_used, constants_for
from .bidirectional import Bidirectional


def _whole_sequences(k: int, kind: str) -> str:
    return message(
        f"Stack: layer {k} is a {kind}, which reads whole sequences; a Stack runs one step of all its layers.",
        expected="Steps or nn.Modules that take one step",
        found=kind,
        fix="one layer after the other: ys, state = layer(xs);  ys, state = sl.Loop(cell)(ys)",
    )


class Stack(Step):
    """Cells one above the other: the input goes through each in turn; the last one's output is returned.

    The children are named "0", "1", ...: states are "0.h", "1.h", ..., parameters "0.weight_ih", ...  Every
    cell keeps its own states.  A layer may be any Step, or any nn.Module without memory (nn.Linear,
    nn.LayerNorm).
    The first layer takes all per-step inputs, each later one the output of the layer below.  A constant
    (keyword argument) goes to every layer whose `step` or `forward` names it.
    `stack[k]`, `len(stack)` and iteration give the layers.

    Raises StepError for no cells, for something that is no module or that reads whole sequences (a Loop,
    Bidirectional), and for a constant that no layer takes.
    """

    def __init__(self, *cells: nn.Module):
        super().__init__()
        if not cells:
            raise StepError(message("Stack has no cells.", fix="Stack(GRUCell(8, 16), GRUCell(16, 16))"))
        for k, cell in enumerate(cells):
            if not isinstance(cell, nn.Module):
                raise StepError(
                    message(
                        f"Stack: layer {k} is not a module.",
                        expected="Steps or nn.Modules",
                        found=type(cell).__name__,
                        fix="Stack(*cells)" if isinstance(cell, (list, tuple)) else None,
                    )
                )
            if isinstance(cell, (Loop, Bidirectional, nn.RNNBase)):
                raise StepError(_whole_sequences(k, type(cell).__name__))
            self.add_module(str(k), cell)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(cell for cell in self._modules.values() if cell is not None)

    def __getitem__(self, k: int) -> nn.Module:
        return list(self)[k]

    def _hands_constants_to(self) -> list[nn.Module]:
        return list(self)

    def step(self, *xs: Any, **constants: Any) -> Any:
        check_constants_used(self, self, constants)
        for cell in self:
            xs = (cell(*xs, **constants_for(cell, constants)),)
        return xs[0]
