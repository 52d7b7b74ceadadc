"""What greedy search, sampling and beam search share: hypotheses of a row, what each may go on with, and its scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InputError, StepError, describe, message
from ..frame import Frame, running
from ..loop import Loop
from ..nn._constants import constants_for
from ..state import State
from ..step import Step
from .copies import Copies, picked, spread

if TYPE_CHECKING:
    from ..memory.ngram_scorer import NGramScorer

NEVER = float("-inf")

Choice = tuple[Tensor | None, Tensor, Tensor, Tensor, dict[str, Tensor]]


class Search(Step):
    """K hypotheses of each row, all of them extended by one label at every step. Subclasses choose the labels.

    model:     a Step (or a Loop of one): its first argument is the label before this step, (B,) int64; its output is
               scores (B, V). Its States are held K times and go with the hypotheses, whatever they are.
    start:     the label before the first.  end: the label that ends a hypothesis; None: none does.
    max_steps: labels of a hypothesis at most, the end included.  min_steps: labels before an end may come.
    suppress:  labels that are never chosen.
    allowed:   which labels may come: a Step (label -> (B, V) bool) with States of its own, or a function of the labels
               so far (R, max_steps) int64, -1 where there is none yet, to (R, V) bool.
    no_repeat: n: no n labels come twice in a row's hypothesis in the same order; 0: they may.
    scorers:   (weight, Step) pairs, each Step label -> (B, V) log-probabilities (Gulcehre et al. 2015, shallow fusion);
               a `sl.memory.NGramScorer` is one. Other values may be rewards: then nothing is proved (see `Beam`).
    keep:      parts of the model's output to keep for every label: keys, indices or functions.
    scores:    where the scores are in an output that is a tree: a key, an index or a function; None: it is them.
    normalised: the scores are log-probabilities already; else log_softmax makes them so.

    The model's own further sequences and its constants are those of the search's loop.
    Each step gives a dict: `label`, `parent` (B, K) int64: the hypothesis that each one extends; `log_prob` (B, K) of
    the label; `kept`, by what `keep` names, (B, K, ...) of the hypotheses before this step. With `shows`, what is found
    so far: `labels` (B, K, max_steps), `lengths` and `scores` (B, K), best first.
    State `done` (B,): nothing more will change.
    Raises InputError for options that do not fit, StepError for a model that is no Step.
    """

    _copied = ("model", "scorers", "constraint")

    def __init__(
        self,
        model: Step | Loop[Any],
        start: int,
        end: int | None,
        max_steps: int,
        *,
        copies: int,
        min_steps: int = 0,
        suppress: Sequence[int] = (),
        allowed: Step | Callable[[Tensor], Tensor] | None = None,
        no_repeat: int = 0,
        scorers: Sequence[tuple[float, Step]] = (),
        keep: Any = (),
        scores: Any = None,
        normalised: bool = False,
        shows: bool = True,
        first: Tensor | float = 0.0,
    ) -> None:
        super().__init__()
        self.model = checked_step(model, "the model")
        self.copies = whole("size", copies, 1)
        self.start, self.end = start, end
        self.max_steps = whole("max_steps", max_steps, 0)
        self.suppress = tuple(int(label) for label in ([suppress] if isinstance(suppress, int) else suppress))
        self.no_repeat = whole("no_repeat", no_repeat, 0)
        self.keep = tuple(keep) if isinstance(keep, (tuple, list)) else (keep,)
        self.picks, self.normalised, self.shows = scores, normalised, shows
        self.scorers = nn.ModuleList(as_scorer(scorer) for _, scorer in scorers)
        self.weights = tuple(float(weight) for weight, _ in scorers)
        is_step = isinstance(allowed, Step)
        self.constraint = cast("Step | None", allowed if is_step else None)
        self.permits = None if is_step else allowed
        count = self.copies
        self.label = State(count, init=start, dtype=torch.int64)
        self.total, self.score = State(count, init=first), State(count, init=first)
        self.ended = State(count, init=False, dtype=torch.bool)
        self.taken = State(init=0, dtype=torch.int64)
        self.limit = State(init=self.max_steps, dtype=torch.int64)
        self.least = State(init=whole("min_steps", min_steps, 0), dtype=torch.int64)
        self.done = State(init=self.max_steps == 0, dtype=torch.bool)
        self.remembers = shows or self.no_repeat > 0 or self.permits is not None
        if self.remembers:
            self.labels = State(count, self.max_steps, init=-1, dtype=torch.int64)
            self.written = State(init=0, dtype=torch.int64)

    def _hands_constants_to(self) -> list[Step]:
        return self._steps()

    def _steps(self) -> list[Step]:
        return [self.model, *self.scorers, *([] if self.constraint is None else [self.constraint])]

    # one step

    def step(self, *xs: Any, **constants: Any) -> Any:
        if cast(Frame, running()).sizing is not None:
            return self._sized(xs, constants)
        rows = self.label.prev.flatten(0, 1)
        output, held = self._run(self.model, rows, spread(xs, self.copies), constants)
        scores = picked(output, self.picks)
        self._check_scores(scores)
        log_probs = scores if self.normalised else torch.log_softmax(scores, -1)
        log_probs = self._by_row(torch.where(torch.isnan(log_probs), NEVER, log_probs)).to(self.score.prev.dtype)
        gains, bad = log_probs, self._nan(scores)
        everything = [held]
        if self.normalised:  # as somebody says; what log_softmax gives is sure
            self.heed(scores)
        for weight, scorer in zip(self.weights, cast("Iterable[Step]", self.scorers), strict=True):
            more, its = self._run(scorer, rows, (), constants)
            _check_like(more, scores, "A scorer gives a number for every label.", "floating")
            gains, bad = gains + weight * self._by_row(more).to(gains.dtype), bad | self._nan(more)
            self.heed(more, getattr(scorer, "never_positive", False))
            everything.append(its)
        permitted = self._permitted(log_probs, rows, constants, everything)
        if permitted is not None:
            gains = torch.where(permitted, gains, NEVER)
        gains = torch.where(torch.isnan(gains), NEVER, gains)
        parent, label, score, total, more = self.choose(gains, output)
        ended, log_prob = self._go_on(parent, label, score, total, log_probs)
        for copies in everything:
            copies.keep(ended)
            copies.write(parent)
        return self._result(parent, log_prob, output) | {"nan": (bad & ~ended).any(-1), **more}

    def choose(self, gains: Tensor, output: Any) -> Choice:
        """(parent or None where each hypothesis goes on, label, score, total), (B, K) each; what else the step gives.

        gains: (B, K, V), what each label adds to the total log-probability; -inf where it may not come.
        """
        raise NotImplementedError

    def heed(self, values: Tensor, never_positive: bool = False) -> None:
        """Look whether these (B * K, V) can raise a score, as log-probabilities can't: of use to some searches.

        never_positive: the scorer that gave them says of itself that they can't.
        """

    def _run(self, step: Step, rows: Tensor, xs: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, Copies]:
        copies = Copies(step, self.copies)
        return copies.run(rows, *xs, constants=constants), copies

    def _by_row(self, value: Tensor) -> Tensor:
        return value.reshape(*self.label.prev.shape, *value.shape[1:])

    def _sized(self, xs: tuple[Any, ...], constants: dict[str, Any]) -> Any:
        """A first step that only tells the shapes of States: one hypothesis is enough for that."""
        label = self.label.prev[:, 0]
        for step in self._steps():
            more = xs if step is self.model else ()
            output = step(label, *more, **constants_for(step, constants))
            if step is self.model:
                self.size_own(output)
        return label

    def size_own(self, output: Any) -> None:
        """Say the shapes of own States that depend on what the model gives, for one hypothesis a row."""

    def _go_on(
        self, parent: Any, label: Tensor, score: Tensor, total: Tensor, log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write the search's own States. Returns (B, K): which hypotheses had ended before this step, and the
        log-probabilities of the labels."""
        before = self.ended.prev
        own = log_probs.gather(2, label.unsqueeze(2)).squeeze(2) if parent is None else _of(log_probs, parent, label)
        carried = _from(before, parent)
        dead = score == NEVER
        own = torch.where(carried | dead, torch.zeros_like(own), own)
        at_end = torch.zeros_like(carried) if self.end is None else label == self.end
        label = torch.where(carried | dead, label.new_full((), self.end or 0), label)
        self.label.next = label
        self.ended.next = carried | dead | at_end
        self.total.next, self.score.next = total, score
        self.taken.next = self.taken.prev + 1
        if self.remembers:
            self._remember(parent, label, carried | dead)
        self.done.next = self.ended.next.all(-1) | (self.taken.next >= self.limit.prev) | self.finished_early()
        return before, own

    def finished_early(self) -> Tensor:
        """(B,) whether the rest of a row is of no interest, though not all of its hypotheses have ended."""
        return torch.zeros_like(self.done.prev)

    def _remember(self, parent: Any, label: Tensor, over: Tensor) -> None:
        labels = self.labels.prev
        if parent is not None:
            labels = labels.gather(1, parent.unsqueeze(2).expand(labels.shape))
        here = torch.arange(labels.shape[2], device=label.device) == self.written.prev.reshape(-1, 1, 1)
        new = torch.where(over, labels.new_full((), -1), label).unsqueeze(2)
        self.labels.next = torch.where(here, new, labels)
        self.written.next = self.written.prev + 1

    def _result(self, parent: Tensor | None, log_prob: Tensor, output: Any) -> dict[str, Any]:
        label = self.label.next
        if parent is None:
            parent = torch.arange(self.copies, device=label.device).expand(label.shape[0], self.copies)
        kept = {name: pytree.tree_map(self._by_row, picked(output, name)) for name in self.keep}
        found = {"label": label, "parent": parent, "log_prob": log_prob, "kept": kept}
        if self.shows:
            labels = self.labels.next
            there = labels >= 0 if self.end is None else (labels >= 0) & (labels != self.end)
            found |= {"labels": labels, "lengths": there.sum(2), "scores": self.score.next}
        return found

    # what is left when the loop has ended

    def final_scores(self, state: dict[str, Tensor]) -> tuple[Tensor, Tensor | float]:
        """(scores (B, K), what a bound is multiplied with to be compared with them)."""
        return state["score"], 1.0

    def final_bound(self, outputs: dict[str, Any], state: dict[str, Tensor], taken: Tensor) -> Tensor:
        """(B,): no hypothesis that was given up, or is open still, can have a better score."""
        return torch.full_like(state["score"][:, 0], float("inf"))

    # what may come

    def _permitted(self, like: Tensor, rows: Tensor, constants: dict[str, Any], held: list[Copies]) -> Tensor | None:
        """(B, K, V) bool, or smaller; None where every label may come."""
        places = torch.arange(like.shape[2], device=like.device)
        found = None
        for label in self.suppress:
            found = places != label if found is None else found & (places != label)
        if self.end is not None:
            early = (self.taken.prev < self.least.prev).reshape(-1, 1, 1) & (places == self.end)
            found = ~early if found is None else found & ~early
        if self.constraint is not None:
            more, its = self._run(self.constraint, rows, (), constants)
            held.append(its)
            found = self._joined(found, self._by_row(self._as_mask(more, like)))
        if self.permits is not None:
            found = self._joined(found, self._by_row(self._as_mask(self.permits(self.labels.prev.flatten(0, 1)), like)))
        if self.no_repeat:
            found = self._joined(found, ~self._repeated(like))
        return found

    def _joined(self, one: Tensor | None, other: Tensor) -> Tensor:
        return other if one is None else one & other

    def _as_mask(self, mask: Any, like: Tensor) -> Tensor:
        _check_like(mask, like, "allowed= says for every label whether it may come: True, it may.", "bool")
        return mask

    def _repeated(self, like: Tensor) -> Tensor:
        """(B, K, V) bool: labels that would end a group of n which the hypothesis has already."""
        labels, n = self.labels.prev, self.no_repeat
        room, count = labels.shape[2], self.written.prev.reshape(-1, 1, 1)
        if room < n:
            return torch.zeros_like(like, dtype=torch.bool)
        last = room - n + 1
        place = torch.arange(last, device=like.device)
        match = place + n <= count
        for j in range(n - 1):
            at = (count - (n - 1) + j).clamp(min=0).expand(*labels.shape[:2], 1)
            match = match & (labels[:, :, j : j + last] == labels.gather(2, at))
        ends = labels[:, :, n - 1 : n - 1 + last].clamp(min=0)
        zeros = torch.zeros_like(like)
        return zeros.scatter_add(2, ends, match.expand_as(ends).to(zeros.dtype)) > 0

    # checks

    def _check_scores(self, scores: Any) -> None:
        if not isinstance(scores, Tensor) or scores.dim() != 2 or not scores.is_floating_point():
            raise InputError(
                message(
                    "A model for search gives scores of every label that may come next.",
                    expected="(B, V) floating; scores= says where they are in an output that is a tree",
                    found=describe(scores),
                    fix='scores="scores"' if isinstance(scores, dict) else "scores=0",
                )
            )
        size = scores.shape[1]
        wrong = [label for label in (self.end, *self.suppress) if label is not None and not 0 <= label < size]
        if wrong:
            raise InputError(
                message(
                    f"There is no label {wrong[0]}: the model gives scores of {size}.",
                    expected=f"end= and suppress= between 0 and {size - 1}",
                    found=str(wrong[0]),
                )
            )

    def _nan(self, scores: Tensor) -> Tensor:
        """(B, K) which hypotheses got a score that is no number."""
        return self._by_row(torch.isnan(scores).any(-1))


