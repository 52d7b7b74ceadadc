"""Window: the latest frames side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import StepError, message
from ..frame import running
from ..marks import wide
from ..state import State
from .base import Frames, Memory, check_step_input, cleaned, is_valid, latest_reset, whole_number


class Window(Memory):
    """y_t = [x_{t-left}, ..., x_t, ..., x_{t+right}], oldest first, in a new axis behind the batch.

    Frames before the start, before a reset, after the end or after the next reset are zeros. RETURNN's
    WindowLayer with window_left=left and window_size=left+1+right.

    window(x): x (B, ...) -> (B, W, ...), W = left + 1 + right.  right > 0 needs frames that a step does not
    have yet: it works for a whole sequence only, `window(xs)`, and is a StepError inside a step.
    Raises InputError for sizes that are no whole numbers >= 0.
    """

    def __init__(self, left: int, right: int = 0) -> None:
        super().__init__()
        self.left = whole_number("Window", "left", left, 0)
        self.right = whole_number("Window", "right", right, 0)
        if self.left:
            self.past = State(...)

    def check(self, x: Tensor) -> None:
        check_step_input("Window", "x", x)

    def step(self, x: Tensor) -> Tensor:
        self.check(x)
        frame: Any = running()
        if self.right and frame.sizing is None:
            raise StepError(_right_in_a_step(self.left, self.right))
        if not self.left:
            return torch.cat([x.unsqueeze(1)] * (1 + self.right), 1)
        past = self.past.sized(self.left, *x.shape[1:], like=x)
        frames = torch.cat([past, x.unsqueeze(1)], 1)
        self.past.next = frames[:, 1:]
        return frames

    def sequence(
        self, xs: tuple[Any, ...], constants: dict[str, Any], state: dict[str, Tensor], reset_to: dict[str, Tensor],
        lengths: Tensor | None, resets: Tensor | None,
    ) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
        x = cleaned(xs[0], lengths)
        past = state.get("past", x.new_zeros((x.shape[1], 0, *x.shape[2:])))
        fresh = reset_to.get("past", past)
        frames = Frames(x, past, fresh, lengths, resets)
        if resets is None:
            ahead = x.new_zeros((self.right, *x.shape[1:]))
            y = torch.cat([frames.all, ahead]).unfold(0, self.left + 1 + self.right, 1).movedim(-1, 2)
        else:
            back = [frames.back(k) for k in range(self.left, -1, -1)]
            y = torch.stack([*back, *self._ahead(x, lengths, resets)], 2)
        return y, ({"past": frames.last()} if self.left else {})

    def _ahead(self, x: Tensor, lengths: Tensor | None, resets: Tensor) -> list[Tensor]:
        """x_{t+1}, ..., x_{t+right}: zeros from the next reset on."""
        latest = latest_reset(resets, lengths)[:-1]
        valid = is_valid(lengths, x.shape[0], x.shape[1], x.device)
        found = []
        for k in range(1, self.right + 1):
            k = min(k, len(x))
            same = torch.cat(
                [(latest[k:] == latest[: len(x) - k]) & valid[k:], valid.new_zeros((k, x.shape[1]))]
            )
            later = torch.cat([x[k:], x.new_zeros((k, *x.shape[1:]))])
            found.append(torch.where(wide(same, later), later, torch.zeros_like(later)))
        return found

    def extra_repr(self) -> str:
        return f"left={self.left}, right={self.right}"


def _right_in_a_step(left: int, right: int) -> str:
    return message(
        "Window with right > 0 was called inside a step, which does not have later frames.",
        expected="right=0 inside a step",
        found=f"right={right}",
        fix=f"windows = sl.memory.Window({left}, right={right})(xs)[0] before the loop, as a sequence of it",
    )
