"""CumSum, CumProd, CumMax, CumLogSumExp: running reductions over the steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..marks import wide
from ..state import State
from .base import Memory, check_step_input, cleaned, final, is_valid


class Cumulative(Memory):
    """s_t = combine(s_{t-1}, x_t), s_{-1} = init; returns s_t, or with `exclusive` s_{t-1}.

    combine is associative. Whole sequence: one cumulative operation of torch; where there are resets, log2(T)
    rounds that each combine spans of twice the length, so that nothing crosses a reset.
    """

    neutral: float = 0.0

    def __init__(self, init: float | Tensor | None = None, exclusive: bool = False) -> None:
        super().__init__()
        self.exclusive = bool(exclusive)
        self.total = State(..., init=_Neutral(self.neutral) if init is None else init)

    def combine(self, older: Tensor, newer: Tensor) -> Tensor:
        """One step."""
        raise NotImplementedError

    def along(self, x: Tensor) -> Tensor:
        """All steps of x (T, B, ...) from nothing."""
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        check_step_input(type(self).__name__, "x", x)

    def step(self, x: Tensor) -> Tensor:
        self.check(x)
        x = _counted(x)
        before = self.total.sized(*x.shape[1:], like=x)
        after = self.combine(before, x)
        self.total.next = after
        return before.clone() if self.exclusive else after

    def sequence(
        self, xs: tuple[Any, ...], constants: dict[str, Any], state: dict[str, Tensor], reset_to: dict[str, Tensor],
        lengths: Tensor | None, resets: Tensor | None,
    ) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
        x = _counted(xs[0])
        x = cleaned(x, lengths, _neutral_of(self.neutral, x.dtype))
        start = state["total"]
        if resets is None:
            every = self.along(torch.cat([start.unsqueeze(0), x]))
            inclusive, before = every[1:], every[:-1]
        else:
            resets = resets & is_valid(lengths, x.shape[0], x.shape[1], x.device)
            inclusive = self._between_resets(x, start, reset_to["total"], resets)
            before = torch.cat([start.unsqueeze(0), inclusive[:-1]])
            before = torch.where(wide(resets, x), reset_to["total"], before)
        return before if self.exclusive else inclusive, {"total": final(inclusive, start, lengths)}

    def _between_resets(self, x: Tensor, start: Tensor, fresh: Tensor, resets: Tensor) -> Tensor:
        nothing = torch.full_like(x[:1], _neutral_of(self.neutral, x.dtype))
        first = torch.cat([torch.ones_like(resets[:1]), torch.zeros_like(resets[1:])])
        begins = torch.where(wide(resets, x), fresh, torch.where(wide(first, x), start, nothing))
        y = self.combine(begins, x)
        closed = resets | first  # nothing before this step belongs to it
        span = 1
        while span < len(x):
            older = torch.cat([nothing.expand(span, *x.shape[1:]), y[:-span]])
            y = self.combine(torch.where(wide(closed, x), nothing, older), y)
            closed = torch.cat([closed[:span], closed[span:] | closed[:-span]])
            span *= 2
        return y

    def extra_repr(self) -> str:
        return "exclusive=True" if self.exclusive else ""


class CumSum(Cumulative):
    """s_t = s_{t-1} + x_t. RETURNN's CumsumLayer; `init` is part of the sum.

    init: a number, or a tensor that broadcasts to one row's x.  exclusive: return s_{t-1}.
    cumsum(x): x (B, ...) -> (B, ...) of its dtype; bool is counted in int64.
    """

    def __init__(self, init: float | Tensor | None = 0, exclusive: bool = False) -> None:
        super().__init__(init, exclusive)

    def combine(self, older: Tensor, newer: Tensor) -> Tensor:
        return older + newer

    def along(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 0, dtype=x.dtype)


class CumProd(Cumulative):
    """s_t = s_{t-1} x_t, s_{-1} = init = 1. x (B, ...) in, s (B, ...) out. Arguments as for CumSum."""

    neutral = 1.0

    def combine(self, older: Tensor, newer: Tensor) -> Tensor:
        return older * newer

    def along(self, x: Tensor) -> Tensor:
        return torch.cumprod(x, 0, dtype=x.dtype)


class CumMax(Cumulative):
    """s_t = max(s_{t-1}, x_t), s_{-1} = init = -inf (the least number of an integer dtype). NaN stays.
    x (B, ...) in, s (B, ...) out.

    Of equal values the latest gets the gradient, in both forms. Arguments as for CumSum.
    """

    neutral = -math.inf

    def combine(self, older: Tensor, newer: Tensor) -> Tensor:
        take = newer >= older
        if newer.is_floating_point():
            take = take | (newer != newer)
        return torch.where(take, newer, older)

    def along(self, x: Tensor) -> Tensor:
        return torch.cummax(x, 0).values


class CumLogSumExp(Cumulative):
    """s_t = log(exp s_{t-1} + exp x_t), s_{-1} = init = -inf. x (B, ...) in, s (B, ...) out, floating.
    Arguments as for CumSum."""

    neutral = -math.inf

    def combine(self, older: Tensor, newer: Tensor) -> Tensor:
        return torch.logaddexp(older, newer)

    def along(self, x: Tensor) -> Tensor:
        return torch.logcumsumexp(x, 0)


class _Neutral:
    """An `init`: the value that changes nothing, in whatever dtype x has."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, _neutral_of(self.value, dtype), dtype=dtype, device=device)


def _neutral_of(value: float, dtype: torch.dtype) -> float:
    return torch.iinfo(dtype).min if value == -math.inf and not dtype.is_floating_point else value


def _counted(x: Tensor) -> Tensor:
    return x.to(torch.int64) if x.dtype == torch.bool else x
