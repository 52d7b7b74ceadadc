"""Notes what the Python code of a step does while it is traced. `reads.py` says what that is good for."""

from __future__ import annotations

import builtins
import contextvars
import datetime
import gc
import inspect
import logging
import os
import random
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import StepError
from .guards import MISSING
from .reads import (
    PACKAGE,
    STDLIB,
    STEPLOOP,
    TORCH,
    TRACER,
    USER,
    Reads,
    computes_names,
    kind_of_file,
    kind_of_module,
    names_of,
)
from .refusals import reads_what_changes

_CLOCKS = [
    getattr(time, name)
    for name in ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time",
                 "process_time_ns", "thread_time", "thread_time_ns", "clock_gettime", "localtime", "gmtime")
    if hasattr(time, name)
]  # fmt: skip
_CLOCKS += [datetime.datetime.now, datetime.datetime.today, datetime.datetime.utcnow, datetime.date.today]
_ENTROPY = [f for f in (os.urandom, getattr(os, "getrandom", None)) if f is not None]
_FORBIDDEN: dict[Any, str] = {
    **dict.fromkeys(_CLOCKS, "reads the clock"),
    **dict.fromkeys(_ENTROPY, "draws a random number"),
    builtins.open: "opens a file",
    builtins.input: "waits for a line of input",
    sys._getframe: "reads the variables of its caller",
}
# Python's own modules that make such calls for whoever calls them.
_ON_BEHALF = {"random", "secrets", "uuid", "pathlib", "datetime", "_pydatetime", "tempfile", "inspect"}
# Python's own modules that look up attributes by names that they are given.
_BY_NAME = {"copy", "copyreg", "dataclasses", "operator", "types", "pprint", "pickle", "json"}
# What writes into a log.
_LOGGING = frozenset(
    getattr(logging.Logger, name).__code__
    for name in ("debug", "info", "warning", "error", "exception", "critical", "log")
)


# The recorders at work in each thread, the innermost last.
_working = threading.local()


def working() -> Recorder | None:
    """The innermost recorder at work in this thread."""
    stack = getattr(_working, "stack", None)
    return stack[-1] if stack else None


