"""Operations of one's own, for the compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def register_operation(
    operation: Any, *, rows: str, linear: Sequence[Sequence[int]] = (), written_as: Callable[..., Any] | None = None
) -> None:
    """Tells the compiler what an operation of `torch.library` does, so that it can leave loops.

    Without it a custom operation is taken to mix the rows of the batch: a step that calls it is right, and all of the
    step that varies runs in one loop. Register it before the first call of a loop that uses it.

    operation: `torch.ops.mylib.clip`, or what `@torch.library.custom_op` gave. It needs `register_fake`, as for
        torch.compile, and its backward is an operation of its own, to be registered too.
    rows: "pointwise": every number of the result depends on one number of each input alone; inputs are broadcast.
        "front": axis 0 of every input that has a batch axis is the batch, and so it is of every result; no row of
        a result depends on another row of an input.
    linear: groups of positions of arguments in which the operation is additive together, while its others stay as they
        are: [(0,)] for op(a + b, c) = op(a, c) + op(b, c). Gradients of weights that pass through such an operation
        are summed before it, over all steps at once.
    written_as: a function of the same arguments that does the same with torch's operations. Native loops run that;
        without it a loop that holds the operation runs on the backend "eager".

    What is said here is believed. `sl.verify(step, ...)` compares the compiled step with the plain loop.

    Raises InputError for an operation of torch's own, or for arguments that are none of these.
    """
    from .compiler.ops.register import register

    register(operation, rows, linear, written_as)


__all__ = ["register_operation"]
