"""Sampling: labels drawn from the model's distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, message
from ..loop import Loop
from ..state import State
from ..step import Step
from ..tracebacks import ends_at_the_call
from .beam import best
from .greedy import going_on
from .hypotheses import Hypotheses
from .run import run_search
from .search import NEVER, Choice, Search, whole


class Sample(Search):
    """`samples` hypotheses of each row, drawn independently: each label from softmax(scores / temperature).

    sl.Loop(Sample(model, start=bos, end=eos, max_steps=60, samples=5), until="done"); see `Search` for more options.

    temperature: above 0.  Then, in this order, only these labels are left: the top_k best; the fewest best ones whose
    probabilities sum to top_p at least (Holtzman et al. 2020); those with a probability of at least min_p times the
    best one's (Nguyen et al. 2024). Of equally good labels the first is kept. `score` is the sum of log-probabilities
    as the model gives them, scorers included.
    """

    def __init__(
        self,
        model: Step | Loop[Any],
        start: int,
        end: int | None,
        max_steps: int,
        samples: int = 1,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, start, end, max_steps, copies=whole("samples", samples, 1), **options)
        self.temperature, self.top_p, self.min_p = temperature, top_p, min_p
        self.top_k = None if top_k is None else whole("top_k", top_k, 1)
        check_filters(temperature, top_p, min_p)

    def choose(self, gains: Tensor, output: Any) -> Choice:
        draw = torch.rand(self.label.prev.shape, device=gains.device)
        label = drawn(self.filtered(gains).softmax(-1), draw.to(gains.dtype))
        return going_on(self, gains, label)

    def filtered(self, gains: Tensor) -> Tensor:
        """The values (..., V) whose softmax labels are drawn from, -inf where one is left out."""
        some = gains.amax(-1, keepdim=True) > NEVER  # a hypothesis that no label is allowed to: any will do
        gains = torch.where(some, gains / self.temperature, torch.zeros_like(gains))
        if self.top_k is not None or self.top_p is not None:
            gains = torch.where(self._best_labels(gains), gains, NEVER)
        if self.min_p is not None:
            probability = gains.softmax(-1)
            gains = torch.where(probability >= self.min_p * probability.amax(-1, keepdim=True), gains, NEVER)
        return gains

    def _best_labels(self, gains: Tensor) -> Tensor:
        """(..., V) bool, by top_k and top_p."""
        values, order = torch.sort(gains, dim=-1, descending=True, stable=True)
        rank = torch.arange(gains.shape[-1], device=gains.device).expand(gains.shape)
        keep = torch.ones_like(rank, dtype=torch.bool)
        if self.top_k is not None:
            keep = rank < self.top_k
        if self.top_p is not None:
            probability = torch.where(keep, values, NEVER).softmax(-1)
            keep = keep & ((probability.cumsum(-1) - probability < self.top_p) | (rank == 0))
        return torch.zeros_like(keep).scatter(-1, order, keep)


class SampleWithoutReplacement(Sample):
    """`samples` different hypotheses of each row, as if drawn one after the other without replacement.

    Stochastic beam search (Kool et al. 2019, arXiv:1903.06059): a beam search over log-probabilities with Gumbel noise,
    the noise of a hypothesis' extensions being such that their largest is its own.  State `noisy` (B, K): those values,
    from which importance weights are made.  drawn_log_prob (B, K): log-probabilities of what is drawn from.
    """

    def __init__(
        self, model: Step | Loop[Any], start: int, end: int | None, max_steps: int, samples: int = 1, **options: Any
    ) -> None:
        first = torch.full((whole("samples", samples, 1),), NEVER, device="cpu")
        first[0] = 0.0
        super().__init__(model, start, end, max_steps, samples, first=first, **options)
        self.noisy, self.drawn_log_prob = State(samples, init=first), State(samples, init=first)

    def choose(self, gains: Tensor, output: Any) -> Choice:
        ended, size = self.ended.prev.unsqueeze(2), gains.shape[2]
        own = torch.where(gains == NEVER, NEVER, torch.log_softmax(self.filtered(gains), -1))
        log_prob = self.drawn_log_prob.prev.unsqueeze(2) + own
        noise = -torch.log(-torch.log(torch.rand_like(gains).clamp(1e-30, 1 - 1e-7)))
        noisy = conditioned(log_prob + noise, self.noisy.prev.unsqueeze(2))
        noisy = torch.where(log_prob == NEVER, NEVER, noisy)
        is_end = torch.arange(size, device=gains.device) == (0 if self.end is None else self.end)
        noisy = torch.where(ended, torch.where(is_end, self.noisy.prev.unsqueeze(2), NEVER), noisy)
        log_prob = torch.where(ended, self.drawn_log_prob.prev.unsqueeze(2), log_prob)
        totals = torch.where(ended, self.total.prev.unsqueeze(2), self.total.prev.unsqueeze(2) + gains)
        index, self.noisy.next, _ = best(noisy.flatten(1), self.copies)
        self.drawn_log_prob.next = log_prob.flatten(1).gather(1, index)
        total = totals.flatten(1).gather(1, index)
        total = torch.where(self.noisy.next == NEVER, NEVER, total)
        parent = torch.div(index, size, rounding_mode="floor")
        return parent, index - parent * size, total, total, {}


def conditioned(values: Tensor, largest: Tensor) -> Tensor:
    """Gumbel values (..., V) as if their largest were `largest` (..., 1); Kool et al. 2019, appendix B.3."""
    found = values.amax(-1, keepdim=True)
    some = (found > NEVER) & (largest > NEVER)
    found, largest = (torch.where(some, value, torch.zeros_like(value)) for value in (found, largest))
    rest = largest - values + torch.log1p(-torch.exp(torch.clamp(values - found, max=0.0)))
    return torch.where(some, largest - rest.clamp(min=0) - torch.log1p(torch.exp(-rest.abs())), NEVER)


def drawn(probabilities: Tensor, draw: Tensor) -> Tensor:
    """Labels (...) of probabilities (..., V), by draws (...) from [0, 1): the first whose cumulative one is above."""
    cumulative = probabilities.cumsum(-1)
    above = cumulative > (draw * cumulative[..., -1]).unsqueeze(-1)
    # Rounding may leave none above.
    return torch.where(above.any(-1), above.to(torch.int64).argmax(-1), probabilities.argmax(-1))


def check_filters(temperature: float, top_p: float | None, min_p: float | None) -> None:
    """InputError for a temperature that is not positive, and for shares outside of (0, 1]."""
    if not temperature > 0:
        wanted = "a number above 0; for the best label always: sl.search.greedy"
        raise InputError(message("A temperature is positive.", expected=wanted, found=repr(temperature)))
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0 < value <= 1:
            raise InputError(message(f"`{name}` is a probability.", expected=f"0 < {name} <= 1", found=repr(value)))


@ends_at_the_call
def sample(
    model: Step | Loop[Any],
    *,
    start: int | Tensor,
    end: int | None,
    max_steps: int | Tensor,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    without_replacement: bool = False,
    generator: torch.Generator | None = None,
    min_steps: int | Tensor = 0,
    prefix: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    suppress: Sequence[int] = (),
    allowed: Any = None,
    no_repeat: int = 0,
    scorers: Any = (),
    keep: Any = (),
    scores: Any = None,
    normalised: bool = False,
    xs: tuple[Any, ...] = (),
    state: Any = None,
    batch_size: int | None = None,
    backend: str = "auto",
    **constants: Any,
) -> Hypotheses:
    """Samples: `hyps = sl.search.sample(model, start=bos, end=eos, max_steps=60, samples=5, memory=memory)`.

    samples, temperature, top_k, top_p, min_p: see `Sample`.
    without_replacement: the samples of a row differ, see `SampleWithoutReplacement`; where fewer hypotheses exist the
                others have score -inf.
    generator:  where random numbers come from; None: torch's own. The same state of it gives the same samples.
    All others: see `greedy`.

    Returns Hypotheses with N = samples, best first.
    """
    options = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "suppress": suppress,
        "allowed": allowed, "no_repeat": no_repeat, "scorers": scorers, "keep": keep, "scores": scores,
        "normalised": normalised, "samples": samples,
    }  # fmt: skip
    check_filters(temperature, top_p, min_p)
    kind = SampleWithoutReplacement if without_replacement else Sample
    with nullcontext() if generator is None else _seeded_by(generator):
        return run_search(
            kind, model, options, whole("samples", samples, 1), start=start, end=end, max_steps=max_steps,
            min_steps=min_steps, prefix=prefix, prefix_lengths=prefix_lengths, xs=xs, state=state,
            batch_size=batch_size, backend=backend, constants=constants,
        )  # fmt: skip


@contextmanager
def _seeded_by(generator: torch.Generator) -> Iterator[None]:
    """Torch's own generators seeded by a draw from `generator`; afterwards they are what they were."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
