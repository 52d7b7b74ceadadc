"""Beam search against searches written by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from plain_search import every_hypothesis, pairs, plain_beam
from torch import nn
from torch.nn import functional as F

import steploop as sl
from steploop.search.beam import best

LABELS, STEPS, START, END = 3, 3, 1, 0


class Model(sl.Step):
    """GRU with attention; scores and weights in a dict."""

    def __init__(self, labels=LABELS, size=4, sharp=3.0):
        super().__init__()
        self.embedding = nn.Embedding(labels, size)
        self.cell = sl.nn.GRUCell(2 * size, size)
        self.head = nn.Linear(size, labels)
        self.context = sl.State(size)
        self.sharp = sharp

    def step(self, label, *, memory):
        h = self.cell(torch.cat([self.embedding(label), self.context.prev], -1))
        weights = torch.softmax((memory * h.unsqueeze(1)).sum(-1), -1)
        self.context.next = (weights.unsqueeze(2) * memory).sum(1)
        return {"scores": self.sharp * self.head(h + self.context.next), "weights": weights}


class Bigram(sl.Step):
    """Log-probabilities that depend on the label before and on how many there were."""

    def __init__(self, labels=LABELS):
        super().__init__()
        self.table = nn.Parameter(torch.randn(labels, labels))
        self.count = sl.State(init=0, dtype=torch.int64)

    def step(self, label):
        self.count.next = self.count.prev + 1
        return torch.log_softmax(self.table[label] + 0.1 * self.count.prev.unsqueeze(1), -1)


class NotTwice(sl.Step):
    """A constraint with a State: label 2 at most once."""

    def __init__(self):
        super().__init__()
        self.seen = sl.State(init=False, dtype=torch.bool)

    def step(self, label):
        self.seen.next = self.seen.prev | (label == 2)
        labels = torch.arange(LABELS, device=label.device)
        return ~(self.seen.next.unsqueeze(1) & (labels == 2))


def falling(log_prob, length):
    return log_prob - 0.3 * length


falling.monotone = True

OPTIONS = {
    "min_steps": 2, "suppress": (2,), "no_repeat": 2, "allowed": NotTwice(), "scorers": True, "prefix": [2, 1],
    "coverage": ("gnmt", 0.4, "weights"), "length_penalty": ("gnmt", 0.7), "stop": "all", "max_steps": (3, 2),
}  # fmt: skip
PENALTIES = [("average",), ("per_label", 0.8), falling, lambda log_prob, length: log_prob / (1 + length) ** 0.5]


def both(model, memory, options, backend, size=LABELS**STEPS, n_best=4, **more):
    """(what beam search found of each row, every hypothesis of each row)."""
    options = dict(options)
    scorers = options.pop("scorers", None)
    if scorers is not None:
        options["scorers"] = [(0.6, Bigram().double())] if scorers is True else scorers
    rows = len(memory)
    prefix, limits = options.pop("prefix", None), options.pop("max_steps", (STEPS,))
    limits = [limits[b % len(limits)] for b in range(rows)]
    given = {} if prefix is None else {"prefix": torch.tensor(prefix)[:, None].expand(-1, rows)}
    hyps = sl.search.beam(
        model, start=START, end=END, max_steps=torch.tensor(limits), size=size, n_best=n_best, scores="scores",
        memory=memory, backend=backend, **given, **options, **more,
    )  # fmt: skip
    options.pop("stop", None)
    by_hand = {"penalty": options.pop("length_penalty", None), **options, "prefix": prefix or ()}
    if isinstance(by_hand.get("coverage"), tuple):
        by_hand["coverage"] = by_hand["coverage"][1:]
    if "allowed" in by_hand:
        by_hand["allowed"] = lambda so_far: [True, True, 2 not in so_far]
    everything = [
        every_hypothesis(model, LABELS, limits[b], START, END, scores="scores", memory=memory[b : b + 1], **by_hand)
        for b in range(rows)
    ]
    return hyps, everything


def compare(hyps, everything, n_best):
    for b, all_of_row in enumerate(everything):
        for n in range(n_best):
            if n >= len(all_of_row):
                assert hyps.scores[b, n] == -math.inf
                continue
            score, labels, log_prob, finished = all_of_row[n]
            assert float(hyps.scores[b, n]) == pytest.approx(score, rel=1e-9)
            assert hyps.to_lists()[b][n] == labels and bool(hyps.finished[b, n]) == finished
            assert float(hyps.log_probs[b, n]) == pytest.approx(log_prob, rel=1e-9)
            assert float(hyps.label_log_probs[b, n].sum()) == pytest.approx(log_prob, rel=1e-9)


@pytest.mark.parametrize("options", pairs(OPTIONS), ids=lambda options: "-".join(options) or "plain")
def test_a_beam_as_wide_as_all_sequences_finds_the_best(options):
    torch.manual_seed(len(str(options)))
    hyps, everything = both(Model().double(), torch.randn(2, 3, 4, dtype=torch.float64), options, "reference")
    compare(hyps, everything, 4)


ONE_LOOP = {
    "suppress": (2,),
    "min_steps": 1,
    "coverage": OPTIONS["coverage"],
    "length_penalty": OPTIONS["length_penalty"],
}


@pytest.mark.parametrize(
    ("option", "backend"),
    [("all", "cpu"), ("allowed", "cpu"), ("scorers", "cpu"), ("no_repeat", "auto"), ("all", "eager")],
)
def test_compiled_searches_do_the_same(option, backend):
    torch.manual_seed(1)
    options = {option: OPTIONS[option]} if option in OPTIONS else dict(ONE_LOOP)
    if options.pop("scorers", False):
        options["scorers"] = [(0.6, Bigram().double())]
    model = Model().double()
    for batch, size in [(3, 4), (1, 4)] if option == "all" and backend == "cpu" else [(3, 4)]:
        memory = torch.randn(batch, size, 4, dtype=torch.float64)
        found, expected = (
            sl.search.beam(
                model, start=START, end=END, max_steps=6, size=3, n_best=3, scores="scores", keep="weights",
                memory=memory, backend=name, **options,
            )
            for name in (backend, "reference")
        )  # fmt: skip
        for name in ("labels", "lengths", "scores", "log_probs", "label_log_probs", "finished", "proved_best", "bound"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))
        torch.testing.assert_close((found.kept, dict(found.state)), (expected.kept, dict(expected.state)))


@pytest.mark.parametrize("count", [1, 3, 8, 20])
@pytest.mark.parametrize("size", [1, 5, 32, 33, 200])
def test_the_best_come_in_order_and_of_equal_ones_the_first(size, count):
    for kind in range(3):
        values = torch.randn(6, size) if kind == 0 else torch.randint(0, 3, (6, size)).float()
        if kind == 2:
            values[values == 0] = -math.inf
        index, largest, rest = best(values, count)
        ordered = torch.sort(values, dim=1, descending=True, stable=True)
        there = min(count, size)
        alive = ordered.values[:, :there] > -math.inf
        assert torch.equal(largest[:, :there], ordered.values[:, :there]) and (largest[:, there:] == -math.inf).all()
        assert torch.equal(index[:, :there][alive], ordered.indices[:, :there][alive])
        assert torch.equal(rest, values.scatter(1, ordered.indices[:, :there], -math.inf))


@pytest.mark.parametrize("penalty", PENALTIES, ids=["average", "per_label", "monotone", "function"])
def test_every_length_penalty(penalty):
    for seed in range(5):
        torch.manual_seed(seed)
        memory = torch.randn(2, 3, 4, dtype=torch.float64)
        hyps, everything = both(Model().double(), memory, {"length_penalty": penalty}, "reference")
        compare(hyps, everything, 4)


def test_what_is_proved_best_is_best(request):
    model, proved, right, total = Model().double(), 0, 0, 0
    penalties = [None, ("gnmt", 0.6), ("average",), ("per_label", 0.4), falling]
    rounds = 1000 if request.config.getoption("--long") else 40
    for seed in range(rounds):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        memory = torch.randn(5, 3, 4, dtype=torch.float64)
        penalty = penalties[seed % len(penalties)]
        options = {"length_penalty": penalty}
        hyps, everything = both(model, memory, options, "reference", size=1 + seed % 4, n_best=1)
        for b, row in enumerate(everything):
            found, best = float(hyps.scores[b, 0]), row[0][0]
            assert found <= best + 1e-9
            is_best = found >= best - 1e-9
            assert is_best or not bool(hyps.proved_best[b]), (seed, b)
            assert best <= max(float(hyps.bound[b]), found) + 1e-9
            proved, right, total = proved + bool(hyps.proved_best[b]), right + is_best, total + 1
    assert proved >= 0.5 * right, (proved, right, total)


BY_HAND = {
    "groups": {"groups": 2, "diversity": 0.9}, "many groups": {"groups": 4, "diversity": 0.3},
    "patience": {"stop": ("patience", 0.5)}, "much patience": {"stop": ("patience", 1.5)},
    "returnn": {"penalty": "returnn"}, "average": {"penalty": ("average",)}, "gnmt": {"penalty": ("gnmt", 0.7)},
    "min_steps": {"min_steps": 2}, "suppress": {"suppress": (3,)}, "no_repeat": {"no_repeat": 2},
}  # fmt: skip


def two_of(options):
    """Every option alone, and every two that can stand together."""
    found = [(name,) for name in options]
    for a, b in itertools.combinations(options, 2):
        if not set(options[a]) & set(options[b]):
            found.append((a, b))
    return found


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("names", two_of(BY_HAND), ids="-".join)
def test_narrow_beams_do_as_a_search_by_hand(names, backend):
    """Every row is searched alone: RETURNN's scores depend on the batch."""
    options = {k: v for name in names for k, v in BY_HAND[name].items()}
    given = {"length_penalty" if k == "penalty" else k: v for k, v in options.items()}
    torch.manual_seed(len(str(names)))
    model = Model(5, sharp=2.0).double()
    for size in (4, 8) if backend == "reference" else (4,):
        for memory in torch.randn(3, 1, 3, 4, dtype=torch.float64):
            hyps = sl.search.beam(
                model, start=START, end=END, max_steps=5, size=size, n_best=size, scores="scores", memory=memory,
                backend=backend, **{"stop": "all", **given},
            )  # fmt: skip
            expected = plain_beam(model, size, 5, START, END, scores="scores", memory=memory, **options)
            for n, (score, labels, log_prob, finished) in enumerate(expected):
                assert float(hyps.scores[0, n]) == pytest.approx(score, rel=1e-9)
                assert float(hyps.log_probs[0, n]) == pytest.approx(log_prob, rel=1e-9)
                assert hyps.to_lists()[0][n] == labels and bool(hyps.finished[0, n]) == finished


