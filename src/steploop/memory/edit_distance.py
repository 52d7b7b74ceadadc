"""EditDistance: the Levenshtein distance of a growing sequence to every prefix of a target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, describe, message
from ..state import State
from .base import Memory, check_step_input, cleaned, final, is_valid

_FAR = 1 << 40  # more than any distance
_NEVER = 1 << 61


class EditDistance(Memory):
    """row_t[j] = edit distance of a_0 ... a_t to target[:j], j = 0 ... U. RETURNN's EditDistanceTableLayer.

        row_{-1}[j] = j;  row_t[0] = row_{t-1}[0] + 1
        row_t[j] = min(row_{t-1}[j] + 1, row_t[j-1] + 1, row_{t-1}[j-1] + (a_t != target_{j-1}))

    Within a step the term row_t[j-1] + 1 is a running minimum: row_t[j] - j = cummin(c_j - j). For a whole
    sequence the same is done along time, one column j after the other.

    blank: a label that is no symbol: where a_t is it, the row stays as it is.

    distance(a, target=..., target_lengths=...): a (B,) integers, target (B, U) integers, target_lengths (B,)
    or None -> (B, U + 1) int64. Entries beyond a row's target length repeat that at the length, so the last
    entry is always the distance to the whole target. `table` gives all rows, the initial one first.

    Raises InputError for arguments that are not integer tensors of these shapes.
    """

    def __init__(self, blank: int | None = None) -> None:
        super().__init__()
        if blank is not None and (isinstance(blank, bool) or not hasattr(blank, "__index__")):
            raise InputError(
                message("EditDistance: blank is a label or None.", expected="an int", found=describe(blank))
            )
        self.blank = blank
        self.row = State(..., init=_first_row, dtype=torch.int64)

    def check(self, a: Tensor, *, target: Tensor, target_lengths: Tensor | None = None) -> None:
        check_step_input("EditDistance", "a", a, integer=True)
        _check_target(target, target_lengths)

    def step(self, a: Tensor, *, target: Tensor, target_lengths: Tensor | None = None) -> Tensor:
        self.check(a, target=target, target_lengths=target_lengths)
        row = self.row.sized(target.shape[1] + 1)
        j = torch.arange(row.shape[1], device=row.device)
        substituted = row[:, :-1] + (a.unsqueeze(1) != target)
        candidates = torch.cat([row[:, :1] + 1, torch.minimum(row[:, 1:] + 1, substituted)], 1)
        new = torch.cummin(candidates - j, 1).values + j
        if self.blank is not None:
            new = torch.where((a == self.blank).unsqueeze(1), row, new)
        self.row.next = new
        return _ended(new, target_lengths)

    def sequence(
        self, xs: tuple[Any, ...], constants: dict[str, Any], state: dict[str, Tensor], reset_to: dict[str, Tensor],
        lengths: Tensor | None, resets: Tensor | None,
    ) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
        a = cleaned(xs[0], lengths)
        target = constants["target"]
        counts = torch.ones_like(a, dtype=torch.bool) if self.blank is None else a != self.blank
        row, fresh = state["row"], reset_to["row"]
        # With symbols so far, and a large number per segment, taken off ("scale"), the term "row above + 1"
        # of the recurrence is a running minimum along time that never reaches back across a reset.
        scale = counts.cumsum(0)
        starts = None
        if resets is not None:
            starts = resets & is_valid(lengths, a.shape[0], a.shape[1], a.device)
            scale = scale + starts.cumsum(0) * _FAR
        columns = []
        left: Any = None
        for j in range(target.shape[1] + 1):
            best = torch.full_like(scale, _NEVER)
            if j:
                above = _above(left, row[:, j - 1], fresh[:, j - 1], starts)
                candidates = torch.minimum(left + 1, above + (a != target[None, :, j - 1]))
                best = torch.where(counts, candidates - scale, _NEVER)
            if starts is not None:
                best = torch.where(starts, torch.minimum(best, fresh[None, :, j] + counts - scale), best)
            left = torch.cummin(torch.cat([row[None, :, j], best]), 0).values[1:] + scale
            columns.append(left)
        rows = torch.stack(columns, -1)
        return _ended(rows, constants.get("target_lengths")), {"row": final(rows, row, lengths)}

    def table(
        self,
        a: Tensor,
        *,
        target: Tensor,
        target_lengths: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """(T + 1, B, U + 1): the initial row and that after every a (T, B). After a row's end it is kept."""
        rows, _ = self(a, target=target, target_lengths=target_lengths, lengths=lengths, on_masked="repeat")
        first = _first_row((target.shape[1] + 1,), torch.int64, rows.device).expand(1, *rows.shape[1:])
        first = _ended(first, target_lengths)
        started = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        if lengths is not None:
            started = started & (lengths.to(rows.device) > 0)
        return torch.cat([first, torch.where(started.unsqueeze(-1), rows, first)])


def _first_row(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(shape[0], dtype=dtype, device=device)


def _above(values: Tensor, row: Tensor, fresh: Tensor, starts: Tensor | None) -> Tensor:
    """The column (T, B) one step earlier: `row` before the first, `fresh` at a reset."""
    earlier = torch.cat([row[None], values[:-1]])
    return earlier if starts is None else torch.where(starts, fresh, earlier)


def _ended(rows: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return rows.clone()
    j = torch.arange(rows.shape[-1], device=rows.device)
    index = torch.minimum(j, lengths.to(torch.int64).unsqueeze(-1))
    return rows.gather(-1, index.expand(rows.shape))


def _check_target(target: Any, lengths: Any) -> None:
    fits = isinstance(target, Tensor) and target.dim() == 2 and not target.is_floating_point()
    if not fits:
        raise InputError(
            message(
                "EditDistance: target is the labels to compare with.",
                expected="(B, U) of integers",
                found=describe(target),
                fix="EditDistance()(a, target=labels, target_lengths=lengths)",
            )
        )
    if lengths is not None and (
        not isinstance(lengths, Tensor) or lengths.dim() != 1 or lengths.is_floating_point()
    ):
        raise InputError(
            message("EditDistance: target_lengths has one entry per row.", expected="(B,) of integers",
                    found=describe(lengths))
        )  # fmt: skip
