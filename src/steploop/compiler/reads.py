"""What the Python code of a step can have read.

Python reads a value in one of two ways only: it names it (a variable, a global, an attribute, a constant key), or it
calls something that reads for it. So while a step is traced, a `Recorder` notes every Python function that runs and
every built-in function that it calls. From that follows what has to be watched afterwards:

- `Reads.names`: every attribute that the code names, on whatever object the walk of `dependencies.py` meets;
- the globals that each function names;
- functions that ran although the walk did not meet them;
- what a built-in read: a context variable, the content of a tensor.

Some calls can't be watched. A clock, a source of entropy and a file give something else at every step, and are refused.
"""

from __future__ import annotations

import contextvars
import dis
import functools
import os
import re
import site
import sys
import sysconfig
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_OURS = tuple(os.path.join(_HERE, part) for part in ("nn", "memory", "seq2seq", "search", "recipes"))
_COMPILER = tuple(os.path.join(_HERE, part) for part in ("compiler", "backends"))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))
# Where torch's tracer itself runs: none of the step's business.
_TRACER = tuple(
    os.path.join(_TORCH, part)
    for part in ("_subclasses", "fx", "_dispatch", "_ops.py", "_prims", "_refs", "_decomp", "_higher_order_ops",
                 "_meta_registrations.py", "_python_dispatcher.py", "utils/_python_dispatch.py", "overrides.py",
                 "utils/_pytree.py", "utils/_sympy", "_functorch", "_logging", "_library", "_guards.py",
                 "_compile.py", "_dynamo", "_inductor", "utils/weak.py", "utils/_stats.py")
)  # fmt: skip
_PATHS = sysconfig.get_paths()
_STDLIB = tuple(_PATHS[name] for name in ("stdlib", "platstdlib") if name in _PATHS)
# Packages are installed there, for this user alone (pip install --user), or beside torch (pip install --target).
_INSTALLED = [_PATHS[name] for name in ("purelib", "platlib") if name in _PATHS]
_INSTALLED += [site.getusersitepackages(), os.path.dirname(_TORCH)]
_PACKAGES = tuple({os.path.join(path, "") for path in _INSTALLED})
_OF_TORCH = tuple(os.path.join(path, name, "") for path in _PACKAGES for name in ("sympy", "mpmath", "networkx"))
_NUMPY = os.path.join(os.path.dirname(os.path.abspath(cast(str, sys.modules["numpy"].__file__))), "")

USER, PACKAGE, STDLIB, TORCH, STEPLOOP, TRACER = "user", "package", "stdlib", "torch", "steploop", "tracer"


@functools.lru_cache(maxsize=8192)
def kind_of_file(filename: str | None) -> str:
    """Whose code a file holds: USER, PACKAGE (installed), STDLIB, TORCH, STEPLOOP (what calls a step), or TRACER (what
    runs while tracing)."""
    if filename is None or filename.startswith("<frozen"):
        return STDLIB
    if filename.startswith("<"):
        # Python's own generated code (namedtuple, dataclass) belongs to the class that it was made for.
        return TRACER if filename.startswith(("<steploop", "<eval_with_key>", "<conditions>")) else USER
    if filename.startswith(_HERE):
        if filename.startswith(_OURS):
            return USER
        return TRACER if filename.startswith(_COMPILER) else STEPLOOP
    if filename.startswith(_TORCH):
        return TRACER if filename.startswith(_TRACER) else TORCH
    if filename.startswith(_NUMPY):
        return TORCH
    if filename.startswith(_PACKAGES):
        return TRACER if filename.startswith(_OF_TORCH) else PACKAGE
    return STDLIB if filename.startswith(_STDLIB) else USER


def trusted(kind: str) -> bool:
    """Whether code of this kind changes only where somebody patches it."""
    return kind not in (USER, PACKAGE)


def kind_of_module(name: str | None) -> str:
    """Whose module this is. One without a file is built into Python, or was made by the user: a notebook is one."""
    if name is None:
        return USER
    if name in sys.builtin_module_names:
        return STDLIB
    module = sys.modules.get(name)
    filename = getattr(module, "__file__", None)
    if not isinstance(filename, str):
        frozen = getattr(getattr(module, "__spec__", None), "origin", None) == "frozen"
        return STDLIB if frozen or name.split(".")[0] in sys.stdlib_module_names and name != "__main__" else USER
    return kind_of_file(filename)


# -- names in code -------------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\W\d]\w*")
_LONG = 200  # a longer text is no name


def _constants(code: types.CodeType) -> Iterator[Any]:
    """What the code loads as constants; its docstring stands among them and is none."""
    documented = code.co_name != "<lambda>" and code.co_consts and isinstance(code.co_consts[0], str)
    stack = list(code.co_consts[1:] if documented else code.co_consts)
    while stack:
        constant = stack.pop()
        if isinstance(constant, (tuple, frozenset)):
            stack.extend(constant)
        else:
            yield constant


