"""Training the character model of charlm.py with Lightning: truncated backpropagation through time.

Each window goes on with the state in which the window before it ended, one entry per layer, and gradients
stop at the border between them. The learning rate follows a budget of minutes or of steps down to its end.
"""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as L
import matplotlib
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from torch.utils.data import DataLoader, IterableDataset

import steploop as sl

from ..errors import DataError
from . import texts
from .charlm import CharModel, Checkpoint, Shape, Streams, Window, bits, cross_entropy

matplotlib.use("Agg")  # only files are drawn, and a server has no display
from matplotlib import pyplot  # noqa: E402

LAST, BEST = "last.ckpt", "best.ckpt"
VALIDATIONS = 10  # in a whole run; fewer where they would take more than a tenth of its time
VALIDATION_STEPS = 256  # longer windows give the same loss in fewer calls
VALIDATION_STREAM = 8192  # characters; the first of a stream, read without a past, must not count for much


@dataclass(frozen=True)
class Settings:
    """How a model is trained. A run ends after `minutes` (validation included) or `max_steps`.

    device: "cpu" or "cuda", where the model is trained.
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

    def __post_init__(self):
        wrong = [
            f"--{name.replace('_', '-')} is above 0, got {value}"
            for name in ("streams", "steps", "learning_rate", "minutes", "max_steps")
            if (value := getattr(self, name)) is not None and value <= 0
        ]
        if self.minutes is None and self.max_steps is None:
            wrong.append("a run needs --minutes or --max-steps")
        if self.device == "cuda" and not torch.cuda.is_available():
            wrong.append("--device cuda: torch finds no CUDA device here (steploop doctor tells more)")
        if wrong:
            raise DataError("; ".join(wrong))


class Endless(IterableDataset):
    """Window after window, beginning with the one that the trainer has not yet taken a step on."""

    def __init__(self, streams: Streams, module: L.LightningModule):
        self.streams, self.module = streams, module

    def __iter__(self) -> Iterator[Window]:
        k = self.module.global_step
        while True:
            yield self.streams.window(k)
            k += 1


class CharTraining(L.LightningModule):
    """Everything that Lightning asks of a model: losses, optimizer, data and what to keep."""

    def __init__(self, shape: Shape, vocabulary: texts.Vocabulary, text: str, settings: Settings):
        super().__init__()
        self.shape, self.vocabulary, self.settings = shape, vocabulary, settings
        self.loop = sl.Loop(CharModel(len(vocabulary), shape), backend=settings.backend)
        train, validation = texts.split(text)
        self.train_streams = Streams(
            vocabulary.encode(train), settings.streams, settings.steps, seed=settings.seed
        )
        numbers = vocabulary.encode(validation)
        streams = max(1, min(settings.streams, len(numbers) // VALIDATION_STREAM))
        self.validation_streams = Streams(numbers, streams, VALIDATION_STEPS)
        self.state: sl.States | None = None
        self.validation_state: sl.States | None = None
        self.history: list[dict[str, float]] = []
        self.clock = Clock()

    # -- losses

    def training_step(self, window: Window, _index: int) -> torch.Tensor:
        before = None if window.fresh or self.state is None else self.state.to(window.inputs.device)
        logits, state = self.loop(window.inputs, state=before)
        self.state = state.detach()
        loss = cross_entropy(logits, window.targets)
        if not loss.isfinite():
            raise DataError(
                f"Training diverged: the loss of step {self.global_step} is {loss.item()}.\n"
                f"  fix:      a lower --learning-rate (this run had {self.settings.learning_rate:g})"
            )
        self.train_losses.append(loss.detach())
        self.log("train_nats", loss, prog_bar=True)
        return loss

    def validation_step(self, window: Window, _index: int) -> None:
        state = None if window.fresh else self.validation_state
        logits, self.validation_state = self.loop(window.inputs, state=state)
        self.validation_sum += cross_entropy(logits, window.targets, reduction="sum").item()
        self.validation_characters += window.targets.numel()

    def on_fit_start(self) -> None:
        self.train_losses: list[torch.Tensor] = []
        self.clock.start(self.history[-1] if self.history else {})

    def on_train_batch_start(self, *_) -> None:
        self.clock.train_from = time.monotonic()

    def on_train_batch_end(self, *_) -> None:
        self.clock.training += time.monotonic() - self.clock.train_from
        if self.progress() >= 1:
            self.trainer.should_stop = True

    def on_validation_epoch_start(self) -> None:
        self.validation_state, self.validation_sum, self.validation_characters = None, 0.0, 0

    def on_validation_epoch_end(self) -> None:
        nats = self.validation_sum / self.validation_characters
        losses = self.train_losses or [torch.tensor(math.nan)]
        characters = self.global_step * self.settings.streams * self.settings.steps
        entry = {
            "step": self.global_step,
            "characters": characters,
            "seconds": self.clock.elapsed(),
            "training_seconds": self.clock.training,
            "train_nats": torch.stack(losses).mean().item(),
            "val_nats": nats,
            "val_bits_per_character": bits(nats),
        }
        self.history.append(entry)
        self.train_losses = []
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

    # -- the optimizer and its schedule

    def progress(self) -> float:
        """How much of the budget is spent: 0 at the start, 1 at the end."""
        spent = [0.0]
        if self.settings.minutes is not None:
            spent.append(self.clock.elapsed() / (60 * self.settings.minutes))
        if self.settings.max_steps is not None:
            spent.append(self.global_step / self.settings.max_steps)
        return max(spent)

    def configure_optimizers(self) -> dict:
        settings = self.settings
        optimizer = torch.optim.AdamW(
            self.parameters(), settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
        )

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / 100)
            return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress()))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- data

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Endless(self.train_streams, self), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(list(self.validation_streams.one_pass()), batch_size=None)

    # -- checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["charlm"] = Checkpoint.card(self.shape, self.vocabulary, self.history)
        checkpoint["charlm"]["state"] = None if self.state is None else dict(self.state)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        card = checkpoint["charlm"]
        self.history = list(card["history"])
        self.state = None if card["state"] is None else sl.States(card["state"])


class Clock:
    """Seconds since the run began (those before an interruption included), and those of training steps."""

    def __init__(self):
        self.start({})

    def start(self, before: dict[str, float]) -> None:
        self.begin = time.monotonic() - before.get("seconds", 0.0)
        self.training = before.get("training_seconds", 0.0)

    def elapsed(self) -> float:
        return time.monotonic() - self.begin


class Keep(L.Callback):
    """After each validation: last.ckpt, and best.ckpt where the loss was the lowest so far."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_validation_end(self, trainer: L.Trainer, module: CharTraining) -> None:
        self._save(trainer, LAST)
        losses = [entry["val_nats"] for entry in module.history]
        if losses[-1] == min(losses):
            self._save(trainer, BEST)

    def _save(self, trainer: L.Trainer, name: str) -> None:
        """A run that dies while it writes leaves the older file whole: a rename is all or nothing."""
        unfinished = self.folder / f"{name}.unfinished"
        try:
            trainer.save_checkpoint(unfinished)
            os.replace(unfinished, self.folder / name)
        finally:
            unfinished.unlink(missing_ok=True)


