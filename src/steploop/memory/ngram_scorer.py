"""NGramScorer: a back-off n-gram language model, read from an ARPA file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, InputError, StateError, message
from ..frame import running
from ..state import State
from .base import Frames, Memory, check_step_input, cleaned

NGrams = dict[tuple[str, ...], tuple[float, float]]  # words -> (log10 probability, log10 back-off weight)
_UNKNOWN = -100.0  # log10 probability of a word that neither the file nor its <unk> knows, as in KenLM
_ABSENT = -1  # in a context: no word there


class NGramScorer(Memory):
    """log p(token_t | token_{t-n+1} ... token_{t-1}) of a back-off model (Katz 1987), natural logarithm.

        p(w | context) = p(context w)                                 if that n-gram is in the file
                       = backoff(context) p(w | context without its first word)      else

    RETURNN's KenLmStateLayer. The state is the longest context that the model knows, a number per row. A
    whole sequence is scored at once: the state before any step follows from the n-1 tokens before it.

    arpa:       the path of an ARPA file.
    vocabulary: the word of each token number; default: the file's unigrams in their order (`scorer.words`).
    start:      the word that stands before the first token, or None; not used if the file does not have it.
    unknown:    log10 probability of a word that is not in the file, where the file has no "<unk>". With one,
                its probability and back-off are those of "<unk>".

    scorer(token): token (B,) integers -> (B,) float.  `all_next()`: (B, V), of every token that may come
    next.

    Raises DataError with file and line for a malformed file; InputError for a token that is no integer
    tensor.
    """

    # The buffers: the file's number of each word of the vocabulary, and the columns of `_Tables`.
    word_of: Tensor
    unknown_word: Tensor
    edge: Tensor
    edge_to: Tensor
    in_file: Tensor
    log_probability: Tensor
    backoff: Tensor
    shorter: Tensor
    as_context: Tensor
    context: Tensor

    def __init__(
        self,
        arpa: str | Path,
        vocabulary: Sequence[str] | None = None,
        start: str | None = "<s>",
        unknown: float = _UNKNOWN,
    ) -> None:
        super().__init__()
        ngrams = read_arpa(arpa)
        self.order = max(len(words) for words in ngrams)
        known = [words[0] for words in ngrams if len(words) == 1]
        self.words = list(known if vocabulary is None else vocabulary)
        tables = _Tables(ngrams, known, self.order)
        number = {word: i for i, word in enumerate(known)}
        other = number.get("<unk>", len(known))
        self.word_count = len(known) + 1
        buffers = {"word_of": [number.get(word, other) for word in self.words], **tables.columns()}
        for name, values in buffers.items():
            dtype = torch.float64 if name in ("log_probability", "backoff") else torch.int64
            self.register_buffer(name, torch.tensor(values, dtype=dtype), persistent=False)
        self.unknown = unknown * math.log(10)
        first = (start,) if start is not None and self.order > 1 else ()
        self.node = State(init=tables.number.get(first, 0), dtype=torch.int64)

    def encode(self, words: Sequence[str]) -> Tensor:
        """Token numbers (len(words),) of words, on the device of the scorer's tables.

        InputError for a word that the vocabulary does not have.
        """
        number = {word: i for i, word in enumerate(self.words)}
        missing = [word for word in words if word not in number and "<unk>" not in number]
        if missing:
            raise InputError(
                message(
                    f"NGramScorer: the vocabulary does not have {missing[0]!r}, nor <unk>.",
                    fix="NGramScorer(arpa, vocabulary=[...])",
                )
            )
        numbers = [number.get(word, number.get("<unk>")) for word in words]
        return torch.tensor(numbers, dtype=torch.int64, device=self.word_of.device)

    def check(self, token: Tensor) -> None:
        check_step_input("NGramScorer", "token", token, integer=True)

    def step(self, token: Tensor) -> Tensor:
        self.check(token)
        score, self.node.next = self._score(self.node.prev, self._word(token))
        return score

    def all_next(self, state: Mapping[str, Tensor] | Tensor | None = None) -> Tensor:
        """(B, V): log p of every token, after those scored so far.

        Inside a step it continues from this step; elsewhere from `state`, the States of a call of this scorer
        alone, or its "node" (B,).
        """
        if state is None and running() is None:
            raise StateError(
                message(
                    "NGramScorer.all_next was called outside a step without a state.",
                    fix="_, state = scorer(tokens); scorer.all_next(state)",
                )
            )
        if state is None:
            node = self.node.latest
        else:
            node = state["node"] if isinstance(state, Mapping) else state
        word = self.word_of.unsqueeze(0).expand(len(node), -1)
        return self._score(node.unsqueeze(1).expand_as(word), word)[0]

    def sequence(
        self, xs: tuple[Any, ...], constants: dict[str, Any], state: dict[str, Tensor], reset_to: dict[str, Tensor],
        lengths: Tensor | None, resets: Tensor | None,
    ) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
        word = self._word(cleaned(xs[0], lengths))
        past, fresh = self.context[state["node"]], self.context[reset_to["node"]]
        frames = Frames(word, past, fresh, lengths, resets)
        node = torch.zeros_like(word)
        for k in range(self.order - 1, 0, -1):
            node = self._advance(node, frames.back(k))
        score, _ = self._score(node, word)
        last = frames.last()
        after = torch.zeros_like(state["node"])
        for k in range(self.order - 1):
            after = self._advance(after, last[:, k])
        return score, {"node": after}

    def _word(self, token: Tensor) -> Tensor:
        """The file's number of each token's word; tokens outside of the vocabulary are unknown words."""
        token = token.to(torch.int64)
        inside = (token >= 0) & (token < len(self.words))
        word = self.word_of[token.clamp(0, len(self.words) - 1)]
        return torch.where(inside, word, self.unknown_word)

    def _advance(self, node: Tensor, word: Tensor) -> Tensor:
        return torch.where(word == _ABSENT, 0, self._score(node, word.clamp(min=0))[1])

    def _score(self, node: Tensor, word: Tensor) -> tuple[Tensor, Tensor]:
        """(log p, the context afterwards) of words (...) after contexts `node` (...)."""
        penalty = torch.zeros(node.shape, dtype=torch.float64, device=node.device)
        score, after = penalty + self.unknown, torch.zeros_like(node)
        scored = torch.zeros_like(node, dtype=torch.bool)
        moved = scored
        for _ in range(self.order):
            key = node * self.word_count + word
            at = torch.searchsorted(self.edge, key).clamp(max=len(self.edge) - 1)
            there = self.edge[at] == key
            child = self.edge_to[at]
            after = torch.where(there & ~moved, self.as_context[child], after)
            moved = moved | there
            has_score = there & (self.in_file[child] != 0) & ~scored
            score = torch.where(has_score, penalty + self.log_probability[child], score)
            scored = scored | has_score
            penalty = penalty + torch.where(scored, 0.0, self.backoff[node])
            node = self.shorter[node]
        score = torch.where(scored, score, penalty + self.unknown)
        return score.to(torch.get_default_dtype()), after

    def extra_repr(self) -> str:
        return f"order={self.order}, words={len(self.words)}"


class _Tables:
    """The model as a tree of contexts, in columns; node 0 is the empty context.

    A node for every n-gram of the file and every beginning of one. edge: node * words + word, sorted;
    edge_to: the node that it leads to. shorter: the node of the longest known end of it. as_context: itself,
    or `shorter` where it has n words. context: its last n-1 words.
    """

    def __init__(self, ngrams: NGrams, known: list[str], order: int) -> None:
        self.ngrams, self.order = ngrams, order
        self.word = {word: i for i, word in enumerate(known)}
        self.number: dict[tuple[str, ...], int] = {(): 0}
        for words in sorted(ngrams, key=len):
            for end in range(1, len(words) + 1):
                self.number.setdefault(words[:end], len(self.number))

    def columns(self) -> dict[str, Any]:
        """Lists by buffer name, one entry per node (or per edge)."""
        absent = (0.0, 0.0)
        log = math.log(10)
        nodes = list(self.number)
        size = len(self.word) + 1
        edges = sorted(
            (self.number[words[:-1]] * size + self.word[words[-1]], self.number[words])
            for words in nodes
            if words
        )
        shorter = [self._shorter(words) for words in nodes]
        return {
            "unknown_word": self.word.get("<unk>", len(self.word)),
            "edge": [key for key, _ in edges],
            "edge_to": [node for _, node in edges],
            "in_file": [int(words in self.ngrams) for words in nodes],
            "log_probability": [self.ngrams.get(words, absent)[0] * log for words in nodes],
            "backoff": [self.ngrams.get(words, absent)[1] * log for words in nodes],
            "shorter": shorter,
            "as_context": [i if len(words) < self.order else shorter[i] for i, words in enumerate(nodes)],
            "context": [self._context(words) for words in nodes],
        }

    def _shorter(self, words: tuple[str, ...]) -> int:
        ends = (words[i:] for i in range(1, len(words) + 1))
        return next((self.number[end] for end in ends if end in self.number), 0)

    def _context(self, words: tuple[str, ...]) -> list[int]:
        kept = [self.word[word] for word in words[-(self.order - 1) :]] if self.order > 1 else []
        return [_ABSENT] * (self.order - 1 - len(kept)) + kept


# -- ARPA files ----------------------------------------------------------------------------------------------


def read_arpa(path: str | Path) -> NGrams:
    """The n-grams of an ARPA file: words -> (log10 probability, log10 back-off weight).

    DataError with file and line where the file is not one.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            message(
                "An ARPA file could not be read.",
                expected="a text file in UTF-8",
                found=str(error),
                at=str(path),
            )
        ) from None
    return _Reader(str(path), lines).ngrams()


