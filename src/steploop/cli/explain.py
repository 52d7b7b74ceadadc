"""`steploop explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from .options import Backend, UsedBackend
from .user_file import example, load, made, tensor, users_errors


def explain(
    target: Annotated[str, typer.Argument(metavar="FILE.py:Class", help="Where the step is.")],
    init: Annotated[str, typer.Option(help='What the class is made with: "8, 16" or "8, bias=False".')] = "",
    input: Annotated[
        list[str] | None,
        typer.Option(help='Shape of a sequence, "T,B,I"; "T,B:int" for whole numbers. Repeatable.'),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the plan as a web page.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the plan as JSON.")] = None,
    backend: UsedBackend = Backend.auto,
) -> None:
    """Print what runs before, in and after the loops of a step, and why.

    Without --input, the file's `example()` is called: it returns a step (or a loop), its inputs, and a dict of
    constants where it takes some.
    """
    plan = _plan(target, init, input or [], backend.value)
    print(plan)
    if html is not None:
        plan.save_html(html)
    if json is not None:
        written = plan.to_json()
        json.write_text(written if isinstance(written, str) else _as_json(written), encoding="utf-8")


def _plan(target: str, init: str, shapes: list[str], backend: str) -> Any:
    import steploop as sl

    file, _, name = target.partition(":")
    if name == "" and not file.endswith(".py"):
        raise InputError(f"Expected FILE.py:Class, got {target!r}")
    module = load(Path(file))
    if shapes:
        step, inputs, constants = made(module, file, name, init), [tensor(shape) for shape in shapes], {}
    else:
        step, inputs, constants = example(module, file, name)
    loop = step if isinstance(step, sl.Loop) else sl.Loop(step, backend=backend)
    with users_errors(file):
        return loop.plan(*inputs, **constants)


def _as_json(value: Any) -> str:
    import json

    return json.dumps(value, indent=1)