class Recorder:
    """What ran between `with recorder:` and its end, in this thread, but for what torch's own operations did."""

    def __init__(self) -> None:
        self.codes: dict[types.CodeType, str] = {}
        self.resumed: set[int] = set()  # frames of generators
        self.variables: set[contextvars.ContextVar[Any]] = set()
        self._assigned: dict[contextvars.ContextVar[Any], Any] = {}  # with what they were before
        self.modules: set[str] = set()
        self.tensors: list[Tensor] = []
        self.inner: list[Reads] = []  # what the steps of inner loops have read
        self.refused: StepError | None = None
        self._outer: Any = None
        self._depth = 0
        self._in_between: set[types.CodeType] = set()
        self._aside: types.FrameType | None = None

    def __enter__(self) -> Recorder:
        if self._depth == 0:
            self._outer = sys.getprofile()
            _working.stack = [*getattr(_working, "stack", ()), self]
            self._in_between = {c.__code__ for c in gc.callbacks if isinstance(c, types.FunctionType)}
        self._depth += 1
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            _working.stack.pop()
        if self._depth == 0:
            sys.setprofile(None)
            _profile_again(self._outer)
        else:
            sys.setprofile(self._note)

    def pause(self) -> None:
        """An operation of torch is about to run: what its own Python code does is none of the step's."""
        if self._depth:
            sys.setprofile(None)

    def go_on(self) -> None:
        if self._depth:
            sys.setprofile(self._note)

    def runs(self, function: Any) -> None:
        """Notes a function of torch's that is about to run with the recorder paused."""
        code = getattr(function, "__code__", None)
        if code is not None and code not in self.codes:
            self.codes[code] = function.__globals__.get("__name__", "")

    def read(self, tensor: Tensor) -> None:
        """Notes that the content of a tensor of the user's is about to become a Python number."""
        self.tensors.append(tensor)

    def _note(self, frame: types.FrameType, event: str, argument: Any) -> None:
        if self._aside is not None:
            if event == "return" and frame is self._aside:
                self._aside = None
        elif event == "call":
            code = frame.f_code
            if code in self._in_between or code.co_name == "__del__" or _is_import(code) or (
                code in _LOGGING and _is_torchs(frame.f_back)
            ):
                # Python runs it whenever it collects garbage, or once; or torch tells a log, which may be the user's,
                # what it does while it traces. What it does is none of the step's.
                self._aside = frame
                return
            if code not in self.codes:
                self.codes[code] = frame.f_globals.get("__name__", "")
            if code.co_flags & inspect.CO_GENERATOR:
                self.resumed.add(id(frame))
        elif event == "c_call":
            self._note_builtin(frame, argument)

    def _note_builtin(self, frame: types.FrameType, function: Any) -> None:
        owner: Any = getattr(function, "__self__", None)
        kind = type(owner)
        if kind is contextvars.ContextVar:
            if not owner.name.startswith("steploop"):
                self.variables.add(owner)
                if function.__name__ == "set" and kind_of_file(frame.f_code.co_filename) in (USER, PACKAGE):
                    self._assigned.setdefault(owner, owner.get(MISSING))
        elif function is builtins.globals or function is builtins.vars or function is builtins.locals:
            self.modules.add(frame.f_globals.get("__name__", ""))
        elif kind is types.ModuleType or kind is type:
            try:
                why = _FORBIDDEN.get(function)
            except TypeError:  # can't be hashed
                return
            if why is not None:
                self._refuse(frame, why)
        elif isinstance(owner, random.Random):
            self._refuse(frame, "draws a random number")

    def _refuse(self, frame: types.FrameType, why: str) -> None:
        """Keeps the error: raised in here, Python would switch the recorder off and a step might catch it."""
        on_behalf = frame.f_globals.get("__name__", "").split(".")[0] in _ON_BEHALF
        if why.startswith("reads the variables"):
            on_behalf = frame.f_code is inspect.currentframe.__code__
        while on_behalf and frame.f_back is not None and kind_of_file(frame.f_code.co_filename) == STDLIB:
            frame = frame.f_back
        # Packages look at their callers to warn and to name things; a step would do it to read a value.
        whose = (USER,) if why.startswith("reads the variables") else (USER, PACKAGE)
        own = kind_of_file(frame.f_code.co_filename) in whose
        if self.refused is None and own:
            self.refused = reads_what_changes(why, frame.f_code.co_filename, frame.f_lineno)

    def assigned(self) -> list[str]:
        """The context variables that are not what they were. They are put back, but for those that had no value."""
        changed = [(v, was) for v, was in self._assigned.items() if v.get(MISSING) is not was]
        for variable, was in changed:
            if was is not MISSING:
                variable.set(was)
        return [f"the context variable {variable.name!r}" for variable, _ in changed]

    # -- afterwards ----------------------------------------------------------------------------------------

    def reads(self, met: Iterable[types.CodeType] = (), **more: Any) -> Reads:
        """What the code that ran, and the code that a walk met, may have read."""
        own = {c: m for c, m in self.codes.items() if _whose(c, m) in (USER, PACKAGE)}
        library = {c: m for c, m in self.codes.items() if _whose(c, m) in (STDLIB, TORCH, STEPLOOP)}
        met = set(met)
        computed = any(map(computes_names, {*own, *met}))
        computed |= any(m.split(".")[0] in _BY_NAME and computes_names(c) for c, m in library.items())
        names: frozenset[str] | None = None
        if not computed:
            names = frozenset().union(*map(names_of, {*own, *library, *met}))
        torchs = frozenset((c, m) for c, m in library.items() if _whose(c, m) == TORCH)
        reads = Reads(names, frozenset(self.modules), library=torchs, variables=frozenset(self.variables), **more)
        for inner in self.inner:
            reads = reads.joined(inner)
        return reads

    def unmet(self, met: Iterable[types.CodeType]) -> tuple[frozenset[weakref.ref[Any]], frozenset[Any]]:
        """Functions that ran and are none of those that a walk met, and code that ran and has no function."""
        known = {inner for code in met for inner in with_inner(code)}
        missing = {
            c: m for c, m in self.codes.items()
            if c not in known and _whose(c, m) in (USER, PACKAGE)
        }  # fmt: skip
        for code in list(missing):  # what was made while the step ran is inside code that ran
            for inner in with_inner(code):
                if inner is not code:
                    missing.pop(inner, None)
        functions = functions_of(missing)
        loose = {(c, m) for c, m in missing.items() if all(f.__code__ is not c for f in functions)}
        loose |= {(c, m) for c, m in self.codes.items() if m == "os" and "environ" in c.co_names}
        return frozenset(map(weakref.ref, functions)), frozenset(loose)


def _whose(code: types.CodeType, module: str) -> str:
    """Whose code this is. What was generated for a class, as a dataclass's methods are, is that of the class's module:
    where a step holds a loop, this library's own classes are made while the step is traced."""
    generated = code.co_filename.startswith("<") and kind_of_file(code.co_filename) == USER
    return kind_of_module(module) if generated else kind_of_file(code.co_filename)


def _is_import(code: types.CodeType) -> bool:
    return code.co_name == "<module>" and not code.co_filename.startswith("<")


def _is_torchs(frame: types.FrameType | None) -> bool:
    return frame is not None and kind_of_file(frame.f_code.co_filename) in (TORCH, TRACER)


def with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and those of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from with_inner(constant)


def functions_of(codes: Iterable[types.CodeType]) -> list[types.FunctionType]:
    """The functions that there are of some code."""
    codes = list(codes)
    if not codes:
        return []
    found = gc.get_referrers(*codes)
    return [f for f in found if isinstance(f, types.FunctionType) and f.__code__ in codes]


def _profile_again(outer: Any) -> None:
    if outer is None:
        return
    if hasattr(outer, "enable") and not isinstance(outer, types.FunctionType):
        outer.enable()  # cProfile, which Python's own call would not set going again
    else:
        sys.setprofile(outer)


# What makes Python numbers of a tensor's content.
CONTENT = frozenset(
    "item tolist numpy __bool__ __int__ __float__ __index__ __complex__ __array__ __contains__ equal allclose "
    "is_nonzero __format__ __repr__ __str__ is_same_size data_ptr".split()
)


def tensors_read(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors of the user's whose content a call of torch's makes Python numbers of."""
    if getattr(function, "__name__", "") not in CONTENT:
        return []
    return [t for t in arguments if type(t) in (Tensor, nn.Parameter)]
