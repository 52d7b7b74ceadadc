"""Steps of strangers: what people write who know torch and have not read how this library works.

Each file holds steps of one field, written in the habits of that field. A stranger is a function that makes
    fn(carry, x) -> (carry, y), init(B) -> carry, xs(T, B) -> sequences
and may close over modules and tensors. The plain Python loop runs them all; so must everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Stranger:
    """make() -> (fn, init, xs).

    random: it draws numbers, so two runs can only be compared number by number where both draw the same.
    rows: every row of a result depends on the same row alone, so lengths mean something.
    """

    name: str
    make: Callable[[], tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]]
    random: bool = False
    rows: bool = True


STRANGERS: dict[str, Stranger] = {}


def stranger(make: Any = None, **options: Any) -> Any:
    """Registers a function under its name and that of its file."""
    if make is None:
        return lambda made: stranger(made, **options)
    name = f"{make.__module__.rpartition('.')[2]}.{make.__name__}"
    STRANGERS[name] = Stranger(name, make, **options)
    return make


def all_strangers() -> dict[str, Stranger]:
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem != "__init__":
            import_module(f"{__name__}.{path.stem}")
    return STRANGERS
