"""Operations of one's own, for the compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import InputError, describe, message


def register_operation(
    operation: Any, *, rows: str, linear: Sequence[Sequence[int]] = (), native: Mapping[str, Callable] | None = None
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
    native: {"cpu": function}, how native loops compute it; see docs/extending.md. Without it a loop that holds the
        operation runs on the backend "eager".

    What is said here is believed. `sl.verify(step, ...)` compares the compiled step with the plain loop.

    Raises InputError for an operation of torch's own, or for arguments that are none of these.
    """
    from .compiler.ops.register import register

    name = register(operation, rows, linear)
    for backend, lowering in (native or {}).items():
        if backend != "cpu":
            raise InputError(
                message(
                    f"There is no backend {describe(backend)} that takes lowerings.",
                    expected='"cpu"',
                    found=describe(backend),
                    fix='native={"cpu": lowering}',
                )
            )
        from .backends.cpu.lowering import lowers

        lowers(name)(lowering)


__all__ = ["register_operation"]
