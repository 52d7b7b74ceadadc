"""Beam search, which says whether what it found is the best there is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..compiler.largest import largest_places
from ..errors import InputError, message
from ..loop import Loop
from ..state import State
from ..step import Step
from ..tracebacks import ends_at_the_call
from .copies import picked
from .hypotheses import Hypotheses
from .penalties import LengthPenalty, coverage_options, coverage_score
from .penalties import length_penalty as as_penalty
from .run import run_search
from .search import NEVER, Choice, Search, whole


class Beam(Search):
    """The K best hypotheses of each row, best first. One that has ended keeps its place while it is among them.

    sl.Loop(Beam(model, start=bos, end=eos, max_steps=60, size=8), until="done"); see `Search` for further options.

    size:   K.  n_best: how many are wanted; `stop="exact"` looks at those.
    length_penalty: None (sums of log-probabilities), ("gnmt", alpha), ("average",), ("per_label", reward), "returnn",
            or a function (log_prob, length) -> score whose attribute `monotone` says whether it is (see penalties.py).
            length: labels without the end.
    coverage: ("gnmt", beta, weights): beta * sum_s log(min(sum_t weights_ts, 1)) is added (Wu et al. 2016); weights: a
            key, an index or a function of the model's output: (B, S).
    groups, diversity: K / groups hypotheses in each of `groups` groups, which are chosen one after the other; a label
            that earlier groups took at the same step costs `diversity` each time (Vijayakumar et al. 2018, Hamming).
    stop:   "exact": when nothing open can come before the n best any more (Huang et al. 2017); "all": when all K have
            ended; ("patience", p): when p * K hypotheses have ended, those that fell out of the beam since included
            (Kasai et al. 2022).

    Each step gives `bound` (B,) too: no hypothesis that it gave up can have a better score.

    What is proved stands on scores that only fall. Scorers, and a model with `normalised`, may give other numbers than
    log-probabilities. Theirs are taken for such as long as they sum to one at most over the labels. A scorer whose
    attribute `never_positive` is True need only not be positive. Where that does not hold, nothing of the row is proved
    and "exact" goes on as "all" does.
    """

    def __init__(
        self,
        model: Step | Loop[Any],
        start: int,
        end: int | None,
        max_steps: int,
        size: int = 8,
        *,
        n_best: int = 1,
        length_penalty: Any = None,
        coverage: Any = None,
        groups: int = 1,
        diversity: float = 0.0,
        stop: Any = "exact",
        **options: Any,
    ) -> None:
        _check_counts(whole("size", size, 1), whole("n_best", n_best, 1), whole("groups", groups, 1))
        first = torch.full((size,), NEVER, device="cpu")
        first[:: size // groups] = 0.0  # all hypotheses of a group are the same at first: one is enough
        super().__init__(model, start, end, max_steps, copies=size, first=first, **options)
        self.n_best, self.groups, self.diversity = n_best, groups, float(diversity)
        self.penalty: LengthPenalty = as_penalty(length_penalty)
        self.coverage: Any = coverage_options(coverage)  # (a weight, the name of what is looked at), or None
        self.most_ends = _ends_to_stop(stop, size)
        self.exact = stop == "exact" and self._bounded()
        self.ends: Any = None if self.most_ends is None else State(init=0, dtype=torch.int64)
        self.covered: Any = None if self.coverage is None else State(...)
        looks = self._bounded() and (self.normalised or len(self.scorers) > 0)
        self.falling = State(init=True, dtype=torch.bool) if looks else None  # (B,) whether scores have only fallen

    def _bounded(self) -> bool:
        """Whether the penalty's bound holds: what labels and coverage still add must not be positive."""
        return all(weight >= 0 for weight in self.weights) and (self.coverage is None or self.coverage[0] >= 0)

    @property
    def provable(self) -> bool:
        """Whether there is a bound on everything that was given up."""
        return self._bounded() and self.penalty.monotone and self.groups == 1

    def heed(self, values: Tensor, never_positive: bool = False) -> None:
        if self.falling is None:
            return
        most = values.amax(-1) if never_positive else torch.logsumexp(values, -1) - SUMS_TO_ONE
        ok = (self._by_row(most) <= 0) | self.ended.prev
        self.falling.rewrite(self.falling.latest & ok.all(-1))

    def size_own(self, output: Any) -> None:
        if self.covered is not None:
            weights = picked(output, self.coverage[1])
            self.covered.sized(self.copies, *weights.shape[1:], like=weights)

    def choose(self, gains: Tensor, output: Any) -> Choice:
        ended, step, size = self.ended.prev, self.taken.prev, gains.shape[2]
        totals = self.total.prev.unsqueeze(2) + gains
        is_end = torch.arange(size, device=gains.device) == (-1 if self.end is None else self.end)
        lengths = (step + 1).reshape(-1, 1, 1) - is_end.to(torch.int64)  # of what is open: one label at every step
        lengths = lengths.expand(totals.shape)
        values = self.penalty.candidates(totals, lengths)
        if self.covered is not None:
            covered, reward = self._coverage(output)
            values = values + reward.unsqueeze(2)
        values = torch.where(totals == NEVER, NEVER, values)
        held = self.penalty.carried(self.score.prev, step.unsqueeze(1)).unsqueeze(2)
        values = torch.where(ended.unsqueeze(2), torch.where(is_end, held, NEVER), values)
        totals = torch.where(ended.unsqueeze(2), self.total.prev.unsqueeze(2), totals)
        index, score, rest = self._chosen(values)
        total = torch.where(score > NEVER, totals.flatten(1).gather(1, index), NEVER)
        parent = torch.div(index, size, rounding_mode="floor")
        label = index - parent * size
        more = {"bound": self._given_up(rest, totals, ended.unsqueeze(2) | is_end)}
        if self.ends is not None:
            newly = ~ended.gather(1, parent) & (label == (-1 if self.end is None else self.end)) & (score > NEVER)
            self.ends.next = self.ends.prev + newly.sum(1)
        if self.covered is not None:
            self.covered.next = covered.gather(1, parent.unsqueeze(2).expand(covered.shape))
        return parent, label, score, total, more

    def _coverage(self, output: Any) -> tuple[Tensor, Tensor]:
        """(what each hypothesis has looked at (B, K, S), the penalty (B, K))."""
        weights = self._by_row(picked(output, self.coverage[1]))
        before = self.covered.sized(self.copies, *weights.shape[2:], like=weights)
        covered = before + torch.where(self.ended.prev.unsqueeze(2), torch.zeros_like(weights), weights)
        return covered, coverage_score(covered, self.coverage[0])

    def _chosen(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, K) the best of (B, K, V), numbered over K * V; their values; all values with -inf in those places."""
        size, count = values.shape[2], self.copies // self.groups
        if self.groups == 1:
            index, score, rest = best(values.flatten(1), count)
            return index, score, rest.reshape(values.shape)
        places = torch.arange(size, device=values.device)
        taken = torch.zeros_like(values[:, 0])
        found, scores, left = [], [], []
        for g in range(self.groups):
            own = values[:, g * count : (g + 1) * count]
            over = self.ended.prev[:, g * count : (g + 1) * count].unsqueeze(2)  # these take no label, so it costs none
            cost = torch.where(over, torch.zeros_like(taken).unsqueeze(1), self.diversity * taken.unsqueeze(1))
            index, alive, rest = best((own - cost).flatten(1), count)
            alive = alive > NEVER
            scores.append(torch.where(alive, own.flatten(1).gather(1, index), NEVER))
            parent = torch.div(index, size, rounding_mode="floor") + g * count
            alive = alive & ~self.ended.prev.gather(1, parent)
            chosen = (index % size).unsqueeze(2) == places
            taken = taken + (chosen & alive.unsqueeze(2)).to(taken.dtype).sum(1)
            found.append(index + g * count * size)
            left.append(torch.where(rest.reshape(own.shape) == NEVER, NEVER, own))
        return torch.cat(found, 1), torch.cat(scores, 1), torch.cat(left, 1)

    def _given_up(self, rest: Tensor, totals: Tensor, closed: Tensor) -> Tensor:
        """(B,) the best score that any candidate which is left out could still have reached."""
        steps = self.taken.prev + 1
        there = rest > NEVER
        growing = torch.where(there & ~closed, totals, NEVER).amax((1, 2))
        complete = torch.where(there & closed, rest, NEVER).amax((1, 2))
        bound = self.penalty.bound(growing, steps, self.limit.prev)
        return torch.maximum(bound, self.penalty.comparable(complete, steps))

    def finished_early(self) -> Tensor:
        if self.most_ends is not None:
            return self.ends.next >= self.most_ends
        if not self.exact:
            return torch.zeros_like(self.done.prev)
        ended, steps = self.ended.next, self.taken.next
        growing = torch.where(ended, NEVER, self.total.next).amax(1)
        bound = self.penalty.bound(growing, steps, self.limit.prev)
        score = self.penalty.comparable(self.score.next, steps.unsqueeze(1))
        settled = ended & (score > NEVER) & (score >= bound.unsqueeze(1))
        if self.falling is not None:
            settled = settled & self.falling.latest.unsqueeze(1)
        return settled.sum(1) >= self.n_best

    def final_scores(self, state: dict[str, Tensor]) -> tuple[Tensor, Tensor | float]:
        cut = (~state["ended"]).any(1) & (state["taken"] >= state["limit"])
        return self.penalty.final(state["score"], state["taken"], cut)

    def final_bound(self, outputs: dict[str, Any], state: dict[str, Tensor], taken: Tensor) -> Tensor:
        bounds = torch.where(taken, outputs["bound"], NEVER)
        if not self.provable:
            return torch.full_like(state["score"][:, 0], float("inf"))
        is_open = ~state["ended"] & (state["taken"] < state["limit"]).unsqueeze(1)
        growing = torch.where(is_open, state["total"], NEVER).amax(1)
        bound = self.penalty.bound(growing, state["taken"], state["limit"])
        bound = torch.maximum(bound, bounds.amax(0)) if len(bounds) else bound
        return bound if self.falling is None else torch.where(state["falling"], bound, float("inf"))


SUMS_TO_ONE = 1e-3  # how far the logarithm of the sum of probabilities may lie above zero: rounding


def best(values: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, count) where the largest of (B, N) are, the first of equal ones first; what they are; the rest.

    The rest is the values with -inf in those places. Where there are fewer above -inf, some place comes with -inf.
    """
    size = values.shape[1]
    padded = torch.nn.functional.pad(values, (0, count - size), value=NEVER) if count > size else values
    found = largest_places(padded, count)
    largest = padded.gather(1, found)
    rest = _rest(values, largest[:, -1:], found[:, -1:])
    return found.clamp(max=size - 1) if count > size else found, largest, rest


