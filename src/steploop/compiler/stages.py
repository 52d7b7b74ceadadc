"""The texts of the stages that a call goes through, from the captured step to its loops.

STEPLOOP_SHOW=passes in the environment prints them to stderr as they come; `Plan.stages` gives them for one call.
Tests set STEPLOOP_CHECK_GRAPHS=1: then every graph is checked at every stage.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from .ir.check import check, checking
from .ir.graph import StepGraph
from .ir.show import show

_recorded: ContextVar[list[tuple[str, str]] | None] = ContextVar("steploop_stages", default=None)

_aside: ContextVar[bool] = ContextVar("steploop_stages_aside", default=False)


def stage(name: str, step: StepGraph, recorded: bool = False) -> None:
    """Notes what a graph looks like after a stage, where somebody looks. recorded: torch has just made it."""
    if checking():
        check(step, name, values_too=not recorded)
    note(name, lambda: show(step))


def note(name: str, text: Callable[[], str]) -> None:
    """The same for a stage that has another text than its graph's."""
    record, printed = _recorded.get(), "passes" in os.environ.get("STEPLOOP_SHOW", "")
    if _aside.get() or (record is None and not printed):
        return
    found = text()
    if record is not None:
        record.append((name, found))
    if printed:
        print(f"== {name}\n{found}", file=sys.stderr)


def looking() -> bool:
    """Whether the stages of the running call are recorded: then nothing that is kept may be used."""
    return _recorded.get() is not None


@contextmanager
def aside() -> Iterator[None]:
    """What runs inside is for a comparison, and is no stage of the call."""
    token = _aside.set(True)
    try:
        yield
    finally:
        _aside.reset(token)


@contextmanager
def recorded_stages() -> Iterator[list[tuple[str, str]]]:
    """Collects (name, text) of the stages that run inside."""
    found: list[tuple[str, str]] = []
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


def as_text(stages: list[tuple[str, str]]) -> str:
    """One text; a stage that changed nothing is one line."""
    lines, before = [], ""
    for name, text in stages:
        lines.append(f"== {name}\n{text}" if text != before else f"== {name}: nothing changes\n")
        before = text
    return "\n".join(lines)
