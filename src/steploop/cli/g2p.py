"""The commands of the grapheme-to-phoneme recipe: `steploop train g2p`, `steploop g2p`, `steploop evaluate g2p`."""

from __future__ import annotations

import json as json_format
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError
from .options import (
    Backend,
    Cell,
    Device,
    Devices,
    Dropout,
    Overwrite,
    Resume,
    Seed,
    UsedBackend,
    UsedDevice,
    budget,
    finite,
    given,
)  # fmt: skip

if TYPE_CHECKING:
    from rich.table import Table

    from ..recipes.g2p import Checkpoint, Pronouncer, Pronunciation
    from ..recipes.g2p_scores import Scores
    from ..recipes.lexicon import Lexicon

MODEL = Path("runs/g2p/model.safetensors")
Data = Annotated[Path | None, typer.Option(help="A dictionary in CMUdict's format; without it, CMUdict.")]
UsedModel = Annotated[Path, typer.Option("--model", help="What `train g2p` wrote: .safetensors or .ckpt.")]
Beam = Annotated[int, typer.Option(min=1, help="Hypotheses that are followed side by side; 1: greedy search.")]


def train_g2p(
    data: Data = None,
    stress: Annotated[bool, typer.Option("--stress", help="Keep the stress digits of vowels: AH0, AH1, AH2.")] = False,
    out: Annotated[Path, typer.Option(file_okay=False, help="Checkpoints, logs and the curve go here.")] = Path(
        "runs/g2p"
    ),
    cell: Annotated[Cell | None, typer.Option(help="[default: lstm]")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Of the encoder and of the decoder. [default: 1]")] = None,
    units: Annotated[int | None, typer.Option(min=2, help="Per layer, an even number. [default: 256]")] = None,
    embedding: Annotated[int | None, typer.Option(min=1, help="Of letters and phonemes. [default: 64]")] = None,
    dropout: Dropout = None,
    batch: Annotated[int, typer.Option(min=1, help="Pairs of a word and a pronunciation in a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(callback=finite, help="The highest of the run.")] = 3e-3,
    smoothing: Annotated[float, typer.Option(min=0, max=0.99, callback=finite, help="Of the labels.")] = 0.1,
    minutes: Annotated[
        float | None, typer.Option(callback=finite, help="[default: 60, or none with --max-steps]")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Batches to train on, instead of a time.")] = None,
    seed: Seed = 1,
    backend: UsedBackend = Backend.auto,
    device: UsedDevice = Device.cpu,
    devices: Devices = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a model that pronounces words: letters in, phonemes out.

    90 % of the words are for training, 5 % tell how good the model is on the way, and 5 % are kept for `evaluate g2p`.
    The learning rate falls towards the end of --minutes (or --max-steps), and faster where the phoneme error rate
    of the dev words stays as it is; on --resume the budget counts from the very beginning.
    """
    if resume and overwrite:
        raise DataError("--resume keeps the model that --overwrite would replace: give one of them.")
    if units is not None and units % 2:
        raise DataError(f"--units is an even number: half of the encoder's read in each direction; got {units}")
    from ..recipes import processes
    from ..recipes.checkpoints import BEST
    from ..recipes.g2p import Checkpoint, Shape
    from ..recipes.g2p_training import WEIGHTS, Settings, fit
    from ..recipes.training import LAST

    before = Checkpoint.read(out / LAST) if resume else None
    lexicon = _lexicon(data, stress or (before is not None and before.symbols.stress))
    begun = Shape() if before is None else before.shape
    shape = given(begun, cell, layers=layers, units=units, embedding=embedding, dropout=dropout)
    settings = Settings(
        batch,
        learning_rate,
        budget(minutes, max_steps, 60.0),
        max_steps,
        smoothing,
        seed=seed,
        backend=backend.value,
        device=device.value,
        processes=processes.asked(devices),
    )
    from rich.console import Console

    console = Console(quiet=not processes.leads())
    console.print(f"{shape}; {_parts(lexicon)}.", highlight=False, soft_wrap=True)
    module = fit(lexicon, shape, settings, out, resume=resume, overwrite=overwrite, console=console)
    best = min(module.history, key=lambda entry: entry["dev_per"])
    console.print(
        f"Best on the dev words: PER {100 * best['dev_per']:.2f} %, WER {100 * best['dev_wer']:.2f} %.\n"
        f"  weights      {out / WEIGHTS}\n  checkpoints  {out / BEST}, {out / LAST}\n"
        f"  curve        {out / 'curve.png'}\n  plan         {out / 'plan.txt'}, {out / 'plan.html'}\n"
        f"  logs         {out / 'logs'}, {out / 'tensorboard'}\n"
        f"Try it:  steploop g2p --model {out / WEIGHTS} hello\n"
        f"         steploop evaluate g2p --model {out / WEIGHTS}",
        highlight=False,
        soft_wrap=True,
    )


def _lexicon(data: Path | None, stress: bool) -> Lexicon:
    from ..recipes.lexicon import Lexicon, cmudict

    return Lexicon.read(cmudict() if data is None else data, stress)


def _parts(lexicon: Lexicon) -> str:
    """How many words go where; DataError where a part has none."""
    parts = lexicon.parts
    for name, part in parts.items():
        if not len(part):
            raise DataError(
                f"The dictionary is too small: none of its {len(lexicon)} words falls into the {name} part.\n"
                "  fix:      more words; a hundred are few"
            )
    counts = ", ".join(f"{len(part):,} {name}" for name, part in parts.items())
    return f"{len(lexicon):,} words: {counts}"


# --- g2p --------------------------------------------------------------------------------------------------


def g2p(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="WORD...", help="Without any: one per line of the input.")
    ] = None,
    model: UsedModel = MODEL,
    n_best: Annotated[int, typer.Option(min=1, help="Pronunciations of each word, the likeliest first.")] = 1,
    beam: Beam = 8,
    alignment: Annotated[
        Path | None, typer.Option(help="Draw where the decoder looked, for the one word: a PNG, PDF or SVG.")
    ] = None,
    backend: UsedBackend = Backend.auto,
) -> None:
    """Print how words are pronounced: word, phonemes, log-probability, and "proved" where no other way is likelier.

    The columns are separated by tabs. A word with characters that the model has never seen is told on the error
    output, the others are said, and the exit code is 1.
    """
    if alignment is not None and len(words or []) != 1:
        raise DataError(f"--alignment draws the attention of one word; got {len(words or [])}")
    from ..recipes.g2p import Checkpoint, Pronouncer

    trained = Checkpoint.read(model)
    pronouncer = Pronouncer(trained.model(backend.value), trained.symbols, max(beam, n_best), n_best)
    all_said = True
    for chunk in [words] if words else _chunks_of_input():
        known = [word for word in chunk if _can_be_said(word, trained)]
        all_said = all_said and len(known) == len(chunk)
        for word, found in zip(known, pronouncer.say(known, weights=alignment is not None), strict=True):
            _print(word, found)
            if alignment is not None:
                _draw(word, found[0], alignment)
        sys.stdout.flush()
    if not all_said:
        raise typer.Exit(1)


def _chunks_of_input(size: int = 2048) -> Iterator[list[str]]:
    """Words of the standard input, one or more in a line; at a terminal each line is answered at once."""
    chunk: list[str] = []
    for line in sys.stdin:
        chunk += line.split()
        if len(chunk) >= size or sys.stdin.isatty():
            yield chunk
            chunk = []
    yield chunk


def _can_be_said(word: str, trained: Checkpoint) -> bool:
    """False, with a message on the error output, for a word that the model cannot read."""
    try:
        trained.symbols.spell(word)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    return True


def _print(word: str, found: list[Pronunciation]) -> None:
    for one in found:
        note = "proved" if one.proved else "" if one.finished else "cut"
        print(f"{word}\t{' '.join(one.phonemes)}\t{one.score:.4f}\t{note}".rstrip("\t"))


def _draw(word: str, best: Pronunciation, path: Path) -> None:
    from ..view import alignment

    alignment(best.weights, source=list(word.lower()), target=[*best.phonemes, "(end)"], title=word, path=path)
    print(f"The attention: {path}", file=sys.stderr)


# --- evaluate ---------------------------------------------------------------------------------------------


def evaluate_g2p(
    model: UsedModel = MODEL,
    data: Data = None,
    part: Annotated[str, typer.Option(help="The words to say: test, dev or train.")] = "test",
    beam: Beam = 8,
    most: Annotated[int, typer.Option("--confusions", min=0, help="How many of the commonest to show.")] = 15,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="For the picture and the numbers. [default: beside --model]")
    ] = None,
    backend: UsedBackend = Backend.auto,
) -> None:
    """Say words that the model was not trained on, and count the errors: greedily, and with a beam.

    PER: the edits from what was said to the closest of the word's pronunciations, over that one's phonemes. WER: the
    share of words that are said like none of their pronunciations.
    """
    from ..recipes.g2p import Checkpoint, Pronouncer
    from ..recipes.g2p_scores import draw_by_length
    from ..recipes.lexicon import PARTS

    if part not in PARTS:
        raise DataError(f"--part is one of {', '.join(PARTS)}; got {part!r}")
    trained = Checkpoint.read(model)
    lexicon = _lexicon(data, trained.symbols.stress)
    print(_parts(lexicon))
    loaded = trained.model(backend.value)
    table, scores = _table(part), {}
    for size in dict.fromkeys((1, beam)):
        name = "greedy" if size == 1 else f"beam {size}"
        begin = time.perf_counter()
        scores[name] = _score(Pronouncer(loaded, trained.symbols, size), lexicon.parts[part])
        _add_row(table, name, scores[name], time.perf_counter() - begin)
    from rich.console import Console

    console = Console()
    console.print(table)
    console.print(_confusion_table(name, scores[name], most))
    folder = model.parent if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    draw_by_length(scores, folder / f"{part}-by-length.png")
    numbers = {name: one.as_dict() for name, one in scores.items()}
    (folder / f"{part}-scores.json").write_text(json_format.dumps(numbers, indent=1), encoding="utf-8")
    console.print(
        f"By length: {folder / f'{part}-by-length.png'}\nNumbers:   {folder / f'{part}-scores.json'}",
        highlight=False,
        soft_wrap=True,
    )


def _score(pronouncer: Pronouncer, lexicon: Lexicon) -> Scores:
    from ..recipes.g2p_scores import Scores

    scores = Scores()
    words = [word for word in lexicon.entries if not pronouncer.symbols.unknown(word)]
    for word, (best, *_) in zip(words, pronouncer.say(words), strict=True):
        scores.add(word, best.phonemes, lexicon.entries[word])
    if left := len(lexicon) - len(words):
        print(f"{left} words are left out: the model has never seen some of their characters.", file=sys.stderr)
    return scores


def _table(part: str) -> Table:
    from rich.table import Table

    table = Table(title=f"The {part} words")
    for column in ("search", "PER %", "WER %", "words", "wrong", "seconds", "words/s"):
        table.add_column(column, justify="left" if column == "search" else "right")
    return table


def _add_row(table: Table, name: str, scores: Scores, seconds: float) -> None:
    rates = (f"{100 * scores.per:.2f}", f"{100 * scores.wer:.2f}")
    speed = scores.words / seconds
    table.add_row(name, *rates, f"{scores.words:,}", f"{scores.wrong:,}", f"{seconds:.1f}", f"{speed:,.0f}")


def _confusion_table(name: str, scores: Scores, most: int) -> Any:
    from rich.table import Table

    table = Table(title=f"The commonest confusions, {name} ({scores.edits:,} edits)")
    for column in ("right", "said", "times", "% of edits"):
        table.add_column(column, justify="left" if column in ("right", "said") else "right")
    for (right, said), count in scores.confusions.most_common(most):
        table.add_row(right, said, f"{count:,}", f"{100 * count / scores.edits:.1f}")
    return table