class NextLabels(Step):
    """An n-gram scorer as a scorer of a search: of the labels that may come after the one before."""

    never_positive = True  # though what a model that backs off gives need not sum to one

    def __init__(self, scorer: NGramScorer) -> None:
        super().__init__()
        self.scorer = scorer
        self.begun = State(init=False, dtype=torch.bool)

    def step(self, label: Tensor) -> Tensor:
        node = self.scorer.node.prev
        self.scorer(label)
        # The scorer knows itself what stands before the first word.
        self.scorer.node.rewrite(torch.where(self.begun.prev, self.scorer.node.latest, node))
        self.begun.next = torch.ones_like(self.begun.prev)
        return self.scorer.all_next()


def as_scorer(scorer: Any) -> Step:
    step = checked_step(scorer, "a scorer")
    return NextLabels(cast("NGramScorer", step)) if hasattr(step, "all_next") else step


def checked_step(model: Any, what: str) -> Step:
    model = model.step if isinstance(model, Loop) else model
    if not isinstance(model, Step):
        raise StepError(
            message(
                f"{what[0].upper()}{what[1:]} of a search is a Step.",
                expected="a Step or a Loop whose first argument is the label before this step, (B,) int64",
                found=describe(model),
            )
        )
    return model


def _check_like(value: Any, scores: Tensor, what: str, kind: str) -> None:
    """Whether a scorer or a constraint gives one value for each of the model's labels."""
    size = scores.shape[-1]
    is_kind = isinstance(value, Tensor) and (value.dtype == torch.bool if kind == "bool" else value.is_floating_point())
    if not is_kind or value.dim() != 2 or value.shape[1] != size:
        raise InputError(message(what, expected=f"(B, {size}) {kind}, as many as the model's", found=describe(value)))


def whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < least:
        found = repr(value) if isinstance(value, int) else describe(value)
        raise InputError(message(f"A search's `{name}` is a whole number.", expected=f">= {least}", found=found))
    return int(value)


def _from(value: Tensor, parent: Tensor | None) -> Tensor:
    return value if parent is None else value.gather(1, parent)


def _of(values: Tensor, parent: Tensor, label: Tensor) -> Tensor:
    """values (B, K, V) at (parent, label)."""
    return values.flatten(1).gather(1, parent * values.shape[2] + label)
