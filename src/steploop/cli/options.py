"""Options that several commands take."""

from __future__ import annotations

import dataclasses
import enum
import math
from pathlib import Path
from typing import Annotated, Any

import typer


class Cell(str, enum.Enum):
    gru = "gru"
    lstm = "lstm"


class Device(str, enum.Enum):
    cpu = "cpu"
    cuda = "cuda"


class Backend(str, enum.Enum):
    auto = "auto"
    cpu = "cpu"
    eager = "eager"
    reference = "reference"


def finite(value: float | None) -> float | None:
    """A typer callback: nan and inf pass every other check."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"a finite number is expected; got {value}")
    return value


Data = Annotated[Path | None, typer.Option(help="A UTF-8 text; without it, the Shakespeare texts.")]
Streams = Annotated[int, typer.Option(min=1, help="Places of the text that are read side by side (B).")]
Steps = Annotated[int, typer.Option(min=1, help="Characters per window; gradients stop at its border (T).")]
Rate = Annotated[float, typer.Option(callback=finite, help="The highest learning rate of the run.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the weights, dropout and windows.")]
UsedBackend = Annotated[Backend, typer.Option(help="What runs the loops.")]
UsedDevice = Annotated[Device, typer.Option(help="Where the model is trained.")]
Devices = Annotated[
    int | None,
    typer.Option(min=1, help="Processes that train together, each on a device of its own. [default: 1, or torchrun's]"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="A model that is in --out may be replaced.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")]
Dropout = Annotated[float | None, typer.Option(min=0, max=0.99, callback=finite, help="[default: 0.1]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def given(shape: Any, cell: Cell | None, **sizes: float | None) -> Any:
    """A model's shape with what was typed: an option that was left out changes nothing."""
    named = {"cell": None if cell is None else cell.value, **sizes}
    return dataclasses.replace(shape, **{name: value for name, value in named.items() if value is not None})


def budget(minutes: float | None, max_steps: int | None, default: float) -> float | None:
    """The minutes of a run: the default where neither they nor its steps were typed."""
    return default if minutes is None and max_steps is None else minutes
