"""Training the model of g2p.py with Lightning.

A batch has words of like lengths. The phoneme error rate of the dev words decides which model is kept, when the
learning rate is halved, and when training ends before its time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, IterableDataset

import steploop as sl

from . import processes
from .checkpoints import BEST
from .g2p import Checkpoint, Model, Pronouncer, Shape
from .g2p_scores import Scores
from .lexicon import Lexicon, Symbols
from .processes import Processes
from .training import Training, check_settings, prepare, train, write_plan

VALIDATIONS = 20  # in a whole run; fewer where they would take more than a tenth of its time
PATIENCE = 2  # validations without a better PER, after which the learning rate is halved
ENOUGH = 6  # validations without a better PER, after which training ends
WEIGHTS = "model.safetensors"
IGNORED = -100  # a target that counts for nothing


@dataclass(frozen=True)
class Settings:
    """How a model is trained. A run ends after `minutes` (validation included) or `max_steps`.

    batch: word and pronunciation pairs.  processes: those that train together, each with its share of a batch.
    smoothing: of the labels (Szegedy et al. 2016).
    averaging: of the weights that are validated and kept; what is left of a weight's average after a step.
    """

    batch: int = 64
    learning_rate: float = 3e-3
    minutes: float | None = 60.0
    max_steps: int | None = None
    smoothing: float = 0.1
    averaging: float = 0.998
    clip: float = 1.0
    weight_decay: float = 0.01
    seed: int = 1
    backend: str = "auto"
    device: str = "cpu"
    processes: Processes = Processes()

    def __post_init__(self) -> None:
        check_settings(self, ("batch", "learning_rate", "minutes", "max_steps"))


class Endless(IterableDataset[Any]):
    """Batch after batch, beginning with the one that the trainer has not yet taken a step on.

    Each pass has batches of its own, a function of seed and pass: a resumed run reads what the interrupted one
    would have read. Of each batch this process's share: (letters, phonemes, scale). The sum of the losses of a share,
    times its scale, has as its mean over all processes the mean loss of the whole batch's phonemes.
    """

    def __init__(self, pairs: list[tuple[Tensor, Tensor]], settings: Settings, module: L.LightningModule):
        self.pairs, self.module = pairs, module
        lengths = torch.tensor([[len(part) for part in pair] for pair in pairs])
        # (All the batches, of which each process then takes a part: the sampler would share out whole ones.)
        self.sampler = sl.seq2seq.samplers.LengthBatchSampler(
            lengths, settings.batch, seed=settings.seed, rank=0, replicas=1
        )
        self.batches = -(-len(pairs) // settings.batch)

    def __iter__(self) -> Iterator[Any]:
        which_pass, done = divmod(self.module.global_step, self.batches)
        while True:
            self.sampler.set_epoch(which_pass)
            for batch in self.sampler.batches()[done:]:
                yield self._share([self.pairs[k] for k in batch])
            which_pass, done = which_pass + 1, 0

    @staticmethod
    def _share(batch: list[tuple[Tensor, Tensor]]) -> tuple[Any, Any, float]:
        """Where the last batch has fewer pairs than there are processes, one without any reads a pair for nothing."""
        scale = processes.count() / sum(len(said) for _, said in batch)
        share = processes.share(batch)
        letters, said = sl.seq2seq.buckets.pad_to_longest(share or batch[:1])
        return letters, said, scale if share else 0.0


class G2PTraining(Training):
    """Everything that Lightning asks of a model: losses, optimizer, data and what to keep.

    `average` has the mean of the last weights, which is what is validated and used; the early ones are soon forgotten.
    """

    criterion = "dev_per"

    def __init__(self, shape: Shape, lexicon: Lexicon, symbols: Symbols, settings: Settings):
        super().__init__(settings)
        self.shape, self.symbols = shape, symbols
        self.model = Model(len(symbols.letters) + 1, len(symbols.phonemes) + 1, shape, settings.backend)
        self.average = AveragedModel(self.model, multi_avg_fn=self._average)
        self.average.eval().requires_grad_(False)
        parts = lexicon.parts
        pairs = [(symbols.spell(word), symbols.say(said)) for word, said in parts["train"].pairs()]
        self.batches = Endless(pairs, settings, self)
        self.dev = parts["dev"].entries

    def _average(
        self,
        averages: tuple[Tensor, ...] | list[Tensor],
        weights: tuple[Tensor, ...] | list[Tensor],
        count: Tensor | int,
    ) -> None:
        count = int(count)
        kept = min(self.settings.averaging, (1 + count) / (10 + count))
        torch._foreach_lerp_(averages, weights, 1 - kept)

    # -- losses

    def training_step(self, batch: Any, _index: int) -> Tensor:
        letters, said, scale = batch
        scores = self.model(letters.values, letters.lengths, said.values, said.lengths)
        valid = torch.arange(len(said.values), device=scores.device)[:, None] < said.lengths
        targets = torch.where(valid, said.values, IGNORED)
        loss = scale * F.cross_entropy(
            scores.flatten(0, 1),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.settings.smoothing,
        )
        self.log("train_nats", loss)
        return self.check_loss(loss)

    def optimizer_step(self, *arguments: Any, **more: Any) -> None:
        super().optimizer_step(*arguments, **more)
        self.average.update_parameters(self.model)

    def on_train_batch_end(self, *arguments: Any) -> None:
        super().on_train_batch_end(*arguments)
        if self.ended_early():
            self.trainer.should_stop = True

    def pronouncer(self) -> Pronouncer:
        return Pronouncer(cast(Model, self.average.module.eval()), self.symbols)

    def on_validation_epoch_start(self) -> None:
        self.scores = Scores()

    def validation_step(self, words: list[str], _index: int) -> None:
        said = self.pronouncer().say(words) if words else []
        for word, (best,) in zip(words, said, strict=True):
            self.scores.add(word, best.phonemes, self.dev[word])

    def on_validation_epoch_end(self) -> None:
        self.scores = Scores.joined(processes.of_each(self.scores))
        entry = {
            **self.measured(),
            **self.budget(),
            "words": self.global_step * self.settings.batch,
            "dev_per": self.scores.per,
            "dev_wer": self.scores.wer,
        }
        self.history.append(entry)
        self.log_dict({name: value for name, value in entry.items() if name.startswith("dev")})

    def validation_seconds(self) -> float:
        """About how long one validation takes; the first of the two calls is the one that captures."""
        words = sorted(self.dev, key=len)[len(self.dev) // 2 :][:256]
        for _ in range(2):
            begin = time.monotonic()
            self.pronouncer().say(words)
            seconds = time.monotonic() - begin
        return seconds * len(self.dev) / max(1, len(words))

    def judged(self, entry: dict[str, float]) -> str:
        return f"dev PER {100 * entry['dev_per']:.2f} %  WER {100 * entry['dev_wer']:.2f} %"

    # -- the optimizer and its schedule

    def without_gain(self) -> int:
        """How many validations ago the dev PER was the lowest."""
        values = [entry["dev_per"] for entry in self.history]
        return len(values) - 1 - values.index(min(values)) if values else 0

    def ended_early(self) -> bool:
        """Whether the dev PER has not fallen for so long that training ends.

        Validations of an earlier, smaller budget do not count: who resumes with a larger one wants to go on.
        """
        budget = self.budget()
        same = [budget.items() <= entry.items() for entry in self.history]
        return min(self.without_gain(), sum(same)) >= ENOUGH

    def budget(self) -> dict[str, float]:
        return {"minutes": self.settings.minutes or 0, "max_steps": self.settings.max_steps or 0}

    def halvings(self) -> int:
        """How often PATIENCE validations in a row brought nothing."""
        count, lowest, waited = 0, float("inf"), 0
        for entry in self.history:
            waited = 0 if entry["dev_per"] < lowest else waited + 1
            lowest = min(lowest, entry["dev_per"])
            if waited == PATIENCE:
                count, waited = count + 1, 0
        return count

    def learning_rate(self, step: int) -> float:
        return super().learning_rate(step) * 0.5 ** self.halvings()

    def trained_parameters(self) -> Any:
        return self.model.parameters()

    # -- data

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None)

    def val_dataloader(self) -> DataLoader[list[str]]:
        words = processes.share(sorted(self.dev, key=len))
        batches = [words[k : k + 256] for k in range(0, len(words), 256)] or [words]
        return DataLoader(cast("Dataset[list[str]]", batches), batch_size=None)

    # -- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["g2p"] = Checkpoint.card(self.shape, self.symbols, self.history)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = list(checkpoint["g2p"]["history"])


def fit(
    lexicon: Lexicon,
    shape: Shape,
    settings: Settings,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> G2PTraining:
    """Train on a dictionary's train part, validate on its dev part; checkpoints, logs, curve and plan go to `folder`.

    resume: go on from the folder's last.ckpt.  overwrite: a model that is there may be replaced (its files
    stay until this run's first validation).  Raises DataError for a dictionary, folder or checkpoint that
    does not fit.
    """
    symbols = Symbols.of(lexicon)

    def checked_history(path: Path) -> list[dict[str, float]]:
        last = Checkpoint.read(path)
        last.check_same(shape, symbols)
        return last.history

    def leave(history: list[dict[str, float]]) -> None:
        Checkpoint.read(folder / BEST).save_weights(folder / WEIGHTS)
        draw(str(shape), history, folder / "curve.png")

    prepare(folder, settings, checked_history, G2PTraining.criterion, leave, resume=resume, overwrite=overwrite)
    L.seed_everything(settings.seed, verbose=False)
    module = G2PTraining(shape, lexicon, symbols, settings).to(settings.device)
    if settings.backend != "reference":  # the plain Python loop has no plan
        write_plan(_plan(module), folder)
    console = console or Console()
    train(module, folder, VALIDATIONS, module.validation_seconds(), resume=resume, console=console)
    if module.ended_early():
        console.print(f"The dev PER has not fallen for {ENOUGH} validations: training ends before its time.")
    if processes.leads():
        leave(module.history)
    return module


def _plan(module: G2PTraining) -> Any:
    """What moved out of the decoder's loop."""
    letters, said = ([part.to(module.device) for part in padded] for padded in next(iter(module.batches))[:2])
    memory = module.model.encoder(*letters)
    return module.model.decoder.plan(said[0], memory=memory, memory_lengths=letters[1], lengths=said[1])


def draw(name: str, history: list[dict[str, float]], path: Path) -> None:
    """Both error rates against the words read, as a PNG."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    words = [entry["words"] / 1e6 for entry in history]
    for key, label in (("dev_wer", "words"), ("dev_per", "phonemes")):
        axes.plot(words, [100 * entry[key] for entry in history], "o-", markersize=3, label=label)
    axes.set_title(name)
    axes.set_xlabel("words read (millions)")
    axes.set_ylabel("error rate on the dev words (%)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