class Reward(sl.Step):
    """Raises scores, late: a bound from log-probabilities that only fall knows nothing of it."""

    def __init__(self, sharp=3.0):
        super().__init__()
        self.table = nn.Parameter(torch.randn(STEPS, LABELS))
        self.at, self.sharp = sl.State(init=0, dtype=torch.int64), sharp

    def step(self, label):
        self.at.next = self.at.prev + 1
        return self.sharp * self.table[self.at.prev.clamp(max=STEPS - 1)]


class Penalty(Reward):
    never_positive = True

    def step(self, label):
        return -super().step(label).abs()


NARROW = {
    **{name: {name: option} for name, option in OPTIONS.items()},
    "reward": {"scorers": Reward},
    "penalty": {"scorers": Penalty},
    "scorers and average": {"scorers": True, "length_penalty": ("average",)},
    "allowed and coverage": {"allowed": NotTwice(), "coverage": OPTIONS["coverage"]},
    "min_steps and per_label": {"min_steps": 2, "length_penalty": ("per_label", 0.4)},
}


@pytest.mark.parametrize("name", NARROW)
def test_what_is_proved_best_with_other_options_is_best(name):
    proved, model = 0, Model().double()
    for seed in range(12):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        options = dict(NARROW[name])
        if isinstance(options.get("scorers"), type):
            options["scorers"] = [(0.6, options["scorers"]().double())]
        memory = torch.randn(4, 3, 4, dtype=torch.float64)
        hyps, everything = both(model, memory, options, "reference", size=1 + seed % 3, n_best=1)
        for b, row in enumerate(everything):
            is_best = not row or float(hyps.scores[b, 0]) >= row[0][0] - 1e-9
            assert is_best or not bool(hyps.proved_best[b]), seed
            proved += bool(hyps.proved_best[b])
    assert proved == 0 if name == "reward" else proved > 0


