"""A character language model: embedding -> stacked GRU or LSTM -> linear head, as ONE step.

The model reads one character and gives the scores of the next. It is written as one time step; `sl.Loop` runs
it over a window of text, and moves the embedding, the input products and the head out of the loop.
Training is in charlm_training.py; the text and the vocabulary in texts.py.

Vocabulary size V, streams B, window length T, all tensors time-major.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steploop as sl

from ..errors import DataError
from .checkpoints import read_checkpoint, save_weights
from .shape import CELLS, ModelShape
from .texts import Vocabulary

FORMAT = "steploop charlm 1"


@dataclass(frozen=True)
class Shape(ModelShape):
    """The sizes of a character model."""

    layers: int = 2
    embedding: int = 128


class CharModel(sl.Step):
    """One character in, the scores of the next one out.

    step: x (B,) int64, a character's number -> (B, V) logits. Dropout stands between the layers and at both
    ends (Zaremba et al. 2014, arXiv:1409.2329), never between a layer and its own past.
    """

    def __init__(self, characters: int, shape: Shape):
        super().__init__()
        self.embedding = nn.Embedding(characters, shape.embedding)
        parts: list[sl.Step] = [sl.nn.Dropout(shape.dropout)]
        for layer in range(shape.layers):
            inputs = shape.embedding if layer == 0 else shape.units
            parts += [CELLS[shape.cell](inputs, shape.units), sl.nn.Dropout(shape.dropout)]
        self.layers = sl.nn.Stack(*parts)
        self.head = nn.Linear(shape.units, characters)
        self._initialise()

    def step(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(x)))

    def _initialise(self) -> None:
        """Orthogonal hidden products, gate by gate (Saxe et al. 2014): early training is markedly faster."""
        for name, parameter in self.layers.named_parameters():
            if name.endswith("weight_hh"):
                for gate in parameter.data.split(parameter.shape[1]):
                    nn.init.orthogonal_(gate)


class Window(NamedTuple):
    """T characters of B streams, and the characters that follow them: both (T, B) int64."""

    inputs: Tensor
    targets: Tensor
    fresh: bool  # the streams begin here: no state is carried into this window

    def share(self, rank: int, count: int) -> Window:
        """The streams that process `rank` of `count` takes."""
        return Window(self.inputs[:, rank::count], self.targets[:, rank::count], self.fresh)


class Streams:
    """A text cut into B contiguous streams, read in windows of T steps: window k + 1 goes on where k stopped.

    At each new pass the cut moves by a random offset (a function of seed and pass), so that windows and
    streams do not begin at the same characters again. `window(k)` depends on nothing else: a resumed run
    reads the windows that the interrupted one would have read.

    whole: the characters of the text that this is a part of, for the message where it is too short.
    """

    def __init__(self, numbers: Tensor, streams: int, steps: int, seed: int | None = None, whole: int | None = None):
        self.numbers, self.streams, self.steps, self.seed = numbers, streams, steps, seed
        # One stream and a window of characters are set aside for the offset, where there is one.
        usable = len(numbers) - 1 - (steps if seed is not None else 0)
        self.stream_length = usable // streams
        self.windows = math.ceil(self.stream_length / steps) if seed is None else self.stream_length // steps
        if self.windows < 1:
            count = len(numbers) if whole is None else whole
            parts = "" if whole is None else f" ({len(numbers)} to train on, the rest for validation)"
            raise DataError(
                f"The text is too short: {count} character{'' if count == 1 else 's'}{parts} cannot be cut into "
                f"{streams} streams of {steps} steps, which takes {streams * steps + steps + 1} to train on.\n"
                "  fix:      a longer text, or fewer --streams and --steps"
            )

    def window(self, k: int) -> Window:
        k_of_pass, offset = k % self.windows, self._offset(k // self.windows)
        begin = k_of_pass * self.steps
        size = min(self.steps, self.stream_length - begin)
        rows = torch.arange(self.streams) * self.stream_length + offset + begin
        place = torch.arange(size)[:, None] + rows
        return Window(self.numbers[place], self.numbers[place + 1], k_of_pass == 0)

    def one_pass(self) -> Iterator[Window]:
        return (self.window(k) for k in range(self.windows))

    def _offset(self, which_pass: int) -> int:
        if self.seed is None or which_pass == 0:
            return 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + which_pass)
        return int(torch.randint(self.steps, (), generator=generator))


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """In nats per character. logits (T, B, V), targets (T, B)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def bits(nats: float) -> float:
    """Bits per character from nats per character."""
    return nats / math.log(2)


# --- the file a trained model is kept in ------------------------------------------------------------------