def _rest(values: Tensor, value: Tensor, place: Tensor) -> Tensor:
    places = torch.arange(values.shape[1], device=values.device)
    return torch.where(_after(values, places, value, place), values, NEVER)


def _after(values: Tensor, places: Tensor, value: Tensor, place: Tensor) -> Tensor:
    """Which values come after one (B, 1) in falling order, of equal ones those in later places."""
    return (values < value) | ((values == value) & (places > place))


def _check_counts(size: int, n_best: int, groups: int) -> None:
    if n_best > size or size % groups:
        raise InputError(
            message(
                "A beam search's numbers do not fit together.",
                expected="n_best <= size, and size a multiple of groups",
                found=f"size={size}, n_best={n_best}, groups={groups}",
            )
        )


def _ends_to_stop(stop: Any, size: int) -> int | None:
    """How many hypotheses have to end, by `stop`; None: something else decides."""
    if stop in ("exact", "all"):
        return None
    if isinstance(stop, (tuple, list)) and len(stop) == 2 and stop[0] == "patience" and stop[1] > 0:
        return math.ceil(stop[1] * size)
    raise InputError(
        message("There is no such stop rule.", expected='"exact", "all" or ("patience", p), p > 0', found=repr(stop))
    )


@ends_at_the_call
def beam(
    model: Step | Loop[Any],
    *,
    start: int | Tensor,
    end: int | None,
    max_steps: int | Tensor,
    size: int = 8,
    n_best: int = 1,
    length_penalty: Any = None,
    coverage: Any = None,
    groups: int = 1,
    diversity: float = 0.0,
    scorers: Sequence[tuple[float, Step]] = (),
    stop: Any = "exact",
    min_steps: int | Tensor = 0,
    prefix: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    suppress: Any = (),
    allowed: Any = None,
    no_repeat: int = 0,
    keep: Any = (),
    scores: Any = None,
    normalised: bool = False,
    xs: tuple[Any, ...] = (),
    state: Any = None,
    batch_size: int | None = None,
    backend: str = "auto",
    **constants: Any,
) -> Hypotheses:
    """Beam search: `hyps = sl.search.beam(model, start=bos, end=eos, max_steps=60, size=8, memory=memory)`.

    size, n_best, length_penalty, coverage, groups, diversity, stop: see `Beam`.  All others: see `greedy`.

    Hypotheses of a search that stops by length are results like those that ended (`finished` says which). Where fewer
    than n_best exist the others have score -inf.

    Returns Hypotheses with N = n_best. `proved_best` says where no label sequence whatever within the limits has a
    better score: everything that was given up is bounded, by its log-probability and the penalty (Huang et al. 2017,
    arXiv:1704.01314, for the stop rule). It is False with groups, with penalties that give no bound, and with
    scorers of negative weight.
    """
    options = {
        "n_best": n_best, "length_penalty": length_penalty, "coverage": coverage, "groups": groups,
        "diversity": diversity, "stop": stop, "suppress": suppress, "allowed": allowed, "no_repeat": no_repeat,
        "scorers": scorers, "keep": keep, "scores": scores, "normalised": normalised, "size": size,
    }  # fmt: skip
    return run_search(
        Beam, model, options, n_best, start=start, end=end, max_steps=max_steps, min_steps=min_steps, prefix=prefix,
        prefix_lengths=prefix_lengths, xs=xs, state=state, batch_size=batch_size, backend=backend, constants=constants,
    )  # fmt: skip
