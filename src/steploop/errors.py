"""Every error this library raises on purpose, and how its message is put together.

    SteploopError(Exception)
    ├── StepError(TypeError)                  a step written or called wrongly
    ├── StateError(ValueError)                a State read, written or given wrongly
    ├── CarryError(TypeError)                 a scan's carry that changes type
    ├── InputError(ValueError)                xs, lengths, mask, resets, constants
    ├── UnsupportedError(NotImplementedError) right, but not by this backend or under this transform
    ├── MismatchError(AssertionError)         verify found a difference
    ├── DataError(ValueError)                 recipes: a data file; an exported loop
    ├── BuildError(RuntimeError)              the native compiler failed
    ├── DivisionError(ZeroDivisionError, RuntimeError)  a division of whole numbers by zero
    └── OutsideError(IndexError, RuntimeError)  an index outside its axis, found while a loop runs

A message says what was expected, what was found, the user's own file and line, and what to type next.
"""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType
from typing import Any

import torch


class SteploopError(Exception):
    """The base of every error below."""


class StepError(SteploopError, TypeError):
    """A step is written or called in a way that has no meaning as one step of a sequence."""


class StateError(SteploopError, ValueError):
    """A State is read, written or given in a way that does not fit."""


class CarryError(SteploopError, TypeError):
    """The carry that a scan's function returns is not of the type of the carry it took."""


class InputError(SteploopError, ValueError):
    """Sequences, lengths, masks, resets or constants that do not fit together."""


class UnsupportedError(SteploopError, NotImplementedError):
    """Meaningful, but not supported: by the backend asked for, or under the transform that is active."""


class MismatchError(SteploopError, AssertionError):
    """Two ways of computing the same thing disagree."""


class DataError(SteploopError, ValueError):
    """A data file does not say what its reader expects."""


class BuildError(SteploopError, RuntimeError):
    """The native compiler failed."""


class OutsideError(SteploopError, IndexError, RuntimeError):
    """An index outside its axis. torch raises one of IndexError and RuntimeError, by operation; this is both."""


class DivisionError(SteploopError, ZeroDivisionError, RuntimeError):
    """A division of whole numbers by zero, found while a loop runs; torch raises RuntimeError."""


class SingularError(SteploopError, torch.linalg.LinAlgError):  # type: ignore[misc, name-defined]
    """A matrix for which a function of torch.linalg has no result; torch raises LinAlgError.

    operation: that function, "linalg.solve".
    """

    operation = ""


NO_SECOND_DERIVATIVE = (
    "second derivatives of a Loop are not supported: its backward pass is compiled and can't be "
    'differentiated again. Use sl.Loop(step, backend="reference") where create_graph=True is needed.'
)


def message(
    what: str,
    *,
    expected: Any = None,
    found: Any = None,
    at: str | None = None,
    fix: str | None = None,
) -> str:
    """One message of the common form. `at` defaults to the user's line that is running now."""
    lines = [what]
    if expected is not None:
        lines.append(f"  expected: {expected}")
    if found is not None:
        lines.append(f"  found:    {found}")
    at = user_line() if at is None else at
    if at:
        lines.append(f"  at:       {at}")
    if fix is not None:
        lines.append(f"  fix:      {fix}")
    return "\n".join(lines)


_SINGULAR_FIX = (
    "add a small multiple of the identity to the matrix, or use torch.linalg.{name}_ex, which gives what comes out and "
    "does not look at it"
)


def singular(operation: str, found: str = "another, in a row that runs", at: str = "") -> SingularError:
    """The error of an operation, "linalg.solve"."""
    positive = operation == "linalg.cholesky"
    made = SingularError(
        message(
            f"torch.{operation} can't be done: a matrix is {'not positive definite' if positive else 'singular'}.",
            expected="positive definite matrices" if positive else "invertible matrices",
            found=found,
            at=at,
            fix=_SINGULAR_FIX.format(name=operation.removeprefix("linalg.")),
        )
    )
    made.operation = operation
    return made


_NOT_THE_USERS = (
    os.path.dirname(os.path.abspath(__file__)) + os.sep,
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
    os.path.dirname(os.path.abspath(os.__file__)) + os.sep + "contextlib.py",
    os.path.dirname(os.path.abspath(os.__file__)) + os.sep + "functools.py",
    "<frozen",
    "<string>",
)


_COMMAND_LINE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cli") + os.sep


def user_line() -> str:
    """'file.py:14' of the innermost running frame that is neither steploop's nor torch's, or ''."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_COMMAND_LINE):  # what called the command line's program is no line of the user's
            return ""
        if is_the_users(name):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def warn(text: str) -> None:
    """A warning that names the user's line, however deep inside steploop it is noticed."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and not is_the_users(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level if frame is not None else 2)


def raised_at(error: BaseException) -> str:
    """'file.py:14' of the innermost line of the user that an error went through, or ''."""
    found, step = "", error.__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        if not name.startswith(_NOT_THE_USERS):
            found = f"{name}:{step.tb_lineno}"
        step = step.tb_next
    return found


def defined_at(function: Any) -> str:
    """'file.py:14' where a Python function begins ('' for what has no Python source)."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""


def is_the_users(filename: str) -> bool:
    """Whether a frame of this file is one of the user's, not of this library, of torch, or of what they make."""
    return not filename.startswith((*_NOT_THE_USERS, "<steploop", "<eval_with_key>"))


def describe(value: Any) -> str:
    """A value's type as messages name it: '(4, 8) float32', 'float 0.5', 'None'."""
    if isinstance(value, torch.Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{describe_type(value.shape, value.dtype)}{where}"
    if value is None:
        return "None"
    if isinstance(value, (bool, int, float, complex, str)):
        return f"{type(value).__name__} {value!r}"
    return f"a {type(value).__name__}"


def without_memory(tensor: torch.Tensor, name: str = "A tensor that a loop reads") -> str:
    """The message for a tensor whose storage was emptied."""
    return message(
        f"{name}, {describe(tensor)}, has no memory.",
        expected="tensors that hold their numbers",
        found="a storage of 0 bytes (sharded or off-loaded parameters have one until they are gathered)",
        fix="gather the parameters before the loop is called",
    )


def describe_type(shape: Any, dtype: torch.dtype) -> str:
    """'(4, 8) float32'."""
    inside = ", ".join(str(n) for n in shape)
    return f"({inside}{',' if len(shape) == 1 else ''}) {str(dtype).removeprefix('torch.')}"
