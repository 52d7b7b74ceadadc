"""`steploop explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Backend, UsedBackend
from .user_file import Constant, Init, Input, Target, call_of, users_errors


def explain(
    target: Target,
    init: Init = "",
    input: Input = None,
    constant: Constant = None,
    html: Annotated[Path | None, typer.Option(help="Write the plan as a web page.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the plan as JSON; -: print it as JSON.")] = None,
    backend: UsedBackend = Backend.auto,
) -> None:
    """Print what runs before, in and after the loops of a step, and why.

    Without --input, the file's `example()` is called: it returns a step (or a loop), its inputs, and a dict of
    constants where it takes some.

    \b
    steploop explain cell.py:Cell --init "8, 16" --input 20,4,8
    steploop explain decoder.py:Decoder --input 20,4:int --constant memory=4,9,16
    steploop explain cell.py --html plan.html
    """
    call = call_of(target, init, input, constant, backend.value)
    with users_errors(call.file):
        plan = call.loop.plan(*call.inputs, **call.constants)
    to_terminal = json == Path("-")
    print(plan.to_json() if to_terminal else plan)
    if html is not None:
        plan.save_html(html)
    if json is not None and not to_terminal:
        json.write_text(plan.to_json(), encoding="utf-8")
