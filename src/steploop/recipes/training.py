"""What the recipes' trainings share: a budget of minutes or steps, a learning rate that follows it, checkpoints that
are whole or not there, and what is shown on the way.
"""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from ..errors import DataError
from . import processes
from .checkpoints import BEST, publish

LAST = "last.ckpt"
NEVER = sys.maxsize  # steps


def check_settings(settings: Any, positive: Sequence[str]) -> None:
    """DataError that names every option whose value has no meaning. positive: those that must be above 0."""
    wrong = [
        f"--{name.replace('_', '-')} is above 0, got {value}"
        for name in positive
        if (value := getattr(settings, name)) is not None and value <= 0
    ]
    if settings.minutes is None and settings.max_steps is None:
        wrong.append("a run needs --minutes or --max-steps")
    if settings.device == "cuda" and not torch.cuda.is_available():
        wrong.append("--device cuda: torch finds no CUDA device here (steploop doctor tells more)")
    elif settings.device == "cuda" and settings.processes.here > torch.cuda.device_count():
        wrong.append(f"--devices {settings.processes.here}: torch finds {torch.cuda.device_count()} CUDA devices here")
    if wrong:
        raise DataError("; ".join(wrong))


class Clock:
    """Seconds since the run began (those before an interruption included), and those of training steps.

    elapsed: as of the last step, by the clock of the first process. All processes decide by it what they have to do
    together: stop, validate, lower the learning rate.
    """

    train_from: float  # when the last step began

    def __init__(self) -> None:
        self.start({})

    def start(self, before: dict[str, float]) -> None:
        self.elapsed = before.get("seconds", 0.0)
        self.begin = time.monotonic() - self.elapsed
        self.training = before.get("training_seconds", 0.0)

    def now(self) -> float:
        return time.monotonic() - self.begin


