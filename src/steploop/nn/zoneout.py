"""Zoneout: states that keep some previous values at random (Krueger et al. 2017, arXiv:1606.01305)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import StepError, message
from ..step import Step, states_below
from ._constants import check_constants_used, constants_for

OUTPUTS = ("zoned", "raw")


class Zoneout(Step):
    """A cell whose states keep each of their previous entries with probability p (Krueger et al. 2017).

    In training  next = where(m, prev, cell's next), m Bernoulli(p), drawn anew for every step, state and
    entry; in eval mode its expectation  next = p prev + (1 - p) (cell's next).

    cell: any Step; it is the child "cell", its states are "cell.h", ...
    p: one number for all floating states of the cell, or a dict from a state's path in the cell to a number,
      0 for those left out: {"h": 0.05, "c": 0.5} are the paper's values for an LSTM on text.
    output: "zoned" (the paper's): where the cell returns the next value of a state, the zoned value is
      returned in its place; "raw": what the cell returned.  What the cell computes within the step is
      untouched: an LSTM's h comes from its new c, not from the zoned one, as in the paper.

    Raises ValueError for p outside [0, 1] or an unknown output; StepError for a path that names no floating
    state, and, at the first step, where output="zoned" and the cell returns none of its states.
    """

    def __init__(self, cell: Step, p: float | dict[str, float], output: str = "zoned"):
        super().__init__()
        if not isinstance(cell, Step):
            raise StepError(
                message("Zoneout wraps a Step.", expected="a cell with states", found=type(cell).__name__)
            )
        if output not in OUTPUTS:
            raise ValueError(f'Zoneout: output must be "zoned" or "raw", got {output!r}')
        for value in p.values() if isinstance(p, dict) else (p,):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"Zoneout: p is a probability in [0, 1], got {value}")
        self.cell = cell
        self.p = dict(p) if isinstance(p, dict) else p
        self.output = output
        if isinstance(p, dict):
            self._check_paths(p)

    def _check_paths(self, p: dict[str, float]) -> None:
        paths = [path for path, _ in states_below(self.cell)]
        for path in p:
            if path not in paths:
                raise StepError(
                    message(
                        f"Zoneout: p names a state {path!r} that {type(self.cell).__name__} does not have.",
                        expected="paths among " + (", ".join(paths) or "(it has no states)"),
                        found=repr(path),
                    )
                )

    def _hands_constants_to(self) -> list[Step]:
        return [self.cell]

    def step(self, *xs: Any, **constants: Any) -> Any:
        check_constants_used(self, [self.cell], constants)
        y = self.cell(*xs, **constants_for(self.cell, constants))
        zoned_in_place_of: dict[int, Tensor] = {}
        for path, state in states_below(self.cell):
            new = state.latest
            zoned = self._zoned(path, state.prev, new)
            if zoned is not new:
                state.rewrite(zoned)
            zoned_in_place_of.setdefault(id(new), zoned)
        return y if self.output == "raw" else self._returned(y, zoned_in_place_of)

    def _zoned(self, path: str, prev: Tensor, new: Tensor) -> Tensor:
        p = self.p.get(path, 0.0) if isinstance(self.p, dict) else self.p
        if not new.is_floating_point():
            if isinstance(self.p, dict) and p > 0.0:
                raise StepError(
                    message(f"Zoneout: the state {path!r} is {new.dtype}; only floating states are zoned.")
                )
            return new
        if p == 0.0:
            return new
        if self.training:
            return torch.where(torch.rand(new.shape, device=new.device) < p, prev, new)
        return p * prev + (1.0 - p) * new

    def _returned(self, y: Any, zoned_in_place_of: dict[int, Tensor]) -> Any:
        leaves, structure = pytree.tree_flatten(y)
        if not any(id(leaf) in zoned_in_place_of for leaf in leaves):
            raise StepError(
                message(
                    f"Zoneout: {type(self.cell).__name__} returns none of its states: no zoned output.",
                    expected="a cell that returns what it assigned to a state's .next",
                    fix='Zoneout(cell, p, output="raw"), or put what is computed from the state outside: '
                    "Residual(Zoneout(cell, p)) rather than Zoneout(Residual(cell), p)",
                )
            )
        return pytree.tree_unflatten([zoned_in_place_of.get(id(leaf), leaf) for leaf in leaves], structure)

    def extra_repr(self) -> str:
        return f"p={self.p}" + ("" if self.output == "zoned" else f", output={self.output!r}")