@dataclass
class Checkpoint:
    """What a checkpoint file of this recipe holds; `content` is all of it, the trainer's part included."""

    path: Path
    shape: Shape
    vocabulary: Vocabulary
    history: list[dict[str, float]]
    content: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Raises DataError if there is no such file or it is not a checkpoint of this recipe."""
        content = read_checkpoint(path, "charlm", FORMAT)
        card = content["charlm"]
        return cls(path, Shape(**card["shape"]), Vocabulary(card["characters"]), card["history"], content)

    @staticmethod
    def card(shape: Shape, vocabulary: Vocabulary, history: list[dict[str, float]]) -> dict[str, Any]:
        """What `read` looks for, as plain values."""
        return {
            "format": FORMAT,
            "shape": dataclasses.asdict(shape),
            "characters": vocabulary.characters,
            "history": history,
        }

    def model(self, backend: str = "auto") -> sl.Loop[Tensor]:
        """The trained model, ready to read text."""
        loop = sl.Loop(CharModel(len(self.vocabulary), self.shape), backend=backend)
        loop.load_state_dict(self.weights)
        return loop.eval()

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state_dict of the model, an `sl.Loop`."""
        return {name.removeprefix("loop."): value for name, value in self.content["state_dict"].items()}

    def save_weights(self, path: Path) -> None:
        """A safetensors file, which any program can read; the card, without the history, is in its header."""
        card = json.dumps(self.card(self.shape, self.vocabulary, self.history[-1:]))
        save_weights(self.weights, path, {"charlm": card})

    def check_same(self, shape: Shape, vocabulary: Vocabulary) -> None:
        """Raises DataError that names both sides unless this checkpoint is of that model and vocabulary."""
        if not self.shape.fits(shape):
            raise DataError(
                f"{self.path} holds another model.\n"
                f"  checkpoint: {self.shape}\n"
                f"  asked for:  {shape}\n"
                "  fix:        give the checkpoint's --cell, --layers, --units, --embedding; or another --out"
            )
        if self.vocabulary != vocabulary:
            raise DataError(
                f"{self.path} was trained on a text with other characters.\n"
                f"  checkpoint: {len(self.vocabulary)} characters, {self.vocabulary.characters!r}\n"
                f"  this text:  {len(vocabulary)} characters, {vocabulary.characters!r}\n"
                "  fix:        give the text it was trained on (--data), or another --out"
            )


# --- writing text -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """How the next character is drawn from the model's scores.

    temperature: the scores are divided by it; 0 takes the likeliest character always.
    top_k: only the k likeliest characters can be drawn; 0: no limit.
    top_p: only the likeliest characters that together have at least this probability (Holtzman et al. 2020).
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise DataError(f"--temperature is 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise DataError(f"--top-k is 0 (no limit) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise DataError(f"--top-p is above 0 and at most 1, got {self.top_p}")

    def probabilities(self, logits: Tensor) -> Tensor:
        """(V,) from (V,) scores."""
        if self.temperature == 0:
            return F.one_hot(logits.argmax(), len(logits)).to(logits.dtype)
        ordered, places = (logits / self.temperature).sort(descending=True)
        probabilities = ordered.softmax(0)
        # What stands before a character decides, so that the first one always stays.
        keep = probabilities.cumsum(0) - probabilities < self.top_p
        if self.top_k:
            keep[self.top_k :] = False
        kept = torch.where(keep, probabilities, 0.0)
        return torch.zeros_like(kept).scatter(0, places, kept / kept.sum())


class Writer:
    """Continues prompts, a character at a time; what was read and written before is remembered in between.

    The same seed, prompts and lengths give the same text.
    """

    def __init__(self, model: sl.Loop[Tensor], vocabulary: Vocabulary, choice: Choice, seed: int = 0):
        self.vocabulary, self.choice = vocabulary, choice
        self.generator = torch.Generator().manual_seed(seed)
        self.stream = model.stream(1)
        self.logits: Tensor | None = None

    @torch.no_grad()
    def read(self, prompt: str) -> None:
        """Raises DataError that names the prompt's unknown characters, before anything is read."""
        for number in self.vocabulary.encode(prompt, "The prompt"):
            self.logits = self.stream(number[None])[0]

    @torch.no_grad()
    def write(self, length: int) -> Iterator[str]:
        """`length` characters, each as soon as it is drawn."""
        if self.logits is None:
            raise DataError("The prompt is empty: the model needs at least one character to go on from.")
        for _ in range(length):
            drawn = torch.multinomial(self.choice.probabilities(self.logits), 1, generator=self.generator)
            yield self.vocabulary.characters[cast(int, drawn.item())]
            self.logits = self.stream(drawn)[0]