def test_scores_that_are_no_log_probabilities_are_seen():
    """`normalised` says that they are; where they are not, nothing is proved."""

    class Raw(Model):
        def step(self, label, *, memory):
            return super().step(label, memory=memory)["scores"]

    torch.manual_seed(0)
    memory, model = torch.randn(3, 3, 4, dtype=torch.float64), Raw().double()
    common = {"start": START, "end": END, "max_steps": STEPS, "memory": memory, "backend": "reference"}
    for size in (1, 2, 27):
        assert not sl.search.beam(model, size=size, normalised=True, **common).proved_best.any()
    assert sl.search.beam(model, size=27, **common).proved_best.all()


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_compiled_searches_see_rewards_too(backend):
    torch.manual_seed(3)
    model, memory = Model().double(), torch.randn(3, 3, 4, dtype=torch.float64)
    for scorer in (Reward().double(), Penalty().double()):
        found, expected = (
            sl.search.beam(
                model, start=START, end=END, max_steps=STEPS, size=2, n_best=2, scores="scores", memory=memory,
                scorers=[(0.5, scorer)], backend=name,
            )
            for name in (backend, "reference")
        )  # fmt: skip
        for name in ("labels", "scores", "proved_best", "bound"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))


class Reads(sl.Step):
    """A decoder over a memory with lengths."""

    def __init__(self):
        super().__init__()
        self.embedding, self.cell = nn.Embedding(9, 8), sl.nn.GRUCell(16, 8)
        self.attention, self.head = sl.nn.attention.GeneralAttention(8, 8), nn.Linear(8, 9)
        self.context = sl.State(8)

    def step(self, label, *, memory, memory_lengths):
        h = self.cell(torch.cat([self.embedding(label), self.context.prev], -1))
        self.context.next, _ = self.attention(h, memory=memory, memory_lengths=memory_lengths)
        return 4 * self.head(h + self.context.next)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_whatever_pads_the_memory(search, backend):
    torch.manual_seed(1)
    model, memory, lengths = Reads(), torch.randn(3, 6, 8), torch.tensor([6, 3, 4])
    padded = torch.full((3, 11, 8), float("nan"))
    padded[:, :6] = memory
    more = {"size": 4, "n_best": 4} if search == "beam" else {}
    found, expected = (
        getattr(sl.search, search)(
            model, start=1, end=0, max_steps=12, memory=m, memory_lengths=lengths, backend=backend, **more
        )
        for m in (padded, memory)
    )
    assert found.to_lists() == expected.to_lists()
    torch.testing.assert_close(found.scores, expected.scores)


