"""History: every frame so far. RelativePositions: how far back each of them is."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..marks import wide
from ..state import State
from .base import Memory, check_step_input, cleaned, latest_reset, rows_at, whole_number
from .step_index import counting


class Past(NamedTuple):
    """What History gives: values (B, C, ...), of which the first lengths (B,) of a row are in use.

    C is the room that the history has: T for a whole sequence from its start; doubling in a stream. Entries
    not in use are zeros.
    """

    values: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        """(..., B, C) bool: True where an entry is in use."""
        slots = torch.arange(self.values.shape[self.lengths.dim()], device=self.lengths.device)
        return slots < self.lengths.unsqueeze(-1)


pytree._register_namedtuple(Past, serialized_type_name="steploop.memory.Past")  # so that a program can be saved


class History(Memory):
    """y_t = (x_0, ..., x_t): all frames since the start or the latest reset. RETURNN's CumConcatLayer.

    history(x): x (B, ...) -> Past(values (B, C, ...), lengths (B,)), see there. A whole sequence gives
    (T, B, C, ...), unless the step only multiplies and sums the values: scores of a query with every frame
    and weighted sums of frames, written as matrix products, einsum, or a product and its sum, outside of
    loops. Then the products are taken with (B, C, ...) and what a step must not see is taken out of the result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = State(init=0, dtype=torch.int64)
        self.frames = State(..., grows_with=self.count)

    def check(self, x: Tensor) -> None:
        check_step_input("History", "x", x)

    def step(self, x: Tensor) -> Past:
        self.check(x)
        frames = self.frames.sized(*x.shape[1:], like=x)
        values = appended(frames, x, self.count.prev)
        self.frames.next = values
        self.count.next = self.count.prev + 1
        return Past(values, self.count.next)

    def sequence(
        self, xs: tuple[Any, ...], constants: dict[str, Any], state: dict[str, Tensor], reset_to: dict[str, Tensor],
        lengths: Tensor | None, resets: Tensor | None,
    ) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
        x = cleaned(xs[0], lengths)
        index, after = counting(state["count"], reset_to["count"], len(x), lengths, resets)
        slots = Slots(state["count"], state["frames"].shape[1], len(x), lengths, resets)
        everything = slots.join(state["frames"], x, reset_to["frames"])
        values = slots.at_steps(everything)
        values = torch.where(
            wide(_in_use(values.shape[2], index + 1), values), values, torch.zeros_like(values)
        )
        return Past(values, index + 1), {"count": after, "frames": slots.at_end(everything)}

    def frames_of_all_steps(
        self,
        xs: tuple[Any, ...],
        state: dict[str, Tensor],
        reset_to: dict[str, Tensor],
        lengths: Tensor | None,
        resets: Tensor | None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
        """The whole sequence for products alone, which need no (T, B, C, ...).

        Arguments and states as for `sequence`. Gives (B, C, ...), every frame in the slot it would have without
        resets; (T, B) slots in use after each step; (T, B) frames written until then, resets or not. After a
        reset slot 0 is that of the first frame since.
        """
        x, frames = cleaned(xs[0], lengths), state["frames"]
        index, after = counting(state["count"], reset_to["count"], len(x), lengths, resets)
        plain = Slots(state["count"], frames.shape[1], len(x), lengths, None)
        everything = plain.at_end(plain.join(frames, x, frames))
        final = everything
        if resets is not None:
            slots = Slots(state["count"], frames.shape[1], len(x), lengths, resets)
            final = slots.at_end(slots.join(frames, x, reset_to["frames"]))
        ends = state["count"] + torch.arange(1, len(x) + 1, device=x.device)[:, None]
        return (everything, index + 1, ends), {"count": after, "frames": final}


class RelativePositions(Memory):
    """p_t[k] = clip(k - t, -clip, clip) + clip for every entry k of a history. Shaw et al. 2018,
    arXiv:1803.02155.

    RETURNN's RelativePositionalEncodingLayer. relative(): (B, C) int64, C the room of a `History` beside it:
    T for a whole sequence. t counts the row's valid steps since the start or the latest reset.
    size: gives (B, C, size) instead, rows of the learned table "embedding" (2 clip + 1, size).
    """

    takes_steps = True

    def __init__(self, clip: int, size: int | None = None) -> None:
        super().__init__()
        self.clip = whole_number("RelativePositions", "clip", clip, 0)
        self.embedding = None
        if size is not None:
            self.embedding = nn.Embedding(2 * clip + 1, whole_number("RelativePositions", "size", size, 1))
        self.count = State(init=0, dtype=torch.int64)
        self.entries = State(..., dtype=torch.bool, grows_with=self.count)

    def step(self, *like: Tensor) -> Tensor:
        entries = self.entries.sized(dtype=torch.bool)
        count = self.count.prev
        self.count.next = count + 1
        return self._positions(entries.shape[1], count)

    def sequence(
        self, xs: tuple[Any, ...], constants: dict[str, Any], state: dict[str, Tensor], reset_to: dict[str, Tensor],
        lengths: Tensor | None, resets: Tensor | None, steps: int | None = None,
    ) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
        steps = xs[0].shape[0] if xs else steps
        index, after = counting(state["count"], reset_to["count"], cast(int, steps), lengths, resets)
        positions = self._positions(state["entries"].shape[1], index)
        return positions, {"count": after, "entries": state["entries"]}

    def _positions(self, room: int, count: Tensor) -> Tensor:
        distance = torch.arange(room, device=count.device) - count.unsqueeze(-1)
        positions = distance.clamp(-self.clip, self.clip) + self.clip
        return positions if self.embedding is None else self.embedding(positions)


def appended(frames: Tensor, x: Tensor, count: Tensor) -> Tensor:
    """frames (B, C, ...) with x (B, ...) written into every row's slot number `count` (B,)."""
    here = torch.arange(frames.shape[1], device=frames.device) == count.unsqueeze(1)
    return torch.where(wide(here, frames), x.unsqueeze(1), frames)


def _in_use(room: int, lengths: Tensor) -> Tensor:
    return torch.arange(room, device=lengths.device) < lengths.unsqueeze(-1)


class Slots:
    """Which frame stands in which slot of a history (B, C, ...), after any step of a whole sequence.

    Frames are numbered in `join`: first the C slots as they were, then the T new ones, then what a reset
    puts.
    """

    def __init__(
        self, count: Tensor, room: int, steps: int, lengths: Tensor | None, resets: Tensor | None
    ) -> None:
        self.count, self.room, self.steps, self.lengths = count, room, steps, lengths
        self.latest = None if resets is None else latest_reset(resets, lengths)

    def join(self, frames: Tensor, x: Tensor, fresh: Tensor) -> Tensor:
        """(N, B, ...), every frame that a slot may hold."""
        parts = [frames.transpose(0, 1), x]
        return torch.cat(parts if self.latest is None else [*parts, fresh.transpose(0, 1)])

    def at_steps(self, everything: Tensor) -> Tensor:
        """(T, B, C, ...): the slots after each step. A slot that is not in use may hold anything."""
        time = torch.arange(self.steps, device=self.count.device).reshape(-1, 1, 1)
        latest = None if self.latest is None else self.latest[:-1, None]
        return rows_at(everything, self._index(time + 1, latest, self.steps)).transpose(1, 2)

    def at_end(self, everything: Tensor) -> Tensor:
        """(B, C, ...): the slots after each row's last valid step."""
        end = self.lengths if self.lengths is not None else torch.full_like(self.count, self.steps)
        latest = None if self.latest is None else self.latest[-1][None, None]
        return rows_at(everything, self._index(end[None, None], latest, 1)[0]).transpose(0, 1)

    def _index(self, done: Tensor, latest: Tensor | None, steps: int) -> Tensor:
        """(steps, C, B): the number of the frame in each slot after `done` steps."""
        slot = torch.arange(self.room, device=self.count.device)[None, :, None]
        new = slot - self.count
        index = torch.where((new >= 0) & (new < done), self.room + new, slot)
        if latest is not None:
            since = torch.where(
                slot < done - latest, self.room + latest + slot, self.room + self.steps + slot
            )
            index = torch.where(latest >= 0, since, index)
        return index.expand(steps, self.room, len(self.count))
