"""The step that is running: where the values of States live while it does.

A module holds no values. Each thread has a stack of Frames; the innermost one is the step that runs now.
A loop pushes one Frame per step (and one for `begin`), so one module can serve many streams, threads and
nested loops at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class Frame:
    """One running step, or the run of `begin` before the first.

    names: the path of every State of the loop.  prev, next: values by State.  batch: B.
    called: the Steps that have been called in this step.  phase: "begin" or "step".
    sizing: set while a first step is run only to learn the shapes of States.
    inlined: operations that remember run in their step form: their States do not just go on to the next step.
    batched: by name of the loop's constants, a tree of bools: whether each tensor has B first.
    """

    __slots__ = ("names", "prev", "next", "batch", "called", "phase", "sizing", "inlined", "batched")

    def __init__(
        self, names: dict[Any, str], prev: dict[Any, Tensor | None], phase: str, batch: Any = None
    ) -> None:
        self.names = names
        self.prev = prev
        self.next: dict[Any, Tensor] = {}
        self.batch = batch
        self.called: dict[int, str] = {}
        self.phase = phase
        self.sizing: Any = None
        self.inlined = False
        self.batched: dict[str, Any] = {}

    def nexts(self, states: Sequence[Any]) -> list[Any]:
        """The states after the step: what was written, else what was there before."""
        return [self.next[s] if s in self.next else self.prev[s] for s in states]


class _Stack(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame | None] = []


_stack = _Stack()


def running() -> Frame | None:
    """The innermost running Frame of this thread."""
    frames = _stack.frames
    return frames[-1] if frames else None


@contextmanager
def run_in(frame: Frame | None) -> Iterator[None]:
    """Make `frame` the running one.

    None hides the frames outside: inside a scan's function no Step's loop runs.
    """
    _stack.frames.append(frame)
    try:
        yield
    finally:
        _stack.frames.pop()
