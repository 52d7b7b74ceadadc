"""`steploop cache`."""

from __future__ import annotations

import json as text_format
from typing import Annotated

import typer

from .options import AsJson


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all compiled loops; they are built anew.")] = False,
    json: AsJson = False,
) -> None:
    """Tell where compiled loops are kept and how much room they take; or remove them.

    STEPLOOP_CACHE names another folder.

    \b
    steploop cache
    steploop cache --clear
    """
    from ..backends.native import cache as kept

    libraries, size = kept.contents()
    facts = {"path": str(kept.folder()), "loops": libraries, "bytes": size, "removed": clear}
    if clear:
        kept.clear()
    if json:
        print(text_format.dumps(facts, indent=1))
        return
    print(f"{facts['path']}\n{libraries} compiled loops, {size / 1e6:.1f} MB{'; removed' if clear else ''}")
