"""`steploop sample`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import DataError
from .messages import complain
from .options import Backend, UsedBackend, finite


def sample(
    checkpoint: Annotated[Path, typer.Option(help="What `train charlm` wrote.")] = Path("runs/charlm/best.ckpt"),
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "\n",
    length: Annotated[int, typer.Option(min=0, help="Characters to write.")] = 500,
    temperature: Annotated[
        float, typer.Option(callback=finite, help="Below 1 bolder, above 1 wilder; 0: always the likeliest.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest only; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(callback=finite, help="Draw from the likeliest with this probability together.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The same seed writes the same text. [default: random]")
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option("--interactive", help="Read a prompt per line of input; what was said is remembered."),
    ] = False,
    backend: UsedBackend = Backend.auto,
) -> None:
    """Continue a prompt, character by character."""
    import torch

    from ..recipes.charlm import Checkpoint, Choice, Writer

    trained = Checkpoint.read(checkpoint)
    choice = Choice(temperature, top_k, top_p)
    model = trained.model(backend.value)
    writer = Writer(model, trained.vocabulary, choice, torch.seed() % 2**31 if seed is None else seed)
    with _one_thread():
        if interactive:
            _converse(writer, length)
        else:
            writer.read(prompt)
            _print_as_it_comes(prompt.lstrip("\n"), writer.write(length))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A row at a time is too little work to share; and sums in one order write one text for a seed."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _converse(writer: Any, length: int) -> None:
    """A prompt per line, until the input ends. A line that cannot be read is told and forgotten."""
    at_terminal = sys.stdin.isatty()
    while True:
        if at_terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        prompt = line.rstrip("\r\n")
        try:
            writer.read(prompt)
            _print_as_it_comes("" if at_terminal else prompt, writer.write(length))
        except DataError as error:
            complain(str(error))


def _print_as_it_comes(prompt: str, characters: Any) -> None:
    print(prompt, end="", flush=True)
    for character in characters:
        print(character, end="", flush=True)
    print(flush=True)