class Show(L.Callback):
    """A progress bar where there is a terminal, and a line after each validation everywhere."""

    def __init__(self, console: Console, folder: Path):
        self.console, self.folder = console, folder
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def on_fit_start(self, trainer: L.Trainer, module: CharTraining) -> None:
        self.task = self.bar.add_task("training", total=1.0, loss="")
        self.bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, module: CharTraining, outputs, *_) -> None:
        loss = f"loss {outputs['loss'].item():.3f}"
        self.bar.update(self.task, completed=module.progress(), loss=loss)

    def on_validation_end(self, trainer: L.Trainer, module: CharTraining) -> None:
        self.console.print(describe(module.history[-1]), highlight=False, soft_wrap=True)

    def teardown(self, trainer: L.Trainer, module: CharTraining, stage: str) -> None:
        self.bar.stop()

    def on_exception(self, trainer: L.Trainer, module: CharTraining, exception: BaseException) -> None:
        self.bar.stop()
        if isinstance(exception, KeyboardInterrupt) and (self.folder / LAST).exists():
            self.console.print(f"Stopped. {self.folder / LAST} is kept: go on with --resume.")


def describe(entry: dict[str, float]) -> str:
    """One line on one validation."""
    minutes, seconds = divmod(round(entry["seconds"]), 60)
    return (
        f"{minutes:3d}:{seconds:02d}  step {entry['step']:6d}  train {entry['train_nats']:.4f}  "
        f"validation {entry['val_nats']:.4f} nats = {entry['val_bits_per_character']:.4f} bits per character"
    )


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
    prepare(folder, shape, vocabulary, settings, resume=resume, overwrite=overwrite)
    L.seed_everything(settings.seed, verbose=False)
    module = CharTraining(shape, vocabulary, text, settings).to(settings.device)
    plan = module.loop.plan(module.train_streams.window(0).inputs.to(settings.device))
    (folder / "plan.txt").write_text(f"{plan}\n", encoding="utf-8")
    plan.save_html(folder / "plan.html")
    trainer = make_trainer(folder, settings, module.validation_seconds(), console or Console())
    with warnings.catch_warnings():
        # Not for this run: there is nothing for workers to do, and a resumed run begins at the right window.
        warnings.filterwarnings("ignore", message=".*(does not have many workers|resumable|LeafSpec).*")
        trainer.fit(module, ckpt_path=folder / LAST if resume else None, weights_only=True)
    draw(str(shape), module.history, folder / "curve.png")
    return module


