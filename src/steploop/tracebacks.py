"""Tracebacks with the user's own lines alone: those of the call, and those of the step that it ran."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar, cast

import torch

from .errors import SteploopError, is_the_users
from .frame import running

SETTING = "STEPLOOP_TRACEBACK"  # "full": nothing is cut
_Function = TypeVar("_Function", bound=Callable[..., Any])


def ends_at_the_call(function: _Function) -> _Function:
    """For what a user calls: what it raises tells of the user's lines, and of nothing in between."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except Exception as error:
            shown = error if running() is not None else without_internals(error)
            raise shown  # noqa: B904  STEPLOOP_TRACEBACK=full shows what is in between

    return cast(_Function, call)


def without_internals(error: Exception) -> Exception:
    """The same error with a traceback of the user's own lines.

    One that is not of this library and was raised in a file of ours, or of torch's, stays whole: it may be a bug there.
    """
    if os.environ.get(SETTING) == "full":
        return error
    own, last, step = [], None, error.__traceback__
    while step is not None:
        last = step
        if is_the_users(step.tb_frame.f_code.co_filename):
            own.append(step)
        step = step.tb_next
    if not isinstance(error, SteploopError) and last not in own:
        return error
    chain = None
    for step in reversed(own):
        chain = TracebackType(chain, step.tb_frame, step.tb_lasti, step.tb_lineno)
    if isinstance(error, SteploopError):  # its message says what the error that it was made of says
        error.__cause__, error.__suppress_context__ = None, True
    return error.with_traceback(chain)