@pytest.mark.parametrize("search", ["greedy", "sample", "beam"])
def test_the_same_bits_for_any_number_of_threads(search):
    torch.manual_seed(1)
    model, memory = Reads(), torch.randn(40, 6, 8)
    more = {"size": 4, "n_best": 4} if search == "beam" else {}
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(2)
            results.append(
                getattr(sl.search, search)(
                    model, start=1, end=0, max_steps=12, memory=memory, memory_lengths=torch.full((40,), 6),
                    backend="auto", **more,
                )
            )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for name in ("labels", "scores", "log_probs", "label_log_probs"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name


def test_a_wider_beam_of_sums_that_proves_its_result_is_never_worse():
    torch.manual_seed(0)
    model, memory = Model(labels=6).double(), torch.randn(8, 3, 4, dtype=torch.float64)
    scores = [
        sl.search.beam(
            model, start=1, end=0, max_steps=5, size=size, scores="scores", memory=memory, backend="reference"
        )
        for size in (1, 3, 9, 30, 200)
    ]
    for narrow, wide in zip(scores, scores[1:], strict=False):
        assert (wide.scores[narrow.proved_best] >= narrow.scores[narrow.proved_best] - 1e-12).all()
    assert scores[-1].proved_best.all()


# Models with States of every kind: the best hypotheses are those of a search that copies States by hand.


class Ints(sl.Step):
    """An int and a bool State, a table; no floating State at all."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 5))
        self.at = sl.State(init=2, dtype=torch.int64)
        self.odd = sl.State(init=False, dtype=torch.bool)

    def step(self, label):
        at = (self.at.prev * 3 + label + 1) % 7
        self.at.next, self.odd.next = at, self.odd.prev ^ (label % 2 == 1)
        return 2 * self.table[at] + torch.where(self.odd.next, 1.0, -1.0).unsqueeze(1) * self.table[0]


class Histories(sl.Step):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.attention = sl.memory.CausalSelfAttention(2, 4)
        self.history = sl.memory.History()
        self.delay = sl.memory.Delay(2)
        self.head = nn.Linear(4, 5)

    def step(self, label):
        x = self.embedding(label)
        past = self.history(x)
        y = self.attention(x) + self.delay(x) + past.values.sum(1) / past.lengths.unsqueeze(1)
        return 2 * self.head(torch.tanh(y))


class MaskedAndNested(sl.Step):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.rare = sl.memory.Masked(sl.nn.LSTMCell(4, 4))
        self.stack = sl.nn.Stack(sl.nn.GRUCell(4, 4), sl.nn.Residual(sl.nn.RNNCell(4, 4)))
        self.head = nn.Linear(4, 5)
        self.pair = sl.State(2, 4)

    def step(self, label):
        x = self.stack(self.embedding(label) + self.rare(self.embedding(label), where=label > 2))
        pair = self.pair.prev.clone()
        pair[:, 0] = pair[:, 1]
        pair[:, 1] = x
        self.pair.next = pair
        return (label, {"scores": 2 * self.head(torch.tanh(pair.sum(1)))})


class Begun(sl.Step):
    """Its State starts from a constant, of a size that the constant tells."""

    def __init__(self):
        super().__init__()
        self.h = sl.State(init=None)
        self.head = nn.Linear(3, 5)

    def begin(self, *, memory):
        self.h.prev = memory.mean(1)

    def step(self, label, *, memory, table):
        at = F.one_hot(label % memory.shape[1], memory.shape[1]).to(memory.dtype)
        self.h.next = torch.tanh(self.h.prev + (at.unsqueeze(1) @ memory).squeeze(1) + table[label])
        return 3 * self.head(self.h.next)


KINDS = {
    "ints": (Ints, None, {}),
    "histories": (Histories, None, {}),
    "masked": (MaskedAndNested, lambda output: output[1]["scores"], {}),
    "begun": (Begun, None, {"memory": torch.randn(2, 4, 3, dtype=torch.float64), "table": torch.randn(5, 3).double()}),
}


@pytest.mark.parametrize(
    ("kind", "backend"),
    [*((kind, "reference") for kind in KINDS), *((kind, "cpu") for kind in KINDS), ("masked", "eager")],
)
def test_states_of_every_kind_go_with_their_hypotheses(kind, backend):
    make, scores, constants = KINDS[kind]
    torch.manual_seed(3)
    model = make().double()
    named = {n: sl.unbatched(c) if n == "table" else c for n, c in constants.items()}
    for size, steps in [(3, 6), (3, 4), (1, 4)] if backend == "reference" else [(3, 6)]:
        hyps = sl.search.beam(
            model, start=1, end=0, max_steps=steps, size=size, n_best=size, stop="all", batch_size=2, scores=scores,
            backend=backend, **named,
        )  # fmt: skip
        for row in range(2):
            lone = {n: sl.unbatched(c) if n == "table" else c[row : row + 1] for n, c in constants.items()}
            expected = plain_beam(model, size, steps, 1, 0, scores=scores, **lone)
            assert hyps.to_lists()[row] == [labels for _, labels, *_ in expected]
            assert hyps.scores[row].tolist() == pytest.approx([score for score, *_ in expected], rel=1e-9)
            assert hyps.finished[row].tolist() == [ended for *_, ended in expected]