@dataclass
class _Reader:
    path: str
    lines: list[str]
    at: int = 0

    def ngrams(self) -> NGrams:
        counts = self._counts()
        found: NGrams = {}
        for order in range(1, len(counts) + 1):
            self._section(order, len(counts), counts[order - 1], found)
        if self._next() != "\\end\\":
            self._fail("The n-grams do not end.", "\\end\\ after the last section")
        return found

    def _counts(self) -> list[int]:
        while self.at < len(self.lines) and self._line() != "\\data\\":
            self.at += 1
        if self.at == len(self.lines):
            self._fail("This is no ARPA file.", "a line \\data\\")
        self.at += 1
        counts: list[int] = []
        while (line := self._next()) is not None and line.startswith("ngram "):
            order, _, count = line[len("ngram ") :].partition("=")
            if not order.strip().isdigit() or not count.strip().isdigit() or int(order) != len(counts) + 1:
                self._fail("A count of n-grams is malformed.", f"ngram {len(counts) + 1}=<number>")
            counts.append(int(count))
        if not counts:
            self._fail("There are no counts of n-grams.", "ngram 1=<number>")
        self.at -= 1
        return counts

    def _section(self, order: int, orders: int, count: int, found: NGrams) -> None:
        head = f"\\{order}-grams:"
        if self._next() != head:
            self._fail("A section of n-grams is missing.", head)
        read = 0
        while (line := self._next()) is not None and not line.startswith("\\"):
            self._ngram(line, order, orders, found)
            read += 1
        if line is not None:
            self.at -= 1
        if read != count:
            self.at = min(self.at + 1, len(self.lines))
            self._fail(
                f"Section {head} does not have as many n-grams as \\data\\ says.", f"{count}", f"{read}"
            )

    def _ngram(self, line: str, order: int, orders: int, found: NGrams) -> None:
        parts = line.split()
        most = order + 1 if order == orders else order + 2
        if not order + 1 <= len(parts) <= most:
            optional = "" if order == orders else " [log10 back-off]"
            self._fail("An n-gram is malformed.", f"log10 probability, {order} word(s){optional}", repr(line))
        words = tuple(parts[1 : order + 1])
        numbers = [self._number(part) for part in (parts[0], *parts[order + 1 :])]
        if numbers[0] > 0:
            self._fail("A log10 probability is above 0.", "a number <= 0", parts[0])
        if words in found:
            self._fail("An n-gram comes twice.", "every n-gram once", " ".join(words))
        for word in words if order > 1 else ():
            if (word,) not in found:
                self._fail("An n-gram has a word that is no unigram.", "a word of \\1-grams:", repr(word))
        found[words] = (numbers[0], numbers[1] if len(numbers) > 1 else 0.0)

    def _number(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            self._fail("An n-gram has something else where a number should be.", "a log10 value", repr(text))
        return value

    def _line(self) -> str:
        return self.lines[self.at].strip()

    def _next(self) -> str | None:
        """The next line that is not empty; None at the end."""
        while self.at < len(self.lines):
            self.at += 1
            if self.lines[self.at - 1].strip():
                return self.lines[self.at - 1].strip()
        return None

    def _fail(self, what: str, expected: str, found: str | None = None) -> None:
        line = max(min(self.at, len(self.lines)), 1)
        if found is None:
            found = repr(self.lines[line - 1].strip()) if self.lines else "an empty file"
        raise DataError(message(what, expected=expected, found=found, at=f"{self.path}:{line}"))
