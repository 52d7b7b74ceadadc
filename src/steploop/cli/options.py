"""Options that several commands take."""

from __future__ import annotations

import enum
import math
from pathlib import Path
from typing import Annotated

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
Overwrite = Annotated[bool, typer.Option("--overwrite", help="A model that is in --out may be replaced.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