def prepare(
    folder: Path,
    shape: Shape,
    vocabulary: texts.Vocabulary,
    settings: Settings,
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Make sure that this run may write to `folder`, before anything is written."""
    kept = [folder / name for name in (LAST, BEST) if (folder / name).exists()]
    if resume:
        last = Checkpoint.read(folder / LAST)
        last.check_same(shape, vocabulary)
        spent = last.history[-1]
        if settings.minutes is not None and spent["seconds"] >= 60 * settings.minutes:
            raise DataError(
                f"{last.path} has been trained for {spent['seconds'] / 60:.1f} minutes already.\n"
                f"  fix:      --resume with more than --minutes {settings.minutes:g}"
            )
        if settings.max_steps is not None and spent["step"] >= settings.max_steps:
            raise DataError(
                f"{last.path} has been trained for {spent['step']} steps already.\n"
                f"  fix:      --resume with more than --max-steps {settings.max_steps}"
            )
    elif kept and not overwrite:
        raise DataError(
            f"{kept[0]} is there already, and a new run would replace it.\n"
            "  fix:      --resume to train it further, --overwrite to replace it, or another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)


def make_trainer(folder: Path, settings: Settings, validation: float, console: Console) -> L.Trainer:
    """Lightning's Trainer. validation: how many seconds one validation takes."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if settings.minutes is not None:
        every: timedelta | int = timedelta(seconds=max(60 * settings.minutes / VALIDATIONS, 10 * validation))
    else:
        every = max(1, settings.max_steps // VALIDATIONS)
    return L.Trainer(
        accelerator=settings.device,
        devices=1,
        max_epochs=-1,
        max_steps=settings.max_steps or -1,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=settings.clip,
        logger=[CSVLogger(folder, name="logs"), TensorBoardLogger(folder, name="tensorboard")],
        log_every_n_steps=10,
        callbacks=[Keep(folder), Show(console, folder)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


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
