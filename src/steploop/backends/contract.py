"""What the compiler asks of a backend, and of a loop that a backend has made ready to run.

A backend is registered with `choose.register`; nothing else in the library names it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..compiler.ir.graph import LoopProgram
    from ..compiler.span import Span
    from ..errors import BuildError

Reasons = list[tuple[str, str]]  # why a backend can't take a loop: (reason, source line or "")
Widen = Callable[..., "LoopProgram | None"]  # widen(products=, operations=): the loop with what it can take along


class Runner(Protocol):
    """A loop, ready to run."""

    reads_in_place: bool = False  # takes sequences as the caller has them (`schedule.Unpacked`)
    writes_into: bool = False  # takes memory for the values that it keeps, as a last argument `into`
    stops: bool = False  # does next to nothing once all rows have ended (`LoopProgram.ends`)
    product: Callable[..., Tensor | None] | None = None  # for long products outside of loops
    text: str = ""  # the source of the kernel that it calls
    launched: str = ""  # how it is launched, where there are several ways
    building: bool = False  # whether what it calls is still being built
    otherwise: Callable[[BuildError], None] | None = None  # told where that fails: it then runs on in another way

    def settle(self) -> None:
        """Waits for what is being built. BuildError where that fails and there is no `otherwise`."""
        return None

    def __call__(
        self, inputs: Sequence[Any], states: Sequence[Tensor], reset_to: Sequence[Tensor] | None, span: Span,
        down: bool, sizes: dict[str, int],
    ) -> tuple[list[Tensor], list[Any]]:  # fmt: skip
        """Runs the steps of a span, from the last to the first if `down`.

        inputs: as `LoopInput` says, for the rows of the span.  states: (B, ...) each, before the span.
        reset_to: what a reset puts each state back to, (B, ...) each; None where nothing is reset.
        sizes: the values of symbols, by name.
        Returns the states after the span and the kept values of all its steps.
        """
        ...

    def show(self) -> str:
        """What runs, as text; "" where there is none."""
        return ""


class Backend(Protocol):
    """One way to run loops. name: what `backend=` says.  words: what it is, for messages."""

    name: ClassVar[str]
    words: ClassVar[str]

    def reasons_against(self, loop: LoopProgram) -> Reasons:
        """Why it can't take a loop. Empty: it takes it."""
        ...

    def compile(self, loop: LoopProgram) -> Runner:
        """The loop, ready to run, or as soon as it is built. BuildError where that fails: then the next backend has its
        turn."""
        ...

    def wider(self, loop: LoopProgram, widen: Widen) -> LoopProgram:
        """The loop together with work outside of it that it does better itself."""
        return loop

    def prepare(self, dtypes: set[torch.dtype]) -> None:
        """Begins what takes its time and does not depend on the loop, while a step is captured. dtypes: those that it
        multiplies weights of."""
        return None

    def stepper(self, runner: Runner, *arguments: Any) -> Any:
        """A loop prepared to run single steps (a stream's); see `cpu.stepper.Stepper`. None where there is none."""
        return None

    steps: ClassVar[bool] = False  # whether it has a stepper
    takes_along: ClassVar[bool] = False  # whether it has a `wider`


class Choice(Protocol):
    """The backend that was asked for, or those that "auto" tries."""

    def prepare(self, dtypes: set[torch.dtype]) -> None:
        """See `Backend.prepare`."""
        ...

    def compile(self, loop: LoopProgram, widen: Widen) -> Runner:
        """The loop on the first backend that takes it; says on the loop which one, and why not a faster one."""
        ...

    def plain(self, loop: LoopProgram) -> Runner:
        """The same without anything that the loop could take along."""
        ...

    def takes_along(self, loop: LoopProgram) -> bool:
        """Whether a loop's backend can take in work that stands around it."""
        ...

    def stepping(self) -> Backend | None:
        """The first backend that can run single steps."""
        ...
