"""A step in a user's own file and what it is called with, for the commands that take FILE.py:Class."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError, SteploopError, raised_at

Target = Annotated[str, typer.Argument(metavar="FILE.py:Class", help="Where the step is.")]
Init = Annotated[str, typer.Option(help='What the class is made with: "8, 16" or "8, bias=False".')]
Input = Annotated[
    list[str] | None,
    typer.Option(help='Shape of a sequence, "T,B,I"; "T,B:int" for whole numbers. Repeatable.'),
]
Constant = Annotated[
    list[str] | None,
    typer.Option(help='Name and shape of a constant, "memory=B,S,I"; "table=V,E:unbatched". Repeatable.'),
]


@dataclass
class Call:
    """A Loop and the arguments it is called with."""

    file: str
    loop: Any
    inputs: tuple[Any, ...]
    constants: dict[str, Any]


def call_of(target: str, init: str, inputs: list[str] | None, constants: list[str] | None, backend: str) -> Call:
    """What FILE.py:Class and the options say; without inputs, what the file's `example()` returns."""
    import steploop as sl

    file, _, name = target.partition(":")
    if name == "" and not file.endswith(".py"):
        raise InputError(f"Expected FILE.py:Class, got {target!r}")
    module = load(Path(file))
    if inputs:
        step, given = made(module, file, name, init), tuple(tensor(shape, "--input", "20,4,8") for shape in inputs)
        named = dict(constant(text) for text in constants or [])
    else:
        if constants:
            raise InputError("--constant goes with --input: an example() returns its constants itself.")
        step, given, named = example(module, file, name)
    if not isinstance(step, sl.Loop):
        return Call(file, sl.Loop(step, backend=backend), given, named)
    if backend != "auto":
        step.backend = backend
    return Call(file, step, given, named)


@contextlib.contextmanager
def users_errors(file: str | Path) -> Iterator[None]:
    """What the user's file raises, as a message with its line instead of a traceback."""
    try:
        yield
    except SteploopError:
        raise
    except SyntaxError as error:
        at = f"{error.filename or file}:{error.lineno}" if error.lineno else str(file)
        raise InputError(f"{at}: {error.msg}\n  {(error.text or '').strip()}".rstrip()) from error
    except (Exception, SystemExit) as error:
        at = raised_at(error) or str(file)
        raise InputError(f"{at}: {type(error).__name__}: {error}") from error


def load(file: Path) -> Any:
    """The user's file as a module; what it imports from beside it is found."""
    if not file.is_file():
        raise InputError(f"No such file: {file}")
    sys.path.insert(0, str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise InputError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    with users_errors(file):
        spec.loader.exec_module(module)
    return module


def made(module: Any, file: str, name: str, init: str) -> Any:
    """The class `name` of the module, made with what `init` spells; or the step that `name` is."""
    import steploop as sl

    found = getattr(module, name, None)
    if isinstance(found, (sl.Step, sl.Loop)):
        return found
    if not (isinstance(found, type) and issubclass(found, (sl.Step, sl.Loop))):
        steps = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, sl.Step)]
        what = "which is not a steploop.Step" if hasattr(module, name) else "which is not there"
        there = ", ".join(steps) or "no class that is a Step"
        raise InputError(f"{file} was asked for {name!r}, {what}.\n  found:    {there}")
    positional, named = _arguments(init)
    try:
        with users_errors(file):
            return found(*positional, **named)
    except InputError as error:
        if not isinstance(error.__cause__, TypeError):
            raise
        raise InputError(
            f'{name}({init}): {error.__cause__}\n  fix:      --init "8, 16" with what {name} takes'
        ) from error


def _arguments(init: str) -> tuple[list[Any], dict[str, Any]]:
    """Positional and named literals, from "8, hidden_size=16"."""
    try:
        call: Any = ast.parse(f"f({init})", mode="eval").body
        return (
            [ast.literal_eval(value) for value in call.args],
            {word.arg: ast.literal_eval(word.value) for word in call.keywords},
        )
    except (SyntaxError, ValueError, AttributeError):
        raise InputError(f'--init takes Python literals such as "8, 16" or "8, bias=False"; got {init!r}') from None


def tensor(shape: str, option: str, like: str) -> Any:
    """Of a shape: "20,4,8" is random floats, "20,4:int" zeros (a number that any table has), "20,4:bool" all True."""
    import torch

    sizes, _, kind = shape.partition(":")
    try:
        numbers = [int(size) for size in sizes.split(",")] if sizes else []
    except ValueError:
        numbers = [-1]
    if not numbers or min(numbers) < 0 or kind not in ("", "float", "int", "bool"):
        raise InputError(
            f'{option} takes a shape such as "{like}" (T,B,I for sequences), "20,4:int" or "20,4:bool"; got {shape!r}'
        )
    try:
        if kind in ("", "float"):
            return torch.randn(numbers, device="cpu")
        if kind == "int":
            return torch.zeros(numbers, dtype=torch.int64, device="cpu")
        return torch.ones(numbers, dtype=torch.bool, device="cpu")
    except (RuntimeError, TypeError, OverflowError):
        fix = f"  fix:      smaller sizes, such as {like!r}"
        raise InputError(f"{option}: {shape!r} does not fit into memory\n{fix}") from None


def constant(text: str) -> tuple[str, Any]:
    """(name, tensor) from "memory=4,9,16" or "table=10,16:unbatched"."""
    import steploop as sl

    name, equals, shape = text.partition("=")
    if not equals or not name.isidentifier():
        raise InputError(f'--constant takes a name and a shape such as "memory=4,9,16" (B first); got {text!r}')
    plain = shape.removesuffix(":unbatched")
    value = tensor(plain, "--constant", "memory=4,9,16")
    return name, value if plain == shape else sl.unbatched(value)


def example(module: Any, file: str, name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(step or loop, inputs, constants) from the module's `example()`, or from the function that was named."""
    function = getattr(module, name or "example", None)
    if not callable(function) or isinstance(function, type):
        function = getattr(module, "example", None)
    if function is None:
        raise InputError(
            f"{file} has no example(), so the shape of the input is not known.\n"
            f'  fix:      steploop explain {file}:{name or "Class"} --init "..." --input "T,B,I"'
        )
    with users_errors(file):
        made = function()
    if not (isinstance(made, tuple) and len(made) in (2, 3)):
        raise InputError(f"{file}: example() returns (step_or_loop, inputs[, constants]), got {type(made).__name__}")
    step, inputs, constants = (*made, {}) if len(made) == 2 else made
    return step, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), constants
