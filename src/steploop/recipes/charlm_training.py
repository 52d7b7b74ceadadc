"""Training the character model of charlm.py with Lightning: truncated backpropagation through time.

Each window goes on with the state in which the window before it ended, one entry per layer, and gradients
stop at the border between them. The learning rate follows a budget of minutes or of steps down to its end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import matplotlib
import torch
from rich.console import Console
from torch.utils.data import DataLoader, Dataset, IterableDataset

import steploop as sl

from ..errors import DataError
from . import processes, texts
from .charlm import CharModel, Checkpoint, Shape, Streams, Window, bits, cross_entropy
from .checkpoints import BEST
from .processes import Processes
from .training import Training, check_settings, prepare, train, write_plan

matplotlib.use("Agg")  # only files are drawn, and a server has no display
from matplotlib import pyplot  # noqa: E402

WEIGHTS = "model.safetensors"
VALIDATIONS = 10  # in a whole run; fewer where they would take more than a tenth of its time
VALIDATION_STEPS = 256  # longer windows give the same loss in fewer calls
VALIDATION_STREAM = 8192  # characters; the first of a stream, read without a past, must not count for much


@dataclass(frozen=True)
class Settings:
    """How a model is trained. A run ends after `minutes` (validation included) or `max_steps`.

    device: "cpu" or "cuda", where the model is trained.
    processes: those that train together, each with its share of the streams.
    """

    streams: int = 64
    steps: int = 64
    learning_rate: float = 4e-3
    minutes: float | None = 9.0
    max_steps: int | None = None
    clip: float = 1.0
    weight_decay: float = 0.01
    seed: int = 1
    backend: str = "auto"
    device: str = "cpu"
    processes: Processes = Processes()

    def __post_init__(self) -> None:
        check_settings(self, ("streams", "steps", "learning_rate", "minutes", "max_steps"))
        if self.streams % self.processes.count:
            raise DataError(
                f"--streams {self.streams} can't be shared by {self.processes.count} processes.\n"
                f"  fix:      a multiple of {self.processes.count}"
            )


class Endless(IterableDataset[Window]):
    """Window after window, beginning with the one that the trainer has not yet taken a step on: of each, this process's
    share of the streams."""

    def __init__(self, streams: Streams, module: L.LightningModule):
        self.streams, self.module = streams, module

    def __iter__(self) -> Iterator[Window]:
        k = self.module.global_step
        while True:
            yield self.streams.window(k).share(processes.rank(), processes.count())
            k += 1


class CharTraining(Training):
    """Everything that Lightning asks of a model: losses, data and what to keep."""

    criterion = "val_nats"

    def __init__(self, shape: Shape, vocabulary: texts.Vocabulary, text: str, settings: Settings):
        super().__init__(settings)
        self.shape, self.vocabulary = shape, vocabulary
        self.loop = sl.Loop(CharModel(len(vocabulary), shape), backend=settings.backend)
        train, validation = texts.split(text)
        self.train_streams = Streams(
            vocabulary.encode(train), settings.streams, settings.steps, seed=settings.seed, whole=len(text)
        )
        numbers = vocabulary.encode(validation)
        streams = max(1, min(settings.streams, len(numbers) // VALIDATION_STREAM))
        self.validation_streams = Streams(numbers, streams, VALIDATION_STEPS)
        self.state: sl.States | None = None
        self.validation_state: sl.States | None = None

    # -- losses

    def training_step(self, window: Window, _index: int) -> torch.Tensor:
        before = None if window.fresh or self.state is None else self.state.to(window.inputs.device)
        logits, state = self.loop(window.inputs, state=before)
        self.state = state.detach()
        loss = self.check_loss(cross_entropy(logits, window.targets))
        self.log("train_nats", loss, prog_bar=True)
        return loss

    def validation_step(self, window: Window, _index: int) -> None:
        if not window.inputs.shape[1]:
            return  # fewer streams than processes
        state = None if window.fresh else self.validation_state
        logits, self.validation_state = self.loop(window.inputs, state=state)
        self.validation_sum += cross_entropy(logits, window.targets, reduction="sum").item()
        self.validation_characters += window.targets.numel()

    def on_validation_epoch_start(self) -> None:
        self.validation_state, self.validation_sum, self.validation_characters = None, 0.0, 0

    def on_validation_epoch_end(self) -> None:
        total = [self.validation_sum, self.validation_characters]
        nats, characters = processes.sums(total, self.device)
        nats /= characters
        entry = {
            **self.measured(),
            "characters": self.global_step * self.settings.streams * self.settings.steps,
            "val_nats": nats,
            "val_bits_per_character": bits(nats),
        }
        self.history.append(entry)
        self.log_dict({name: value for name, value in entry.items() if name.startswith("val")})

    @torch.no_grad()
    def validation_seconds(self) -> float:
        """About how long one validation takes; the first of the two calls is the one that captures."""
        inputs = self.validation_streams.window(0).inputs.to(self.settings.device)
        self.eval()
        for _ in range(2):
            begin = time.monotonic()
            self.loop(inputs)[0].sum().item()  # a device is waited for
        self.train()
        return self.validation_streams.windows * (time.monotonic() - begin)

    def judged(self, entry: dict[str, float]) -> str:
        bits = entry["val_bits_per_character"]
        return f"validation {entry['val_nats']:.4f} nats = {bits:.4f} bits per character"

    # -- data

    def train_dataloader(self) -> DataLoader[Window]:
        return DataLoader(Endless(self.train_streams, self), batch_size=None)

    def val_dataloader(self) -> DataLoader[Window]:
        share = processes.rank(), processes.count()
        windows = [window.share(*share) for window in self.validation_streams.one_pass()]
        return DataLoader(cast("Dataset[Window]", windows), batch_size=None)

    # -- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["charlm"] = Checkpoint.card(self.shape, self.vocabulary, self.history)
        state = None if self.state is None else dict(self.state.to("cpu"))
        shares = processes.of_each(state)
        checkpoint["charlm"]["state"] = state and {
            name: processes.joined([share[name] for share in shares if share]) for name in state
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        card = checkpoint["charlm"]
        self.history = list(card["history"])
        state = card["state"]
        self.state = state and sl.States({name: processes.share(rows) for name, rows in state.items()})


def fit(
    text: str,
    shape: Shape,
    settings: Settings,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> CharTraining:
    """Train on 90 % of a text, validate on the rest; checkpoints, logs, curve and plan go to `folder`.

    resume: go on from the folder's last.ckpt.  overwrite: a model that is there may be replaced (its files
    stay until this run's first validation).  Raises DataError for a text, folder or checkpoint that
    does not fit.
    """
    vocabulary = texts.Vocabulary.of(text)

    def checked_history(path: Path) -> list[dict[str, float]]:
        last = Checkpoint.read(path)
        last.check_same(shape, vocabulary)
        return last.history

    def leave(history: list[dict[str, float]]) -> None:
        Checkpoint.read(folder / BEST).save_weights(folder / WEIGHTS)
        draw(str(shape), history, folder / "curve.png")

    prepare(folder, settings, checked_history, CharTraining.criterion, leave, resume=resume, overwrite=overwrite)
    L.seed_everything(settings.seed, verbose=False)
    module = CharTraining(shape, vocabulary, text, settings).to(settings.device)
    if settings.backend != "reference":  # the plain Python loop has no plan
        write_plan(module.loop.plan(module.train_streams.window(0).inputs.to(settings.device)), folder)
    train(module, folder, VALIDATIONS, module.validation_seconds(), resume=resume, console=console or Console())
    if processes.leads():
        leave(module.history)
    return module


def draw(name: str, history: list[dict[str, float]], path: Path) -> None:
    """Both losses against the characters read, as a PNG."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    characters = [entry["characters"] / 1e6 for entry in history]
    axes.plot(
        characters, [entry["val_nats"] for entry in history], "o-", markersize=3, label="validation text"
    )
    axes.plot(
        characters, [entry["train_nats"] for entry in history], "--", label="training text, with dropout"
    )
    axes.set_title(name)
    axes.set_xlabel("characters read (millions)")
    axes.set_ylabel("loss (nats per character)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
