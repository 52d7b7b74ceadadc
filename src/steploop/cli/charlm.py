"""`steploop train charlm` and `steploop compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import DataError
from .options import (
    Backend,
    Cell,
    Data,
    Device,
    Devices,
    Dropout,
    Overwrite,
    Rate,
    Resume,
    Seed,
    Steps,
    Streams,
    UsedBackend,
    UsedDevice,
    budget,
    finite,
    given,
)  # fmt: skip

if TYPE_CHECKING:
    from ..recipes.charlm import Shape
    from ..recipes.charlm_training import Settings


def train_charlm(
    data: Data = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Checkpoints, logs and the curve go here.")] = Path(
        "runs/charlm"
    ),
    cell: Annotated[Cell | None, typer.Option(help="[default: gru]")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="[default: 2]")] = None,
    units: Annotated[int | None, typer.Option(min=1, help="Per layer. [default: 256]")] = None,
    embedding: Annotated[int | None, typer.Option(min=1, help="[default: 128]")] = None,
    dropout: Dropout = None,
    streams: Streams = 64,
    steps: Steps = 64,
    learning_rate: Rate = 4e-3,
    minutes: Annotated[
        float | None, typer.Option(callback=finite, help="[default: 9, or none with --max-steps]")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Windows to train on, instead of a time.")] = None,
    seed: Seed = 1,
    backend: UsedBackend = Backend.auto,
    device: UsedDevice = Device.cpu,
    devices: Devices = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a character model: it learns to continue a text, one character at a time.

    The first 90 % of the text are for training, the last 10 % tell how good the model is. The learning rate
    falls towards the end of --minutes (or --max-steps); on --resume these count from the very beginning.
    """
    if resume and overwrite:
        raise DataError("--resume keeps the model that --overwrite would replace: give one of them.")
    text = _text(data)
    from rich.console import Console

    from ..recipes import processes
    from ..recipes.charlm_training import WEIGHTS, Settings, fit
    from ..recipes.checkpoints import BEST
    from ..recipes.training import LAST

    begun = _shape_to_begin_with(out / LAST if resume else None)
    shape = given(begun, cell, layers=layers, units=units, embedding=embedding, dropout=dropout)
    settings = Settings(
        streams,
        steps,
        learning_rate,
        budget(minutes, max_steps, 9.0),
        max_steps,
        seed=seed,
        backend=backend.value,
        device=device.value,
        processes=processes.asked(devices),
    )
    console = Console(quiet=not processes.leads())
    size = f"{len(text):,} character{'' if len(text) == 1 else 's'}"
    console.print(f"{shape}; {size}; {_budget(settings)}.", highlight=False)
    module = fit(text, shape, settings, out, resume=resume, overwrite=overwrite, console=console)
    best = min(module.history, key=lambda entry: entry["val_nats"])
    console.print(
        f"Best validation loss: {best['val_nats']:.4f} nats = {best['val_bits_per_character']:.4f} bits per "
        f"character.\n  checkpoints  {out / BEST}, {out / LAST}\n  weights      {out / WEIGHTS}\n"
        f"  curve        {out / 'curve.png'}\n"
        f"  plan         {out / 'plan.txt'}, {out / 'plan.html'}\n"
        f"  logs         {out / 'logs'}, {out / 'tensorboard'}\n"
        f'Try it:  steploop sample --checkpoint {out / BEST} --prompt "..."',
        highlight=False,
        soft_wrap=True,
    )


def compare(
    data: Data = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="One folder per model, and compare.png.")] = Path(
        "runs/compare"
    ),
    cell: Annotated[Cell, typer.Option()] = Cell.gru,
    layers: Annotated[str, typer.Option(help="Numbers of layers to try.")] = "1,2,3",
    units: Annotated[str, typer.Option(help="Numbers of units to try.")] = "128,256",
    embedding: Annotated[int, typer.Option(min=1)] = 128,
    dropout: Annotated[float, typer.Option(min=0, max=0.99, callback=finite)] = 0.1,
    streams: Streams = 64,
    steps: Steps = 64,
    learning_rate: Rate = 4e-3,
    minutes: Annotated[
        float | None,
        typer.Option(callback=finite, help="For each model. [default: 1, or none with --characters]"),
    ] = None,
    characters: Annotated[
        int | None, typer.Option(min=1, help="Characters that each model reads, instead of a time.")
    ] = None,
    seed: Seed = 1,
    backend: UsedBackend = Backend.auto,
    device: UsedDevice = Device.cpu,
    overwrite: Overwrite = False,
) -> None:
    """Train a sweep of layers x units, each with the same budget: which model is better, do more layers help?

    The same --minutes ask what is best for your time; the same --characters, what is best for your text.
    """
    text = _text(data)
    from rich.console import Console

    from ..recipes.charlm import Shape
    from ..recipes.charlm_compare import compare as run
    from ..recipes.charlm_training import Settings

    max_steps = None if characters is None else max(1, characters // (streams * steps))
    settings = Settings(
        streams,
        steps,
        learning_rate,
        budget(minutes, max_steps, 1.0),
        max_steps,
        seed=seed,
        backend=backend.value,
        device=device.value,
    )
    base = Shape(cell.value, embedding=embedding, dropout=dropout)
    console = Console()
    run(
        text, base, _numbers(layers, "--layers"), _numbers(units, "--units"), settings, out,
        overwrite=overwrite, console=console,
    )  # fmt: skip
    console.print(f"Curves: {out / 'compare.png'}", soft_wrap=True, highlight=False)


def _text(data: Path | None) -> str:
    from ..recipes import texts

    return texts.shakespeare() if data is None else texts.read(data)


def _shape_to_begin_with(checkpoint: Path | None) -> Shape:
    """A resumed model keeps its shape: nobody should have to type it again."""
    from ..recipes.charlm import Checkpoint, Shape

    return Shape() if checkpoint is None else Checkpoint.read(checkpoint).shape


def _budget(settings: Settings) -> str:
    parts = [] if settings.minutes is None else [f"{settings.minutes:g} minutes"]
    parts += [] if settings.max_steps is None else [f"{settings.max_steps} steps"]
    return "at most " + " or ".join(parts)


def _numbers(listed: str, option: str) -> list[int]:
    """[1, 2, 3] from "1,2,3"."""
    try:
        numbers = [int(part) for part in listed.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise DataError(f"{option} is a list of numbers such as 1,2,3; got {listed!r}")
    return numbers
