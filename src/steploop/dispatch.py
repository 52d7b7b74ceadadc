"""From a Program and a Call to the backend that runs them; and what no compiled backend can be run under."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import kinds, until
from .backends import BACKENDS, choose, reference  # noqa: F401 (choose hands the backends down)
from .compiler.program import Call, Program, Result
from .errors import (
    DivisionError,
    InputError,
    SingularError,
    StepError,
    UnsupportedError,
    describe,
    message,
    raised_at,
    singular,
)

SAVE = ("auto", "states", "all")


def run(program: Program, call: Call, backend: str, save: str = "auto") -> Result:
    """Run one call. UnsupportedError under functorch transforms and forward-mode AD, but for "reference"."""
    if backend == "reference":
        return reference.run(program, call)
    try:
        return _run_compiled(program, call, backend, save)
    except SingularError as error:
        return _as_the_plain_loop(error, program, call)
    except (IndexError, DivisionError) as error:
        if call.until is None:
            raise
        return _as_the_plain_loop(error, program, call)


def _run_compiled(program: Program, call: Call, backend: str, save: str) -> Result:
    _no_transforms()
    kinds.check(program, call)
    if call.until is not None:
        stops = lambda program, piece: _stops(program, piece, backend, save)
        wants = lambda program, piece: wants_gradients(program, piece, backend)
        run_piece = lambda program, piece: _run_compiled(program, piece, backend, save)
        return until.run(program, call, run_piece, wants, stops)
    whole = getattr(program.root, "run_whole", None) if program.stands_alone else None
    if whole is not None:
        _no_tangents((*call.xs, *call.constants, *call.initial, *program.root.parameters()))
        if (result := whole(program, call)) is not None:
            return result  # a remembering operation on its own: its whole-sequence form, no loop at all
    from .compiler import traced_calls  # half a second of torch's tracing machinery: only when it is needed

    try:
        return traced_calls.run(program, call, backend, save)
    except SingularError:
        raise
    except (RuntimeError, ValueError, StepError):
        if not kinds.run_lazy(program, call):
            raise
    return traced_calls.run(program, call, backend, save)


def _as_the_plain_loop(error: SingularError | IndexError | DivisionError, program: Program, call: Call) -> Result:
    """What the plain loop gives, where a compiled one met a matrix without a solution, or an index outside its axis.

    As a rule that is an error too; one of a matrix now names the step and the row. But a compiled loop may run steps of
    rows that have ended, or that a mask leaves out, and throw away what they give: then the plain loop has a result.
    """
    plain = reference.Run(program, call)
    try:
        return plain.all_steps()
    except (RuntimeError, IndexError) as raised:  # for a matrix a LinAlgError, but for lu_factor
        if not isinstance(error, SingularError):
            raise error from None
        row = plain.failing_row()
        where = f"step {plain.t}" if row is None else f"step {plain.t}, row {row}"
        raise singular(error.operation, f"{where}: {raised}", raised_at(raised)) from None


def wants_gradients(program: Program, call: Call, backend: str) -> tuple[bool, bool]:
    """(whether a call is to be differentiated, and whether its step draws random numbers)."""
    from .compiler import pipeline

    return pipeline.wants_gradients(program, call, backend) if torch.is_grad_enabled() else (False, False)


def _stops(program: Program, call: Call, backend: str, save: str) -> bool:
    """Whether the loop of a program whose rows end by themselves looks itself whether any row is left. Asked once: the
    same call is cut into the same pieces each time, and draws the same random numbers."""
    known = program.kept.stops
    if backend not in known:
        from .compiler import pipeline

        try:
            known[backend] = pipeline.stops(program, call, backend, save)
        except Exception:  # running it has the better message, or works
            return False
    return known[backend]


def plan(program: Program, call: Call, backend: str, save: str = "auto") -> Any:
    """The Plan by which `run` would run this call; of a loop that ends by itself, the whole call as one piece."""
    from .compiler import planning

    if call.until is not None:
        program, call = until.whole(program, call)
    return planning.plan(program, call, backend=backend, save=save)


def profile(program: Program, call: Call, backend: str, save: str = "auto") -> Any:
    """The Plan of a call with what its pieces take; of a loop that ends by itself, all steps of it."""
    from .compiler import planning

    _no_transforms()
    if call.until is not None:
        program, call = until.whole(program, call)
    return planning.profile(program, call, backend=backend, save=save)


def stream_step(program: Program, call: Call, backend: str) -> Any:
    """What runs single steps like this call without gradients, with little around it; None where nothing does."""
    if backend == "reference":
        return None
    from .compiler import stream_step as steps

    return steps.prepare(program, call, backend)


def is_recorded() -> bool:
    """Whether a tracer other than this library's own records what runs."""
    if not torch._C._len_torch_dispatch_stack() and not torch.compiler.is_exporting():
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    from .compiler import trace_step

    return not trace_step.is_tracing() and (get_proxy_mode() is not None or torch.compiler.is_exporting())


def checked_backend(backend: str) -> str:
    """InputError unless `backend` is in BACKENDS."""
    if backend not in BACKENDS:
        raise InputError(
            message(
                "There is no such backend.",
                expected=", ".join(repr(name) for name in BACKENDS),
                found=describe(backend),
                fix='backend="auto"',
            )
        )
    return backend


def checked_save(save: str) -> str:
    """InputError unless `save` is a known choice of what the forward keeps."""
    if save not in SAVE:
        raise InputError(
            message(
                "`save` says what the forward keeps for the backward.",
                expected=", ".join(repr(name) for name in SAVE),
                found=describe(save),
                fix='save="auto"',
            )
        )
    return save


def _no_transforms() -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedError(
            message(
                "A loop was called under a torch.func transform (vmap, grad, jvp, ...).",
                expected="plain calls and torch.autograd, which loops support",
                fix='backend="reference" runs under any transform; for gradients use torch.autograd.grad',
            )
        )


def _no_tangents(tensors: Iterable[Tensor]) -> None:
    if forward_ad._current_level >= 0:
        from .compiler.forward_mode import refuse_tangents

        refuse_tangents(("what a remembering operation reads", t) for t in tensors)
