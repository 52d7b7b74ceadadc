"""TwoDLSTM: an LSTM over a grid of target steps and source positions."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError, describe, message
from ..loop import Loop
from ..state import State
from ..step import Step, unbatched
from .base import Memory, check_step_input, cleaned, is_valid, one_of, run_child, whole_number

POOLINGS = ("last", "max", "mean", "weighted", None)


class TwoDLSTM(Memory):
    """Multidimensional LSTM (Leifert et al. 2016; Bahar et al. 2018, arXiv:1810.03975), over (target y,
    source x).

        a[y,x] = weight_source s_x + weight_target t_y + weight_h h[y,x-1] + weight_v h[y-1,x] + bias
        i, f, l, o = sigmoid of its parts;  g the last part      (order: input, forget, lambda, output, cell)
        c[y,x] = i tanh(g) + f (l c[y-1,x] + (1 - l) c[y,x-1]);  h[y,x] = o tanh(c[y,x])

    Missing neighbours are 0, and so is everything at source positions x >= the source length. RETURNN's
    TwoDLSTMLayer, which has no CPU kernel.  One step is one target row, an inner loop over the source. A
    whole sequence goes by anti-diagonals: T + S - 1 steps, each over all cells that it can reach.

    source_size, target_size, hidden_size: features.  bias: whether there is one (RETURNN: none).
    pooling: over the valid source positions of a row: "last", "max", "mean", "weighted" (by a softmax of
        t_y weight_pool h[y,x]), or None: all of them. (RETURNN's max and weighted take the zeros at padded x
        too, so a row depends on the others' lengths; for its numbers pool what None gives.)

    lstm(target_x, source=..., source_lengths=None): target_x (B, target_size), source (B, S, source_size),
    source_lengths (B,) -> (B, hidden_size), zeros where the source is empty; without pooling (B, S,
    hidden_size).

    Raises InputError for sizes, a pooling or a source that do not fit.
    """

    source_size: int
    target_size: int
    hidden_size: int

    def __init__(
        self,
        source_size: int,
        target_size: int,
        hidden_size: int,
        pooling: str | None = "last",
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, size in (
            ("source_size", source_size),
            ("target_size", target_size),
            ("hidden_size", hidden_size),
        ):
            setattr(self, name, whole_number("TwoDLSTM", name, size, 1))
        self.pooling = one_of("TwoDLSTM", "pooling", pooling, POOLINGS)
        gates = 5 * hidden_size
        self.weight_source = nn.Parameter(torch.empty(gates, source_size))
        self.weight_target = nn.Parameter(torch.empty(gates, target_size))
        self.weight_h = nn.Parameter(torch.empty(gates, hidden_size))
        self.weight_v = nn.Parameter(torch.empty(gates, hidden_size))
        self.bias = nn.Parameter(torch.empty(gates)) if bias else None
        self.weight_pool = None
        if pooling == "weighted":
            self.weight_pool = nn.Parameter(torch.empty(target_size, hidden_size))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden_size**-0.5), hidden_size**-0.5)
        self.row = Loop(_Row(hidden_size))
        self.diagonals = Loop(_Diagonal())
        self.h = State(...)
        self.c = State(...)

    def check(self, target_x: Tensor, *, source: Tensor, source_lengths: Tensor | None = None) -> None:
        check_step_input("TwoDLSTM", "target_x", target_x, features=self.target_size)
        self._check_source(source, source_lengths)

    def step(self, target_x: Tensor, *, source: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        self.check(target_x, source=source, source_lengths=source_lengths)
        positions = source.shape[1]
        above_h = self.h.sized(positions, self.hidden_size, like=self.weight_h)
        above_c = self.c.sized(positions, self.hidden_size, like=self.weight_h)
        gates = self._of_source(source, source_lengths) + F.linear(target_x, self.weight_target).unsqueeze(1)
        gates = gates + F.linear(above_h, self.weight_v)
        (h, c), _ = self.row(
            gates.transpose(0, 1),
            above_c.transpose(0, 1),
            lengths=source_lengths,
            weight=unbatched(self.weight_h),
        )
        h, c = h.transpose(0, 1), c.transpose(0, 1)
        self.h.next, self.c.next = h, c
        return self._pooled(h, source_lengths, target_x)

    def _of_source(self, source: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, S, 5H), what does not depend on the target."""
        source = cleaned(source.transpose(0, 1), lengths).transpose(0, 1)
        return F.linear(source, self.weight_source, self.bias)

    def _check_source(self, source: Any, lengths: Any) -> None:
        if not isinstance(source, Tensor) or source.dim() != 3 or source.shape[2] != self.source_size:
            raise InputError(
                message(
                    "TwoDLSTM: source is the other axis of the grid.",
                    expected=f"(B, S, {self.source_size})",
                    found=describe(source),
                    fix="lstm(target_x, source=encoder_outputs, source_lengths=lengths)",
                )
            )
        if lengths is not None and (not isinstance(lengths, Tensor) or lengths.dim() != 1):
            raise InputError(
                message(
                    "TwoDLSTM: source_lengths has one entry per row.",
                    expected="(B,) of integers",
                    found=describe(lengths),
                )
            )

    def _pooled(self, h: Tensor, lengths: Tensor | None, target: Tensor) -> Tensor:
        """h (..., B, S, H), target (..., B, target_size) -> (..., B, H)."""
        if self.pooling is None:
            return h.clone()
        if self.pooling == "last":
            if lengths is None:
                return h[..., -1, :]
            index = (lengths - 1).clamp(min=0).to(torch.int64).reshape(-1, 1, 1)
            return h.gather(-2, index.expand(*h.shape[:-2], 1, h.shape[-1])).squeeze(-2)
        if lengths is None:
            if self.pooling == "mean":
                return h.mean(-2)
            if self.pooling == "max":
                return h.amax(-2)
            return (torch.softmax(self._energies(h, target), -1).unsqueeze(-1) * h).sum(-2)
        valid = torch.arange(h.shape[-2], device=h.device) < lengths.unsqueeze(-1)  # (B, S)
        some = (lengths > 0).reshape(-1, 1)
        if self.pooling == "mean":
            return h.sum(-2) / lengths.clamp(min=1).to(h.dtype).unsqueeze(-1)
        if self.pooling == "max":
            largest = torch.where(valid.unsqueeze(-1), h, float("-inf")).amax(-2)
            return torch.where(some, largest, torch.zeros_like(largest))
        # rows without a source get a softmax over zeros: finite, and their h are zeros
        scores = torch.where(valid | ~some, self._energies(h, target), float("-inf"))
        return (torch.softmax(scores, -1).unsqueeze(-1) * h).sum(-2)

    def _energies(self, h: Tensor, target: Tensor) -> Tensor:
        """(..., B, S)."""
        return torch.matmul(h, torch.matmul(target, cast(Tensor, self.weight_pool)).unsqueeze(-1)).squeeze(-1)

    def sequence(
        self, xs: tuple[Any, ...], constants: dict[str, Any], state: dict[str, Tensor], reset_to: dict[str, Tensor],
        lengths: Tensor | None, resets: Tensor | None,
    ) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
        target = cleaned(xs[0], lengths)
        source, source_lengths = constants["source"], constants.get("source_lengths")
        steps, batch = target.shape[:2]
        positions = source.shape[1]
        grid = _Grid(steps, positions, is_valid(lengths, steps, batch, target.device))
        exists = is_valid(source_lengths, positions, batch, target.device).t()  # (B, S)
        of_target = F.linear(target, self.weight_target)
        # (D, B, S, 5H), the largest array here: added to where it is
        gates = grid.skewed(of_target).add_(self._of_source(source, source_lengths))
        inputs = [gates, grid.active()]
        given = {"weight": unbatched(torch.cat([self.weight_h, self.weight_v], 1)), "exists": exists}
        if resets is not None:
            inputs.append(grid.skewed(resets))
            given |= {"fresh_h": reset_to["h"], "fresh_c": reset_to["c"]}
        h, after = run_child(
            self.diagonals.step, tuple(inputs), given, state, None, None, None, batch, steps + positions - 1
        )
        return self._pooled(grid.straight(h), source_lengths, target), after

    def extra_repr(self) -> str:
        return f"{self.source_size}, {self.target_size}, {self.hidden_size}, pooling={self.pooling!r}"


class _Row(Step):
    """One target row: steps over the source positions."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.h = State(hidden_size)
        self.c = State(hidden_size)

    def step(self, gates: Tensor, above_c: Tensor, *, weight: Tensor) -> tuple[Tensor, Tensor]:
        h, c = _cell(gates + F.linear(self.h.prev, weight), self.c.prev, above_c)
        self.h.next, self.c.next = h, c
        return h, c


def _cell(gates: Tensor, left_c: Tensor, above_c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, mix, o, g = gates.chunk(5, -1)
    mix = torch.sigmoid(mix)
    c = torch.sigmoid(i) * torch.tanh(g) + torch.sigmoid(f) * (mix * above_c + (1 - mix) * left_c)
    return torch.sigmoid(o) * torch.tanh(c), c


class _Diagonal(Step):
    """One anti-diagonal of the grid, seen along the source: all cells that the one before can reach.

    A position whose cell on this diagonal is no valid one (before the first target row, beyond the last)
    keeps what it has: first the initial state, at last the final one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.h = State(..., init=0.0)
        self.c = State(..., init=0.0)

    def step(
        self,
        gates: Tensor,
        active: Tensor,
        reset: Tensor | None = None,
        *,
        weight: Tensor,
        exists: Tensor,
        fresh_h: Tensor | None = None,
        fresh_c: Tensor | None = None,
    ) -> Tensor:
        h = self.h.sized(gates.shape[1], gates.shape[2] // 5, like=gates)
        c = self.c.sized(gates.shape[1], gates.shape[2] // 5, like=gates)
        above_h, above_c = h, c
        if reset is not None:
            above_h = torch.where(reset.unsqueeze(-1), cast(Tensor, fresh_h), h)
            above_c = torch.where(reset.unsqueeze(-1), cast(Tensor, fresh_c), c)
        left_h = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
        left_c = torch.cat([torch.zeros_like(c[:, :1]), c[:, :-1]], 1)
        new_h, new_c = _cell(gates + F.linear(torch.cat([left_h, above_h], -1), weight), left_c, above_c)
        exists, active = exists.unsqueeze(-1), active.unsqueeze(-1)
        self.h.next = torch.where(active, torch.where(exists, new_h, 0.0), h)
        self.c.next = torch.where(active, torch.where(exists, new_c, 0.0), c)
        return self.h.next


class _Grid:
    """(T, S) cells by anti-diagonals x + y = d: (D, B, S), D = T + S - 1."""

    def __init__(self, steps: int, positions: int, valid: Tensor) -> None:
        self.steps, self.valid = steps, valid
        self.x = torch.arange(positions, device=valid.device)
        diagonal = torch.arange(steps + positions - 1, device=valid.device)
        self.y = diagonal[:, None] - self.x  # (D, S)

    def skewed(self, values: Tensor) -> Tensor:
        """values (T, B, ...) -> (D, B, S, ...): that of the cell's target row."""
        rows = torch.arange(values.shape[1], device=values.device).unsqueeze(1)
        return values[self.y.clamp(0, self.steps - 1).unsqueeze(1), rows]

    def active(self) -> Tensor:
        """(D, B, S): whether there is such a cell."""
        inside = (self.y >= 0) & (self.y < self.steps)
        return self.skewed(self.valid) & inside.unsqueeze(1)

    def straight(self, h: Tensor) -> Tensor:
        """h (D, B, S, H) -> (T, B, S, H)."""
        time = torch.arange(self.steps, device=h.device)[:, None]
        return h[time + self.x, :, self.x].transpose(1, 2)
