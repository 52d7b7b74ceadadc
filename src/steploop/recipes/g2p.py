"""Grapheme to phoneme: a word's letters are read in both directions, and its phonemes written one by one.

The decoder is ONE step, with attention and input feeding: `sl.Loop` trains it over whole batches, and `sl.search`
writes with it. Training is in g2p_training.py, how good a model is in g2p_scores.py, the dictionary in lexicon.py.

Words B, letters S, phonemes T with the end, labels V: the phonemes and the end; 0 is the end, the start and padding.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import steploop as sl

from ..errors import DataError
from .checkpoints import BEST, read_checkpoint, save_weights
from .lexicon import Phonemes, Symbols
from .shape import CELLS, ModelShape

FORMAT = "steploop g2p 1"


@dataclass(frozen=True)
class Shape(ModelShape):
    """units: of the decoder, and of both directions of an encoder layer together."""

    cell: str = "lstm"


class Encoder(nn.Module):
    """letters (S, B), lengths (B,) -> memory (B, S, units)."""

    def __init__(self, letters: int, shape: Shape, backend: str):
        super().__init__()
        self.embedding = nn.Embedding(letters, shape.embedding)
        self.layers, self.dropout = nn.ModuleList(), nn.Dropout(shape.dropout)
        for layer in range(shape.layers):
            sizes = shape.embedding if layer == 0 else shape.units, shape.units // 2
            upwards, downwards = (CELLS[shape.cell](*sizes) for _ in range(2))
            self.layers.append(sl.nn.Bidirectional(upwards, downwards, backend=backend))

    def forward(self, letters: Tensor, lengths: Tensor) -> Tensor:
        x = self.embedding(letters)
        for layer in self.layers:
            x, _ = layer(self.dropout(x), lengths=lengths)
        return self.dropout(x).transpose(0, 1)


class Decoder(sl.nn.attention.DecoderWithAttention):
    """The label before, (B,) -> scores of the next (B, V). Constants: memory (B, S, units), memory_lengths (B,).

    It starts from what the encoder's backward direction had read when it came to the first letter: all of the word.
    """

    def __init__(self, labels: int, shape: Shape):
        units = shape.units
        cells: list[sl.Step] = []
        for layer in range(shape.layers):
            inputs = shape.embedding + units if layer == 0 else units
            cells += [CELLS[shape.cell](inputs, units), sl.nn.Dropout(shape.dropout)]
        super().__init__(
            nn.Embedding(labels, shape.embedding),
            sl.nn.Stack(sl.nn.Dropout(shape.dropout), *cells),
            sl.nn.attention.GeneralAttention(units, units),
            combine=nn.Linear(2 * units, units),
            output=nn.Linear(units, labels),
        )
        self.start = nn.Linear(units, units)

    def begin(self, memory: Tensor) -> None:
        stack: Any = self.cell
        stack[1].h.prev = torch.tanh(self.start(memory[:, 0]))


class Model(nn.Module):
    """letters (S, B), their lengths (B,), labels (T, B), their lengths (B,) -> scores (T, B, V)."""

    def __init__(self, letters: int, labels: int, shape: Shape, backend: str = "auto"):
        super().__init__()
        self.encoder = Encoder(letters, shape, backend)
        self.decoder = sl.Loop(Decoder(labels, shape), backend=backend)

    def forward(self, letters: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
        given = torch.cat([torch.zeros_like(labels[:1]), labels[:-1]])
        memory = self.encoder(letters, lengths)
        scores: Any
        scores, _ = self.decoder(given, memory=memory, memory_lengths=lengths, lengths=label_lengths)
        return scores


# --- the files a trained model is kept in -------------------------------------------------------------------


@dataclass
class Checkpoint:
    """A trained model as `train g2p` leaves it: a checkpoint to go on from, or the weights alone (.safetensors).

    weights: a state_dict of Model, the averaged one.
    """

    path: Path
    shape: Shape
    symbols: Symbols
    history: list[dict[str, float]]
    weights: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Raises DataError if there is no such file or it is none of this recipe."""
        if path.suffix == ".safetensors":
            card, weights = _read_safetensors(path)
        else:
            content = read_checkpoint(path, "g2p", FORMAT)
            card, averaged = content["g2p"], "average.module."
            weights = {
                name.removeprefix(averaged): value
                for name, value in content["state_dict"].items()
                if name.startswith(averaged)
            }
        symbols = Symbols(card["letters"], tuple(card["phonemes"]), card["stress"])
        return cls(path, Shape(**card["shape"]), symbols, card["history"], weights)

    @staticmethod
    def card(shape: Shape, symbols: Symbols, history: list[dict[str, float]]) -> dict[str, Any]:
        """What `read` looks for, as plain values."""
        return {
            "format": FORMAT,
            "shape": dataclasses.asdict(shape),
            "letters": symbols.letters,
            "phonemes": list(symbols.phonemes),
            "stress": symbols.stress,
            "history": history,
        }

    def save_weights(self, path: Path) -> None:
        """A safetensors file, which any program can read; the card is in its header."""
        card = json.dumps(self.card(self.shape, self.symbols, self.history[-1:]))
        save_weights(self.weights, path, {"g2p": card})

    def model(self, backend: str = "auto") -> Model:
        """The trained model, ready to say words."""
        model = Model(len(self.symbols.letters) + 1, len(self.symbols.phonemes) + 1, self.shape, backend)
        model.load_state_dict(self.weights)
        return model.eval()

    def check_same(self, shape: Shape, symbols: Symbols) -> None:
        """Raises DataError that names both sides unless this checkpoint is of that model and dictionary."""
        if not self.shape.fits(shape):
            raise DataError(
                f"{self.path} holds another model.\n"
                f"  checkpoint: {self.shape}\n"
                f"  asked for:  {shape}\n"
                "  fix:        give the checkpoint's --cell, --layers, --units, --embedding; or another --out"
            )
        if self.symbols != symbols:
            raise DataError(
                f"{self.path} was trained on a dictionary with other letters or phonemes.\n"
                f"  checkpoint:      {self.symbols}\n"
                f"  this dictionary: {symbols}\n"
                "  fix:             give the dictionary it was trained on (--data, --stress), or another --out"
            )


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(card, weights)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {}).get("g2p", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        best = path.with_name(BEST)
        fix = "steploop train g2p makes one"
        if best.exists():
            fix = f"--model {best}, the best so far of a run that has not ended"
        raise DataError(f"No such file: {path}\n  fix:      {fix}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is not a safetensors file: {error}") from None
    if card.get("format") != FORMAT:
        raise DataError(f"{path} holds the weights of another model: it has no {FORMAT!r}.")
    return card, weights


# --- writing pronunciations ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pronunciation:
    """One way to say a word.

    score:    the natural logarithm of its probability.
    finished: it ended by itself; else it was cut.
    proved:   no pronunciation whatever is likelier. Of the best one only; the others have False.
    weights:  (phonemes + 1, letters): where the decoder looked for each phoneme and for the end, where asked for.
    """

    phonemes: Phonemes
    score: float
    finished: bool
    proved: bool
    weights: Tensor | None = None


class Pronouncer:
    """Says words: batches of words of like lengths, with greedy search or a beam.

    beam:   hypotheses that are followed side by side; 1: greedy search.
    n_best: pronunciations for each word, the likeliest first; fewer where there are not so many.
    """

    def __init__(self, model: Model, symbols: Symbols, beam: int = 1, n_best: int = 1, batch: int = 256):
        if not 1 <= n_best <= beam:
            raise DataError(f"--n-best is 1 to --beam, which is {beam}; got {n_best}")
        self.model, self.symbols, self.beam, self.n_best, self.batch = model, symbols, beam, n_best, batch

    @torch.no_grad()
    def say(self, words: Sequence[str], weights: bool = False) -> list[list[Pronunciation]]:
        """For each word its pronunciations. weights: also where the decoder looked.

        Raises DataError for a word with characters that the model has never seen, and for an empty one.
        """
        spelled = [self.symbols.spell(word) for word in words]
        order = sorted(range(len(words)), key=lambda k: len(spelled[k]))
        said: list[list[Pronunciation]] = [[] for _ in words]
        decoder = self.model.decoder.step
        decoder.return_weights = weights
        try:
            for start in range(0, len(order), self.batch):
                places = order[start : start + self.batch]
                for place, found in zip(places, self._say([spelled[k] for k in places], weights), strict=True):
                    said[place] = found
        finally:
            decoder.return_weights = False
        return said

    def _say(self, spelled: list[Tensor], weights: bool) -> list[list[Pronunciation]]:
        letters, lengths = sl.seq2seq.buckets.pad_to_longest(spelled)
        hypotheses = self.search(letters, lengths, weights)
        looked: Any = hypotheses.kept["weights"] if weights else None
        found = []
        for row, sequences in enumerate(hypotheses.to_lists()):
            found.append([
                Pronunciation(
                    self.symbols.read(labels),
                    hypotheses.log_probs[row, n].item(),
                    bool(hypotheses.finished[row, n]),
                    n == 0 and bool(hypotheses.proved_best[row]),
                    looked[row, n, : len(labels) + 1, : len(spelled[row])] if weights else None,
                )
                for n, labels in enumerate(sequences)
            ])  # fmt: skip
        return found

    def search(self, letters: Tensor, lengths: Tensor, weights: bool = False) -> sl.search.Hypotheses:
        """letters (S, B), lengths (B,). At most 2 S + 10 labels are written for a word."""
        device = self.model.encoder.embedding.weight.device
        letters, lengths = letters.to(device), lengths.to(device)
        memory = self.model.encoder(letters, lengths)
        options = {
            "start": 0, "end": 0, "max_steps": 2 * len(letters) + 10, "memory": memory, "memory_lengths": lengths,
            **({"scores": "scores", "keep": "weights"} if weights else {}),
        }  # fmt: skip
        if self.beam == 1:
            return sl.search.greedy(self.model.decoder, **options)
        return sl.search.beam(self.model.decoder, size=self.beam, n_best=self.n_best, **options)
