"""CausalConv1d: a convolution over the steps that sees no later step."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError, message
from ..state import State
from .base import Frames, Memory, check_step_input, cleaned, whole_number


class CausalConv1d(Memory):
    """y_t = bias + sum_k weight[:, :, k] x_{t - (W-1-k) dilation}, zeros before the start.

    nn.Conv1d over the steps, padded on the left: same parameters ("weight" (out, in / groups, W), "bias"),
    same initial values. The state keeps (W-1) dilation frames. RETURNN: ConvLayer inside a WindowLayer.

    conv(x): x (B, in) -> (B, out).  Whole sequence: one conv1d; with resets, one product over the windows.
    Raises InputError for sizes that are no whole numbers >= 1 or channels that `groups` does not divide.
    """

    in_channels: int
    out_channels: int
    kernel_size: int
    dilation: int
    groups: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("kernel_size", kernel_size),
            ("dilation", dilation),
            ("groups", groups),
        ):
            setattr(self, name, whole_number("CausalConv1d", name, value, 1))
        if in_channels % groups or out_channels % groups:
            raise InputError(
                message(
                    "CausalConv1d: groups divides both numbers of channels.",
                    expected=f"divisors of {in_channels} and {out_channels}",
                    found=f"groups={groups}",
                )
            )
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if bias:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(cast(Tensor, self.bias), -bound, bound)
        if kernel_size > 1:
            self.past = State((kernel_size - 1) * dilation, in_channels)

    def check(self, x: Tensor) -> None:
        check_step_input("CausalConv1d", "x", x, features=self.in_channels)

    def step(self, x: Tensor) -> Tensor:
        self.check(x)
        if self.kernel_size == 1:
            return self._of_windows(x.unsqueeze(1))
        frames = torch.cat([self.past.prev, x.unsqueeze(1)], 1)
        self.past.next = frames[:, 1:]
        return self._of_windows(frames[:, :: self.dilation])

    def _of_windows(self, frames: Tensor) -> Tensor:
        """frames (..., W, in) -> (..., out)."""
        if self.groups == 1:
            flat = frames.flatten(-2)
            return F.linear(flat, self.weight.transpose(1, 2).flatten(1), self.bias)
        parts = frames.unflatten(-1, (self.groups, -1))
        weight = self.weight.unflatten(0, (self.groups, -1))
        y = torch.einsum("...wgi,goiw->...go", parts, weight).flatten(-2)
        return y if self.bias is None else y + self.bias

    def sequence(
        self, xs: tuple[Any, ...], constants: dict[str, Any], state: dict[str, Tensor], reset_to: dict[str, Tensor],
        lengths: Tensor | None, resets: Tensor | None,
    ) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
        x = cleaned(xs[0], lengths)
        none = x.new_zeros(x.shape[1], 0, self.in_channels)
        frames = Frames(x, state.get("past", none), reset_to.get("past", none), lengths, resets)
        if resets is None:
            y = F.conv1d(
                frames.all.permute(1, 2, 0),
                self.weight,
                self.bias,
                dilation=self.dilation,
                groups=self.groups,
            ).permute(2, 0, 1)
        else:
            offsets = range(frames.n, -1, -self.dilation)
            y = self._of_windows(torch.stack([frames.back(k) for k in offsets], 2))
        return y, ({"past": frames.last()} if frames.n else {})

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, "
            f"dilation={self.dilation}, groups={self.groups}"
        )