class Training(L.LightningModule):
    """A model in training: its budget, its optimizer, and what was measured on the way.

    settings: has minutes, max_steps, learning_rate, weight_decay and processes.
    criterion: the name of the number of `history` that is the lower, the better the model.
    validate_every: seconds from one validation to the next; None where steps are counted.
    """

    criterion = ""
    validate_every: float | None = None

    def __init__(self, settings: Any):
        super().__init__()
        self.settings = settings
        self.history: list[dict[str, float]] = []
        self.train_losses: list[float] = []
        self.clock = Clock()

    def describe(self, entry: dict[str, float]) -> str:
        """One line on one validation."""
        minutes, seconds = divmod(round(entry["seconds"]), 60)
        spent = f"{minutes:3d}:{seconds:02d}  step {entry['step']:6d}"
        return f"{spent}  train {entry['train_nats']:.4f}  {self.judged(entry)}"

    def judged(self, entry: dict[str, float]) -> str:
        """How good the model was, for that line."""
        raise NotImplementedError

    def check_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, whose mean over all processes is kept for the mean that the next validation shows.

        DataError, in every process, if that is not finite.
        """
        seconds = self.clock.now() if processes.leads() else 0.0
        total, self.clock.elapsed = processes.sums([loss.item(), seconds], loss.device)
        mean = total / processes.count()
        if not math.isfinite(mean):
            raise DataError(
                f"Training diverged: the loss of step {self.global_step} is {mean}.\n"
                f"  fix:      a lower --learning-rate (this run had {self.settings.learning_rate:g})"
            )
        self.train_losses.append(mean)
        return loss

    def measured(self) -> dict[str, float]:
        """What every entry of the history has: steps and seconds, and the mean loss since the last one."""
        losses, self.train_losses = self.train_losses or [math.nan], []
        return {
            "step": self.global_step,
            "seconds": self.clock.elapsed,
            "training_seconds": self.clock.training,
            "train_nats": sum(losses) / len(losses),
        }

    def on_fit_start(self) -> None:
        self.train_losses = []
        self.clock.start(self.history[-1] if self.history else {})
        self.since: float | None = None
        self.validate_every = processes.of_each(self.validate_every)[0]

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock.train_from = time.monotonic()

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.training += time.monotonic() - self.clock.train_from
        if self.progress() >= 1:
            self.trainer.should_stop = True
        if self.validate_every is not None:
            # From the first step after a validation, whose end is at another time in every process.
            self.since = self.clock.elapsed if self.since is None else self.since
            due = self.clock.elapsed - self.since >= self.validate_every
            self.trainer.val_check_batch = 1 if due else NEVER

    def on_validation_end(self) -> None:
        self.since = None

    def progress(self) -> float:
        """How much of the budget is spent: 0 at the start, 1 at the end."""
        spent = [0.0]
        if self.settings.minutes is not None:
            spent.append(self.clock.elapsed / (60 * self.settings.minutes))
        if self.settings.max_steps is not None:
            spent.append(self.global_step / self.settings.max_steps)
        return max(spent)

    def learning_rate(self, step: int) -> float:
        """As a share of the highest: it rises for 100 steps, and falls as a cosine to the end of the budget."""
        warm = min(1.0, (step + 1) / 100)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress()))))

    def trained_parameters(self) -> Any:
        return self.parameters()

    def configure_optimizers(self) -> Any:
        settings = self.settings
        optimizer = torch.optim.AdamW(
            self.trained_parameters(),
            settings.learning_rate,
            betas=(0.9, 0.99),
            fused=True,  # one pass over all weights: on a CPU it takes a fifth of the time
            weight_decay=settings.weight_decay,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Draws(L.Callback):
    """Keeps where torch's random numbers were: a resumed run draws (dropout) what an unbroken one would have drawn.

    Every process draws numbers of its own. One that was not there before the interruption begins with its own seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.kept: list[dict[str, torch.Tensor]] = []
        self.begun = False

    def state_dict(self) -> dict[str, list[dict[str, torch.Tensor]]]:
        on_cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
        return {"of_each": processes.of_each({"cpu": torch.get_rng_state(), **on_cuda})}

    def load_state_dict(self, state_dict: dict[str, list[dict[str, torch.Tensor]]]) -> None:
        self.kept = state_dict.get("of_each", [])

    def on_train_batch_start(self, *_: Any) -> None:
        """Not before the first batch: what stands before it (a DataLoader that begins) draws as well."""
        if self.begun:
            return
        self.begun, rank = True, processes.rank()
        if rank < len(self.kept):
            self._set(self.kept[rank])
        elif rank > 0:
            torch.manual_seed(self.seed + 1_000_003 * rank)

    def _set(self, kept: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(kept["cpu"].cpu())
        if "cuda" in kept and torch.cuda.is_available():
            torch.cuda.set_rng_state(kept["cuda"].cpu())


class Keep(L.Callback):
    """After each validation: last.ckpt, and best.ckpt where the criterion was the lowest so far."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        self._save(trainer, LAST)
        values = [entry[module.criterion] for entry in module.history]
        if values[-1] == min(values):
            self._save(trainer, BEST)

    def _save(self, trainer: L.Trainer, name: str) -> None:
        """A run that dies while it writes leaves the older file whole: a rename is all or nothing.

        All processes say what they have; the first one writes.
        """
        unfinished = self.folder / f"{name}.unfinished"
        try:
            trainer.save_checkpoint(unfinished)
            if processes.leads():
                publish(unfinished, self.folder / name)
        finally:
            if processes.leads():
                unfinished.unlink(missing_ok=True)


def _finish_keeping(folder: Path, values: list[float]) -> None:
    """A run that died between its two files has not kept its best one: it is what the run goes on from."""
    if values[-1] == min(values):
        unfinished = folder / f"{BEST}.unfinished"
        shutil.copyfile(folder / LAST, unfinished)
        publish(unfinished, folder / BEST)


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

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        self.task = self.bar.add_task("training", total=1.0, loss="")
        self.bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        loss = f"loss {outputs['loss'].item():.3f}"
        self.bar.update(self.task, completed=module.progress(), loss=loss)

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        self.console.print(module.describe(module.history[-1]), highlight=False, soft_wrap=True)

    def teardown(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        self.bar.stop()

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        self.bar.stop()
        if isinstance(exception, KeyboardInterrupt) and (self.folder / LAST).exists():
            self.console.print(f"Stopped. {self.folder / LAST} is kept: go on with --resume.")


def prepare(
    folder: Path,
    settings: Any,
    checked_history: Callable[[Path], list[dict[str, float]]],
    criterion: str,
    leave: Callable[[list[dict[str, float]]], None],
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Make sure that this run may write to `folder`, before anything is written.

    checked_history: the history of the checkpoint that a run goes on from; raises DataError for one of another model.
    criterion: as in Training.
    leave: writes what a run of that history leaves behind beside its checkpoints. One that was killed at its very end
        has not done so, and there is nothing left to train.
    """
    kept = [folder / name for name in (LAST, BEST) if (folder / name).exists()]
    if resume:
        history = checked_history(folder / LAST)
        if processes.leads():
            _finish_keeping(folder, [entry[criterion] for entry in history])
        if spent := _spent(settings, history[-1]):
            if processes.leads():
                leave(history)
            raise DataError(f"{folder / LAST} {spent}")
    elif kept and not overwrite:
        raise DataError(
            f"{kept[0]} is there already, and a new run would replace it.\n"
            "  fix:      --resume to train it further, --overwrite to replace it, or another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)


def _spent(settings: Any, last: dict[str, float]) -> str:
    """That a run has no budget left, and what to type; empty where it has."""
    if settings.minutes is not None and last["seconds"] >= 60 * settings.minutes:
        return (
            f"has been trained for {last['seconds'] / 60:.1f} minutes already.\n"
            f"  fix:      --resume with more than --minutes {settings.minutes:g}"
        )
    if settings.max_steps is not None and last["step"] >= settings.max_steps:
        return (
            f"has been trained for {last['step']} steps already.\n"
            f"  fix:      --resume with more than --max-steps {settings.max_steps}"
        )
    return ""


def write_plan(plan: Any, folder: Path) -> None:
    """What moves out of the model's loop, as text and as a page."""
    if processes.leads():
        (folder / "plan.txt").write_text(f"{plan}\n", encoding="utf-8")
        plan.save_html(folder / "plan.html")


def train(
    module: Training, folder: Path, validations: int, validation_seconds: float, *, resume: bool, console: Console
) -> None:
    """Run the training to its end with Lightning.

    validations: how many in a whole run; fewer where they would take more than a tenth of its time.
    validation_seconds: how long one takes.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    settings = module.settings
    if settings.minutes is not None:
        module.validate_every = max(60 * settings.minutes / validations, 10 * validation_seconds)
        every = NEVER  # until the clock says so
    else:
        every = max(1, settings.max_steps // validations)
    trainer = L.Trainer(
        accelerator=settings.device,
        devices=settings.processes.here,
        num_nodes=settings.processes.machines,
        strategy="auto" if settings.processes.count == 1 else DDPStrategy(broadcast_buffers=False),
        use_distributed_sampler=False,  # the data are shared out already
        max_epochs=-1,
        max_steps=settings.max_steps or -1,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=settings.clip,
        logger=[CSVLogger(folder, name="logs"), TensorBoardLogger(folder, name="tensorboard")],
        log_every_n_steps=10,
        callbacks=[Keep(folder), Draws(settings.seed), Show(console, folder)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        # Not for this run: nothing is there for workers to do, a resumed run begins at the right batch, and what
        # is in eval mode is so on purpose.
        warnings.filterwarnings("ignore", message=".*(does not have many workers|resumable|LeafSpec|in eval mode).*")
        last = folder / LAST
        processes.run(
            lambda: trainer.fit(module, ckpt_path=last if resume else None, weights_only=True),
            f"--resume goes on from {last}, once there is one",
        )
