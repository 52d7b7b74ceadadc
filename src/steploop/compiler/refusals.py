"""What a capture says when a step does something that can't be captured, with the user's line."""

from __future__ import annotations

import functools
import linecache
import os
import traceback

import torch
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..errors import StepError, describe, message
from .ir.graph import line_of, op_name

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))
# Files of ours that stand between a user's step and torch, without being anybody's step.
_BETWEEN = tuple(os.path.join(_HERE, "memory", name) for name in ("base.py", "opaque.py"))
_USER_PARTS = tuple(os.path.join(_HERE, part) for part in ("nn", "memory", "seq2seq", "search", "recipes"))
_TRACER = os.path.join(_HERE, "compiler", "trace_step.py")
VALUE_ERRORS = (DataDependentOutputException, GuardOnDataDependentSymNode, DynamicOutputShapeException)
_REFERENCE = 'backend="reference" runs it as it stands.'


def is_user_file(filename: str) -> bool:
    if filename.startswith((_TORCH, "<frozen", "<steploop")) or filename in _BETWEEN:
        return False
    return filename.startswith(_USER_PARTS) or not filename.startswith(_HERE)


def refusal(error: Exception, called: str = "", of_gradient: tuple[str, int] | None = None) -> StepError | None:
    """The StepError to raise for an error of torch's tracer; None where the error speaks for itself.

    called: the torch call that failed, with the types of its arguments.
    of_gradient: the file and the line of the step whose gradient was computed, if one was.
    """
    text = str(error)
    where, line = innermost_user_frame(error)
    if not where and of_gradient is not None:
        where, line = f" ({of_gradient[0]}:{of_gradient[1]})", linecache.getline(*of_gradient).strip()
        called = called or f"the gradient of this line: {type(error).__name__}"
    if isinstance(error, VALUE_ERRORS) or ".numpy() is not supported" in text:
        return _uses_value(where, line)
    if "non-functional tensor" in text:
        return StepError(f"the step changes a tensor in place that is not its own{where}:\n    {line}\n{KEEP}")
    if isinstance(error, TypeError) and "__torch_dispatch__ handlers returned NotImplemented" in text:
        return StepError(
            f"torch can't trace this{where}:\n    {line}\n"
            f"If it reads `.data`, write .detach() instead; a step can't assign to it. {_REFERENCE}"
        )
    return _not_possible(error, where, line, called)


_WRAPPED = (NotImplementedError, RuntimeError, IndexError, ValueError, TypeError)


def _not_possible(error: Exception, where: str, line: str, called: str) -> StepError | None:
    """torch can't do what a line of the step asks for: sizes, dtypes or devices that do not fit, as a rule."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    builtin = next((kind for kind in _WRAPPED if isinstance(error, kind)), None)
    if isinstance(error, AssertionError):
        builtin = RuntimeError  # the tracer asserts some of what torch itself checks
    own = type(error) in (*_WRAPPED, AssertionError) or type(error).__module__.startswith("torch")
    if not where or builtin is None or not own or last is None or is_user_file(last.tb_frame.f_code.co_filename):
        return None  # the user's own code raised it
    text = str(error).strip().split("\n\n")[0]
    return _of_both(builtin)(_cannot(f"{where.strip(' ()')}: {line}\n  {text}", called or type(error).__name__))


def own_operations(kind: type, line: str) -> StepError:
    """For a tensor of a subclass that the step closes over."""
    return StepError(
        message(
            f"{line}: the step computes with a {kind.__name__}, a subclass of Tensor, which can't be captured.",
            expected="torch.Tensor or nn.Parameter",
            found=f"{kind.__module__}.{kind.__qualname__}",
            at="",
            fix=f"keep its plain tensor: t.as_subclass(torch.Tensor), or what holds its numbers. {_REFERENCE}",
        )
    )


def refused_call(node: fx.Node, text: str) -> StepError:
    """The same for a call of a captured step that torch refuses for its dtypes."""
    tensors = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    found = ", ".join(describe(t) for t in tensors)
    return _of_both(RuntimeError)(_cannot(f"{line_of(node) or 'the step'}: {text}", f"{op_name(node)}({found})"))


def _cannot(what: str, found: str) -> str:
    return message(
        what,
        expected="sizes, dtypes and devices that torch can compute with",
        found=found,
        at="",
        fix="print x.shape, x.dtype and x.device of what this line reads; in a step there is no time axis. "
        'backend="reference" stops at this line in a debugger',
    )


@functools.cache
def _of_both(builtin: type[Exception]) -> type[StepError]:
    """StepError, for whoever also expects the error that torch itself raises."""
    return type("StepError", (StepError, builtin), {"__module__": StepError.__module__, "__doc__": StepError.__doc__})


KEEP = (
    "A step is captured once and the change would happen once instead of at every step. Keep what changes from "
    "step to step in an sl.State (self.average = sl.State(size)), change a copy (x = x + 1 instead of x += 1), "
    f"or put a module with running statistics in eval mode. {_REFERENCE}"
)


def _uses_value(where: str, line: str) -> StepError:
    return StepError(
        f"the step uses the value of a tensor in Python{where}:\n    {line}\n"
        "A step is captured once for all steps and rows, so it can't branch on, print or convert what a tensor "
        "holds. Write torch.where(condition, a, b) instead of `if` and of x[mask], keep counts in an sl.State instead "
        "of .item(), and use sl.memory.Masked(step)(x, where=mask) to run a step only for some rows. " + _REFERENCE
    )


def innermost_user_frame(error: BaseException | None) -> tuple[str, str]:
    """(" (file.py:14)", the source of that line), or ("", "(line not known)")."""
    chosen = None
    while error is not None:
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == _TRACER:
                chosen = None  # what called the tracer is no line of the step
            elif is_user_file(frame.filename):
                chosen = frame
        error = error.__cause__ or error.__context__
        if chosen is not None:
            break
    if chosen is None:
        return "", "(line not known)"
    return f" ({chosen.filename}:{chosen.lineno})", (chosen.line or "").strip()


def traces_itself() -> StepError:
    """For a step that hands what it computes with to another tracer, whose graph then holds it as a constant."""
    return StepError(
        message(
            "the step traces a function itself (torch.func.linearize, make_fx), which a capture can't hold.",
            expected="calls of torch; of torch.func grad, jacfwd, jvp, vjp, vmap and the like",
            found="a constant that the step has computed",
            at="",
            fix=f"torch.func.jvp(f, (x,), (tangent,)) does what linearize does, at once. {_REFERENCE}",
        )
    )


def reads_what_changes(why: str, filename: str, number: int) -> StepError:
    """The refusal of a call that gives something else at every step."""
    line = linecache.getline(filename, number).strip() or "(line not known)"
    return StepError(
        f"the step {why} ({filename}:{number}):\n    {line}\n"
        "A step is captured once and not run again: what this gives is drawn once, and not at every step. "
        "Draw random numbers with torch (torch.rand), pass in what changes from step to step as a sequence and the "
        f"rest as a constant, or do it before the loop. {_REFERENCE}"
    )


def asks_for_gradient(filename: str, number: int) -> StepError:
    """The refusal of a step that asks an input or a state whether it requires a gradient."""
    line = linecache.getline(filename, number).strip() or "(line not known)"
    return StepError(
        f"the step asks whether a value requires a gradient ({filename}:{number}):\n    {line}\n"
        "A state does not before the first step and may after it, so a step that is captured once for all steps has no "
        f"answer. Give the step an attribute that says what you want (self.training is one). {_REFERENCE}"
    )
