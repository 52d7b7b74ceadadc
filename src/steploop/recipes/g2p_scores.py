"""How good pronunciations are: phoneme and word error rates, the commonest confusions, errors by length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rapidfuzz.distance import Levenshtein

from .lexicon import Phonemes

if TYPE_CHECKING:
    from matplotlib.ticker import MaxNLocator

NOTHING = "-"  # in a confusion: a phoneme that is not there


@dataclass
class Scores:
    """Errors of pronunciations, each against the closest of the word's references.

    PER: the edits (insertions, deletions, substitutions) over the phonemes of the closest references; of equally
    close references the first. WER: the share of words that equal none of their references.
    """

    words: int = 0
    wrong: int = 0
    edits: int = 0
    phonemes: int = 0
    confusions: Counter[tuple[str, str]] = field(default_factory=Counter)  # (reference's phoneme, said): how often
    by_length: dict[int, list[int]] = field(default_factory=dict)  # letters: [words, wrong]

    @classmethod
    def joined(cls, parts: Iterable[Scores]) -> Scores:
        """The scores of all the words of several."""
        found = cls()
        for part in parts:
            found.words += part.words
            found.wrong += part.wrong
            found.edits += part.edits
            found.phonemes += part.phonemes
            found.confusions.update(part.confusions)
            for letters, counts in part.by_length.items():
                sums = found.by_length.setdefault(letters, [0, 0])
                sums[:] = [a + b for a, b in zip(sums, counts)]
        return found

    @property
    def per(self) -> float:
        return self.edits / max(1, self.phonemes)

    @property
    def wer(self) -> float:
        return self.wrong / max(1, self.words)

    def add(self, word: str, said: Phonemes, references: Sequence[Phonemes]) -> None:
        distance, reference = closest(said, references)
        self.words += 1
        self.wrong += distance > 0
        self.edits += distance
        self.phonemes += len(reference)
        self.confusions.update(confusions(reference, said) if distance else ())
        counts = self.by_length.setdefault(len(word), [0, 0])
        counts[0] += 1
        counts[1] += distance > 0

    def as_dict(self) -> dict[str, float]:
        return {"per": self.per, "wer": self.wer, "words": self.words, "phonemes": self.phonemes}


def closest(said: Phonemes, references: Sequence[Phonemes]) -> tuple[int, Phonemes]:
    """(edits, the reference that needs the fewest)."""
    return min(((Levenshtein.distance(reference, said), reference) for reference in references), key=lambda e: e[0])


def confusions(reference: Phonemes, said: Phonemes) -> Iterable[tuple[str, str]]:
    """(what is right, what was said) for every edit of a shortest way from one to the other."""
    for edit in Levenshtein.editops(reference, said):
        right = NOTHING if edit.tag == "insert" else reference[edit.src_pos]
        wrong = NOTHING if edit.tag == "delete" else said[edit.dest_pos]
        yield right, wrong


def draw_by_length(scores: dict[str, Scores], path: Path) -> None:
    """The word error rate for each number of letters, one curve for each search, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    counts = axes.twinx()
    for number, (name, one) in enumerate(scores.items()):
        lengths = sorted(one.by_length)
        rates = [100 * one.by_length[n][1] / one.by_length[n][0] for n in lengths]
        axes.plot(lengths, rates, "o-", markersize=3, label=name)
        if number == 0:
            counts.bar(lengths, [one.by_length[n][0] for n in lengths], color="0.9", zorder=0)
    axes.set_zorder(counts.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.set_xlabel("letters of the word")
    axes.set_ylabel("word error rate (%)")
    counts.set_ylabel("words")
    axes.set_ylim(0, 100)
    cast("MaxNLocator", axes.xaxis.get_major_locator()).set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
