"""What runs a loop: a remembering operation, a known operation over the whole sequence, or a backend.

Backends are above the compiler: whoever knows them hands them down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from .ir.graph import LoopProgram, expression
from .memory_operator import is_memory
from .patterns import recognise
from .program import Program
from .sequence_runner import SequenceRunner

if TYPE_CHECKING:
    from ..backends.contract import Choice, Runner, Widen

WIDE = 1024

_by_name: list[Callable[[str], Choice]] = []


def hand_down(by_name: Callable[[str], Choice]) -> None:
    _by_name[:] = [by_name]


def choice(backend: str) -> Choice:
    """The backends that a name stands for. UnsupportedError where there is none of that name."""
    return _by_name[0](backend)


def make_ready(program: Program, backend: str) -> None:
    """Lets backends begin what they need for a step that is about to be captured: it may multiply with its weights."""
    weights = program.root.parameters() if isinstance(program.root, nn.Module) else ()
    choice(backend).prepare({p.dtype for p in weights if p.dim() > 1})


def chooser(backend: str) -> Callable[[LoopProgram, Widen], Any]:
    """Gives what runs a loop, and says on the loop what that is."""
    asked = choice(backend)

    def choose(loop: LoopProgram, widen: Widen) -> Runner:
        known: Any = None
        if any(map(is_memory, loop.calls)):
            known = SequenceRunner(loop)
        else:
            known = recognise(loop, lambda: asked.plain(loop))
            if known is not None and known.accumulates and _is_wide(loop) and asked.takes_along(loop):
                known = None
        if known is None:
            return asked.compile(loop, widen)
        loop.backend, loop.reasons = known.backend, []
        return known

    return choose


def _is_wide(loop: LoopProgram) -> bool:
    """Whether its state has so many numbers, as outer products have, that a sequence of what is added would be huge."""
    sizes = [expression(s) for s in loop.prevs[0].meta["val"].shape[1:]]
    return all(isinstance(n, int) for n in sizes) and math.prod(sizes) >= WIDE