@functools.lru_cache(maxsize=16384)
def names_of(code: types.CodeType) -> frozenset[str]:
    """Every name that a code object, or one inside it, may look up as an attribute."""
    names = set(code.co_names)
    for constant in _constants(code):
        if isinstance(constant, types.CodeType):
            names |= names_of(constant)
        elif isinstance(constant, str) and len(constant) < _LONG:
            names.update(_WORD.findall(constant))
    return frozenset(names)


@dataclass(frozen=True)
class Globals:
    """What a code object, or one inside it, takes from its module.

    names: the variables.  attributes: what it looks up as attributes, of modules among others.
    imports: modules that it imports while it runs.
    """

    names: tuple[str, ...]
    attributes: tuple[str, ...]
    imports: tuple[str, ...]


@functools.lru_cache(maxsize=16384)
def globals_of(code: types.CodeType) -> Globals:
    names: list[str] = []
    imports: list[str] = []
    attributes = list(code.co_names)
    for instruction in dis.get_instructions(code):
        if "GLOBAL" in instruction.opname or instruction.opname == "LOAD_NAME":
            names.append(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":
            imports.append(instruction.argval)
    if "import_module" in attributes or "modules" in attributes or "__import__" in attributes:
        imports += [c for c in _constants(code) if isinstance(c, str) and c in sys.modules]
    for constant in _constants(code):
        if isinstance(constant, types.CodeType):
            inner = globals_of(constant)
            names += inner.names
            attributes += inner.attributes
            imports += inner.imports
        elif isinstance(constant, str) and len(constant) < _LONG:
            attributes += _WORD.findall(constant)
    return Globals(*(tuple(dict.fromkeys(found)) for found in (names, attributes, imports)))


_BESIDE = ("CACHE", "PRECALL", "EXTENDED_ARG")
_COMPUTED = frozenset(
    "vars __dict__ eval exec attrgetter methodcaller locals dir __getattribute__ __reduce_ex__ asdict astuple "
    "fields".split()
)


@functools.lru_cache(maxsize=16384)
def computes_names(code: types.CodeType) -> bool:
    """Whether the code may look up an attribute whose name it computes."""
    if not {"getattr", *_COMPUTED} & set(code.co_names):
        return any(computes_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    instructions = [i for i in dis.get_instructions(code) if i.opname not in _BESIDE]
    for place, instruction in enumerate(instructions):
        if instruction.argval in _COMPUTED:
            return True
        if instruction.argval == "getattr" and not _constant_name(instructions[place + 1 :]):
            return True
    return any(computes_names(c) for c in code.co_consts if isinstance(c, types.CodeType))


def _constant_name(after: list[dis.Instruction]) -> bool:
    """Whether the call of getattr that these instructions make is given its name as a constant."""
    for place, instruction in enumerate(after):
        if instruction.opname.startswith("CALL"):
            count = instruction.arg or 0
            given = after[place - count + 1 : place] if count in (2, 3) else []
            loads = [i for i in given if i.opname.startswith("LOAD_") or i.opname == "RETURN_GENERATOR"]
            return len(loads) == len(given) > 0 and given[0].opname == "LOAD_CONST" and isinstance(given[0].argval, str)
    return False


# -- what is known after a trace -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reads:
    """What has to be watched of a step, beside the step itself. It keeps nothing of the step's alive.

    names: the attributes that its code names; None: any.
    modules: names of modules whose variables the code looks up by names that it computes.
    functions: functions that ran although no walk met them.
    loose: code that ran and belongs to no function, with the name of its module.
    library: code of torch's and of Python's own that ran, with the name of its module: somebody may patch it.
    variables: context variables that were read.
    contents: paths of tensors whose content was read as Python numbers.
    """

    names: frozenset[str] | None = None
    modules: frozenset[str] = frozenset()
    functions: frozenset[weakref.ref[Any]] = frozenset()
    loose: frozenset[tuple[types.CodeType, str]] = frozenset()
    library: frozenset[tuple[types.CodeType, str]] = frozenset()
    variables: frozenset[contextvars.ContextVar[Any]] = frozenset()
    contents: frozenset[str] = frozenset()

    def joined(self, other: Reads) -> Reads:
        """What both have read."""
        names = None if self.names is None or other.names is None else self.names | other.names
        return Reads(names, **{n: getattr(self, n) | getattr(other, n) for n in _SETS})

    def within(self, other: Reads) -> bool:
        """Whether the other has read all this too."""
        names = other.names is None or self.names is not None and self.names <= other.names
        return names and all(getattr(self, n) <= getattr(other, n) for n in _SETS)


_SETS = ("modules", "functions", "loose", "library", "variables", "contents")
EVERYTHING = Reads()
