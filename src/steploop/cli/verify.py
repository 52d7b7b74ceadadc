"""`steploop verify`."""

from __future__ import annotations

import json as text_format
import sys
from typing import Any

from ..errors import MismatchError
from .options import AsJson, Backend, UsedBackend
from .user_file import Constant, Init, Input, Target, call_of, users_errors

DIFFERS = 1  # the exit code


def verify(
    target: Target,
    init: Init = "",
    input: Input = None,
    constant: Constant = None,
    backend: UsedBackend = Backend.auto,
    json: AsJson = False,
) -> None:
    """Compare a step's compiled loop with its plain Python loop: outputs, states and all gradients.

    Exit code 0: they agree. 1: they differ. 2: the step or the call is wrong. Without --input, the file's `example()`
    is called, as for `steploop explain`.

    \b
    steploop verify cell.py:Cell --init "8, 16" --input 20,4,8
    steploop verify cell.py --json
    """
    import steploop as sl

    call = call_of(target, init, input, constant, backend.value)
    try:
        with users_errors(call.file):
            report = sl.verify(call.loop, *call.inputs, **call.constants)
    except MismatchError as error:
        if json:
            print(text_format.dumps({"ok": False, "error": str(error)}, indent=1))
        else:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(DIFFERS)
    print(text_format.dumps(as_dict(report), indent=1) if json else report)


def as_dict(report: Any) -> dict[str, Any]:
    compared = [{"kind": d.kind, "name": d.name, "error": d.error, "allowed": d.tolerance} for d in report.differences]
    return {
        "ok": report.ok,
        "backend": report.backend,
        "step_by_step": report.step_by_step,
        "notes": report.notes,
        "compared": compared,
    }
