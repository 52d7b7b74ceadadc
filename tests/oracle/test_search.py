"""Greedy search and sampling; what all searches share: rows, limits, prefixes, streams, odd models."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from test_beam_search import Bigram, Model
from torch import nn

import steploop as sl

BACKENDS = ["reference", "eager", "cpu"]
# Searches run on the plain loop, where nothing else is said: it says what they mean, and needs no time to compile.
PLAIN = {"backend": "reference"}
SEARCHES = {
    "greedy": (sl.search.greedy, PLAIN),
    "sample": (sl.search.sample, {"samples": 3, **PLAIN}),
    "without": (sl.search.sample, {"samples": 3, "without_replacement": True, **PLAIN}),
    "beam": (sl.search.beam, {"size": 3, "n_best": 3, **PLAIN}),
}


class Chain(sl.Step):
    """Scores from a table by the label before; as simple as a model can be."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(table, dtype=torch.float64))
        self.seen = sl.State(init=0, dtype=torch.int64)

    def step(self, label):
        self.seen.next = self.seen.prev + 1
        return self.table[label]


class Constantly(sl.Step):
    """A scorer of any number of labels."""

    def __init__(self, labels, value=0.0):
        super().__init__()
        self.labels, self.value, self.seen = labels, value, sl.State()

    def step(self, label):
        self.seen.next = self.seen.prev
        return torch.full((len(label), self.labels), self.value)


def chain(labels=5, seed=0):
    return Chain(torch.randn(labels, labels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def same(a, b, rows_a=slice(None), rows_b=slice(None)):
    steps = min(a.labels.shape[2], b.labels.shape[2])
    for name in ("labels", "label_log_probs"):
        torch.testing.assert_close(getattr(a, name)[rows_a][..., :steps], getattr(b, name)[rows_b][..., :steps])
    for name in ("lengths", "scores", "log_probs", "finished", "proved_best", "bound"):
        torch.testing.assert_close(getattr(a, name)[rows_a], getattr(b, name)[rows_b])


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_is_the_argmax_loop_and_the_beam_of_one(backend):
    torch.manual_seed(0)
    model = Model(labels=6).double()
    for batch in (4, 1):
        memory = torch.randn(batch, 3, 4, dtype=torch.float64)
        arguments = {"start": 1, "end": 0, "max_steps": 9, "scores": "scores", "memory": memory, "backend": backend}
        hyps = sl.search.greedy(model, keep="weights", **arguments)
        beam = sl.search.beam(model, size=1, stop="all", **arguments)
        for row in range(batch):
            stream = sl.Loop(model, backend="reference").stream(1, memory=memory[row : row + 1])
            label, total, labels, weights = torch.tensor([1]), 0.0, [], []
            for _ in range(9):
                output = stream(label)
                log_probs = output["scores"].log_softmax(-1)
                weights.append(output["weights"][0])
                label = log_probs.argmax(-1)
                total += float(log_probs.detach()[0, label])
                if int(label) == 0:
                    break
                labels.append(int(label))
            assert hyps.to_lists()[row] == [labels] == beam.to_lists()[row]
            assert float(hyps.scores[row, 0]) == pytest.approx(total) == float(beam.scores[row, 0])
            torch.testing.assert_close(hyps.kept["weights"][row, 0, : len(weights)], torch.stack(weights))
            assert not hyps.kept["weights"][row, 0, len(weights) :].any()


@pytest.mark.parametrize(("search", "backend"), [("greedy", "reference"), ("beam", "reference"), ("beam", "cpu")])
def test_a_row_does_not_depend_on_the_rows_beside_it(search, backend):
    torch.manual_seed(2)
    run, more = SEARCHES[search]
    model = Model(labels=6).double()
    memory = torch.randn(5, 3, 4, dtype=torch.float64)
    limits = torch.tensor([8, 3, 5, 0, 12])
    least = torch.tensor([0, 2, 0, 0, 7])
    arguments = {"start": 1, "end": 0, "scores": "scores", **more, "backend": backend}
    everything = run(model, max_steps=limits, min_steps=least, memory=memory, **arguments)
    assert (everything.lengths <= limits.unsqueeze(1)).all()
    assert (everything.lengths >= least.unsqueeze(1))[everything.finished].all()
    for row in range(5):
        lone = run(
            model, max_steps=int(limits[row]), min_steps=int(least[row]), memory=memory[row : row + 1], **arguments
        )
        same(everything, lone, slice(row, row + 1))


@pytest.mark.parametrize("search", SEARCHES)
def test_no_rows_no_steps_and_an_end_that_never_comes(search):
    run, more = SEARCHES[search]
    model = chain()
    nothing = run(model, start=1, end=0, max_steps=4, batch_size=0, **more)
    assert nothing.labels.shape[:2] == (0, more.get("samples", more.get("n_best", 1))) and nothing.to_lists() == []
    none = run(model, start=1, end=0, max_steps=0, batch_size=2, **more)
    assert none.labels.shape[2] == 0 and not none.lengths.any() and not none.finished.any()
    assert none.scores[:, 0].tolist() == [0.0, 0.0]
    for end, suppress in ((None, ()), (0, (0,))):
        cut = run(model, start=1, end=end, suppress=suppress, max_steps=7, batch_size=2, **more)
        assert (cut.lengths == 7).all() and not cut.finished.any() and cut.labels.shape[2] == 7
        assert end is None or not (cut.labels == 0).any()


def test_a_beam_wider_than_all_sequences_fills_up_with_nothing():
    hyps = sl.search.beam(chain(2), start=1, end=0, max_steps=2, size=20, n_best=20, batch_size=1, **PLAIN)
    found = hyps.to_lists()[0]
    assert sorted(found) == [[], [1], [1, 1]] and (hyps.scores[0, 3:] == -math.inf).all() and hyps.proved_best.all()
    assert not hyps.finished[0, 3:].any() and not hyps.lengths[0, 3:].any()
    samples = sl.search.sample(
        chain(2), start=1, end=0, max_steps=2, samples=9, without_replacement=True, batch_size=1, **PLAIN
    )
    assert sorted(samples.to_lists()[0]) == sorted(found)


@pytest.mark.parametrize("search", SEARCHES)
def test_where_no_label_may_come_there_is_no_hypothesis(search):
    run, more = SEARCHES[search]

    def only_twice(so_far):
        few = (so_far >= 0).sum(1) < 2
        return few.unsqueeze(1) & (torch.arange(5) > 0)

    hyps = run(chain(), start=1, end=0, max_steps=6, allowed=only_twice, batch_size=2, **more)
    assert (hyps.scores == -math.inf).all() and not hyps.finished.any() and not hyps.proved_best.any()
    assert hyps.to_lists() == [[], []]


@pytest.mark.parametrize("search", SEARCHES)
def test_scores_that_are_nan_are_an_error_that_says_where(search):
    run, more = SEARCHES[search]
    table = torch.zeros(3, 3)
    table[1, 2] = table[2, 1] = 50.0
    table[0, 0] = float("nan")  # no row reads that before its end
    run(Chain(table), start=1, end=0, max_steps=5, batch_size=2, **more)
    table[2] = float("nan")
    with pytest.raises(sl.InputError, match="scores that are NaN(.|\n)*row 1 at step 1"):
        start = torch.tensor([0, 1]) if search != "none" else 1
        table[0] = torch.tensor([50.0, -math.inf, -math.inf])
        run(Chain(table), start=start, end=0, max_steps=5, **more)


def test_labels_that_do_not_exist_and_options_that_do_not_fit():
    model = chain()
    common = {"start": 1, "max_steps": 3, "batch_size": 1, **PLAIN}
    with pytest.raises(sl.InputError, match=r"There is no label 9: the model gives scores of 5"):
        sl.search.greedy(model, end=9, **common)
    with pytest.raises(sl.InputError, match=r"There is no label 7"):
        sl.search.beam(model, end=0, suppress=(7,), **common)
    for run in (sl.search.greedy, sl.search.beam):
        with pytest.raises(sl.OutsideError, match="a label that it does not know.*\n.*\n.*start 12"):
            run(model, start=12, end=0, max_steps=3, batch_size=1, **PLAIN)
        with pytest.raises(sl.OutsideError, match="start 1, prefix from 1 to 9"):
            run(model, start=1, end=0, max_steps=3, prefix=torch.tensor([[9], [1]]), **PLAIN)
    with pytest.raises(sl.OutsideError, match="labels from 1 to 7"):
        sl.search.rescore(model, torch.tensor([[[7, 1]]]), torch.tensor([[2]]), start=1, end=0, **PLAIN)
    for wrong in ({"scorers": [(1.0, Constantly(3))]}, {"scorers": [(1.0, Constantly(1))]},
                  {"allowed": lambda _: torch.ones(1, 3, dtype=torch.bool)}):  # fmt: skip
        with pytest.raises(sl.InputError, match=r"expected: \(B, 5\) (bool|floating), as many as the model's"):
            sl.search.beam(model, end=0, **common, **wrong)
    with pytest.raises(sl.InputError, match="or a scorer, gave scores that are NaN"):
        sl.search.beam(model, end=0, scorers=[(1.0, Constantly(5, float("nan")))], **common)
    for wrong, text in [
        ({"size": 2, "n_best": 3}, "n_best <= size"), ({"size": 3, "groups": 2}, "multiple of groups"),
        ({"stop": "soon"}, "no such stop rule"), ({"length_penalty": ("gnmt",)}, "no such length penalty"),
        ({"coverage": 3}, "no such coverage penalty"), ({"size": 0}, "`size` is a whole number"),
        ({"min_steps": -1}, "`min_steps` is a number"), ({"memory": torch.zeros(1)}, "no cell in it takes: `memory`"),
        ({"prefix": torch.zeros(3)}, "A prefix is a sequence of labels"),
        ({"scores": "logits"}, "output has no 'logits'"),
    ]:  # fmt: skip
        with pytest.raises((sl.SteploopError, IndexError, TypeError), match=text):
            sl.search.beam(model, end=0, **common, **wrong)
    for wrong, text in [
        ({"temperature": 0.0}, "temperature is positive"),
        ({"top_p": 1.5}, "`top_p` is a probability"),
    ]:
        with pytest.raises(sl.InputError, match=text):
            sl.search.sample(model, end=0, **common, **wrong)
    with pytest.raises(sl.StepError, match="model of a search is a Step"):
        sl.search.greedy(lambda label: label, end=0, **common)


@pytest.mark.parametrize("search", SEARCHES)
def test_prefixes_of_any_length(search):
    torch.manual_seed(0)
    run, more = SEARCHES[search]
    model = Model(labels=6).double()
    memory = torch.randn(4, 3, 4, dtype=torch.float64)
    prefix = torch.tensor([[2, 3, 5, 2], [4, 2, 0, 3], [3, 3, 3, 0]])
    lengths = torch.tensor([3, 1, 3, 0])
    arguments = {"end": 0, "max_steps": 5, "scores": "scores"}
    hyps = run(model, start=1, prefix=prefix, prefix_lengths=lengths, memory=memory, **arguments, **more)
    assert hyps.to_lists()[2] == [[]] * len(hyps.to_lists()[2]) and hyps.scores[2, 0] == 0 and hyps.finished[2, 0]
    if search in ("greedy", "beam"):
        for row in (0, 1, 3):
            _, state = sl.Loop(model)(torch.cat([torch.tensor([1]), prefix[: int(lengths[row]), row]])[:-1, None],
                                      memory=memory[row : row + 1]) if lengths[row] else (None, None)  # fmt: skip
            last = int(prefix[lengths[row] - 1, row]) if lengths[row] else 1
            lone = run(model, start=last, state=state, memory=memory[row : row + 1], **arguments, **more)
            same(hyps, lone, slice(row, row + 1))


def test_no_repeat_counts_the_prefix_too():
    table = torch.zeros(4, 4)
    table[:, 2], table[:, 3] = 5.0, 4.0
    hyps = sl.search.greedy(
        Chain(table), start=1, end=0, max_steps=5, no_repeat=2, prefix=torch.tensor([[2], [2]]), **PLAIN
    )  # fmt: skip
    assert hyps.to_lists() == [[[3, 2, 1, 2]]] or hyps.to_lists()[0][0][:2] == [3, 2]
    labels = [2, 2, *hyps.to_lists()[0][0]]
    pairs = list(zip(labels, labels[1:], strict=False))
    assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize("search", ["greedy", "sample", "beam"])
def test_the_steps_stream_and_end_by_themselves(search):
    torch.manual_seed(0)
    kind = {"greedy": sl.search.Greedy, "sample": sl.search.Sample, "beam": sl.search.Beam}[search]
    run, more = SEARCHES[search]
    more = {name: value for name, value in more.items() if name != "n_best"}
    model = Model(labels=6).double()
    memory = torch.randn(3, 3, 4, dtype=torch.float64)
    options = {name: value for name, value in more.items() if name != "backend"}
    step = kind(model, start=1, end=0, max_steps=8, scores="scores", **options)
    torch.manual_seed(5)
    with torch.no_grad():
        outputs, state = sl.Loop(step, until="done", backend="reference")(steps=20, memory=memory)
    assert len(outputs["labels"]) == int(state.steps.max()) <= 8
    if search == "sample":
        return
    expected = run(model, start=1, end=0, max_steps=8, scores="scores", memory=memory, **more)
    with torch.no_grad():
        stream = sl.Loop(step, until="done", backend="cpu").stream(3, memory=memory)
        for t in range(9):
            found = stream()
            for row in range(3):
                if t < int(state.steps[row]):
                    best = found["labels"][row, 0]
                    assert torch.equal(best, outputs["labels"][t, row, 0])
    for row in range(3):
        last = outputs["labels"][int(state.steps[row]) - 1, row, 0]
        assert last[(last > 0)].tolist() == expected.to_lists()[row][0]


def test_frame_by_frame_search_reads_a_sequence():
    class Frames(sl.Step):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

        def step(self, label, x, *, bias):
            return self.table[label] + x + bias

    model = Frames()
    xs = torch.randn(6, 2, 4, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    for backend in ("reference", "cpu"):
        hyps = sl.search.greedy(
            model, start=0, end=None, max_steps=10, xs=(xs,), bias=sl.unbatched(bias), backend=backend
        )
        label = torch.zeros(2, dtype=torch.int64)
        for t in range(6):
            label = (model.table[label] + xs[t] + bias).argmax(-1)
            assert torch.equal(hyps.labels[:, 0, t], label)
        assert hyps.labels.shape == (2, 1, 6)


def test_the_state_of_a_hypothesis_goes_on_from_it():
    torch.manual_seed(0)
    model = Model(labels=6).double()
    memory = torch.randn(2, 3, 4, dtype=torch.float64)
    arguments = {"end": None, "scores": "scores", "memory": memory, **PLAIN}
    long = sl.search.greedy(model, start=1, max_steps=8, **arguments)
    short = sl.search.greedy(model, start=1, max_steps=3, **arguments)
    rest = sl.search.greedy(model, start=short.labels[:, 0, -1], max_steps=5, state=short.state, **arguments)
    assert torch.equal(torch.cat([short.labels, rest.labels], 2), long.labels)


# draws


def distribution(model, start, end, steps, value=lambda scores: scores.softmax(-1)):
    """{labels: probability} of every hypothesis of a Chain."""
    found = {}

    def visit(labels, label, probability):
        if len(labels) == steps:
            found[tuple(labels)] = probability
            return
        for v, p in enumerate(value(model.table.detach()[label]).tolist()):
            if v == end:
                found[(*labels, "end")] = probability * p
            elif p > 0:
                visit([*labels, v], v, probability * p)

    visit([], start, 1.0)
    return found


def counted(hyps):
    finished = hyps.finished.tolist()
    keys = [
        tuple(y) + (("end",) if finished[b][n] else ())
        for b, row in enumerate(hyps.to_lists()) for n, y in enumerate(row)
    ]  # fmt: skip
    return {key: keys.count(key) for key in set(keys)}, len(keys)


def chi_square(counts, total, expected):
    assert set(counts) <= {key for key, p in expected.items() if p > 0}
    value = sum((counts.get(key, 0) - total * p) ** 2 / (total * p) for key, p in expected.items() if p > 0)
    freedom = sum(p > 0 for p in expected.values()) - 1
    # Wilson and Hilferty: chi-square's cube root is nearly normal; five standard deviations
    scaled = ((value / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert scaled < 5, (value, freedom)


def top_k(scores):
    keep = scores >= scores.sort(descending=True).values[1]
    return torch.where(keep, scores / 0.7, -math.inf).softmax(-1)


def top_p(scores):
    p = scores.softmax(-1)
    order = p.argsort(descending=True)
    before = p[order].cumsum(0) - p[order]
    keep = torch.zeros_like(p, dtype=torch.bool)
    keep[order] = before < 0.6
    return torch.where(keep, scores, -math.inf).softmax(-1)


def min_p(scores):
    p = scores.softmax(-1)
    return torch.where(p >= 0.5 * p.max(), scores, -math.inf).softmax(-1)


FILTERS = {
    "plain": ({}, lambda scores: scores.softmax(-1)),
    "temperature": ({"temperature": 2.0}, lambda scores: (scores / 2).softmax(-1)),
    "top_k": ({"top_k": 2, "temperature": 0.7}, top_k),
    "top_p": ({"top_p": 0.6}, top_p), "min_p": ({"min_p": 0.5}, min_p),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "reference") for name in FILTERS), ("plain", "cpu"), ("top_p", "auto")]
)
def test_draws_have_the_distribution_that_the_options_say(name, backend):
    options, value = FILTERS[name]
    model = chain(4, seed=3)
    generator = torch.Generator().manual_seed(11)
    hyps = sl.search.sample(
        model, start=1, end=0, max_steps=3, samples=4, batch_size=1500, generator=generator, backend=backend, **options
    )
    chi_square(*counted(hyps), distribution(model, 1, 0, 3, value))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_samples_without_replacement_have_the_distribution_of_drawing_again_and_again(backend):
    model = chain(3, seed=2)
    everything = distribution(model, 1, 0, 2)
    hyps = sl.search.sample(
        model, start=1, end=0, max_steps=2, samples=2, batch_size=4000, without_replacement=True,
        generator=torch.Generator().manual_seed(3), backend=backend,
    )  # fmt: skip
    finished = hyps.finished.tolist()
    rows = [
        frozenset(tuple(y) + (("end",) if f else ()) for y, f in zip(row, fs, strict=True))
        for row, fs in zip(hyps.to_lists(), finished, strict=True)
    ]
    assert all(len(row) == 2 for row in rows)
    expected = {}
    for a, b in itertools.permutations(everything, 2):
        key = frozenset((a, b))
        expected[key] = expected.get(key, 0.0) + everything[a] * everything[b] / (1 - everything[a])
    chi_square({key: rows.count(key) for key in set(rows)}, len(rows), expected)


def test_the_same_generator_gives_the_same_samples_and_leaves_torchs_own_alone():
    model = chain()
    before = torch.random.get_rng_state()
    one, two = (
        sl.search.sample(
            model,
            start=1,
            end=0,
            max_steps=9,
            samples=4,
            batch_size=5,
            generator=torch.Generator().manual_seed(seed),
            **PLAIN,
        )
        for seed in (1, 1)
    )
    assert torch.equal(before, torch.random.get_rng_state()) and torch.equal(one.labels, two.labels)
    generator = torch.Generator().manual_seed(1)
    first, second = (
        sl.search.sample(model, start=1, end=0, max_steps=9, samples=4, batch_size=5, generator=generator, **PLAIN)
        for _ in "12"
    )
    assert torch.equal(first.labels, one.labels) and not torch.equal(first.labels, second.labels)


# what comes of them


@pytest.mark.parametrize("search", ["sample", "beam"])
def test_rescoring_gives_the_log_probabilities_of_the_search_and_their_gradients(search):
    torch.manual_seed(0)
    run, more = SEARCHES[search]
    model = Model(labels=6).double()
    memory = torch.randn(3, 3, 4, dtype=torch.float64)
    arguments = {"start": 1, "end": 0, "scores": "scores", "memory": memory}
    hyps = run(model, max_steps=6, **arguments, **more)
    arguments["backend"] = "eager"
    found = sl.search.rescore(model, hyps.labels, hyps.lengths, finished=hyps.finished, **arguments)
    torch.testing.assert_close(found.detach(), hyps.log_probs)
    each = sl.search.rescore(model, hyps.labels, hyps.lengths, finished=hyps.finished, per_label=True, **arguments)
    torch.testing.assert_close(each.detach()[..., : hyps.labels.shape[2]], hyps.label_log_probs)
    lone = sl.search.rescore(model, hyps.best(), hyps.lengths[:, 0], finished=hyps.finished[:, 0], **arguments)
    torch.testing.assert_close(lone, found[:, 0])
    gradients = torch.autograd.grad(found.exp().sum(), list(model.parameters()))
    reference = sl.search.rescore(
        model, hyps.labels, hyps.lengths, finished=hyps.finished, **{**arguments, "backend": "reference"}
    )
    torch.testing.assert_close(gradients, torch.autograd.grad(reference.exp().sum(), list(model.parameters())))


class Frames(Model):
    """Reads a frame for every label."""

    def step(self, label, frame, *, memory):
        return super().step(label, memory=memory + frame.unsqueeze(1))


@pytest.mark.parametrize("search", ["sample", "beam"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_what_was_searched_after_a_prefix_or_over_frames_can_be_rescored(search, backend):
    torch.manual_seed(0)
    run, more = SEARCHES[search]
    memory = torch.randn(4, 3, 4, dtype=torch.float64)
    arguments = {"start": 1, "end": 0, "scores": "scores", "memory": memory, "backend": backend}
    more = {name: value for name, value in more.items() if name != "backend"}
    prefix = {"prefix": torch.tensor([[2, 3, 0, 4], [4, 2, 3, 5]]), "prefix_lengths": torch.tensor([2, 1, 2, 0])}
    frames = {"xs": (torch.randn(6, 4, 4, dtype=torch.float64),)}
    for model, given in ((Model(labels=6).double(), prefix), (Frames(labels=6).double(), frames)):
        hyps = run(model, max_steps=6, **arguments, **more, **given)
        common = {"finished": hyps.finished, **arguments, **given}
        found = sl.search.rescore(model, hyps.labels, hyps.lengths, **common)
        there = hyps.scores > -math.inf  # a row whose prefix has ended has one hypothesis
        torch.testing.assert_close(found.detach()[there], hyps.log_probs[there])
        each = sl.search.rescore(model, hyps.labels, hyps.lengths, per_label=True, **common)
        torch.testing.assert_close(each.detach()[there][:, : hyps.labels.shape[2]], hyps.label_log_probs[there])
        assert each.shape[2] == hyps.labels.shape[2] + 1
        found.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_rescoring_says_what_does_not_fit():
    model, labels, lengths = Frames(labels=6), torch.ones(2, 1, 5, dtype=torch.int64), torch.full((2, 1), 5)
    arguments = {"start": 1, "end": 0, "scores": "scores", "memory": torch.randn(2, 3, 4)}
    frames = torch.randn(4, 2, 4)
    with pytest.raises(sl.InputError, match="(?s)shorter than the hypotheses.*6 steps.*4 steps"):
        sl.search.rescore(model, labels, lengths, xs=frames, **arguments)
    with pytest.raises(sl.InputError, match="have no prefix"):
        sl.search.rescore(model, labels, lengths, xs=frames, prefix=labels[:, 0].T, **arguments)
    with pytest.raises(sl.InputError, match="prefix_lengths"):
        sl.search.rescore(
            model, labels, lengths, prefix=labels[:, 0].T, prefix_lengths=torch.tensor([9, 1]), **arguments
        )


def test_the_table_is_for_people():
    hyps = sl.search.beam(chain(2), start=1, end=0, max_steps=2, size=4, n_best=4, batch_size=1, **PLAIN)
    lines = hyps.table(["<end>", "a"]).splitlines()
    assert lines[0].split() == ["row", "rank", "score", "log", "prob", "labels"]
    assert len(lines) == 4 and "(proved best)" in lines[1] and any("a a  (cut)" in line for line in lines)
    with pytest.raises(sl.InputError, match="vocabulary is too short"):
        hyps.table(["<end>"])


def test_groups_find_different_hypotheses_and_prove_nothing():
    table = torch.zeros(5, 5)
    table[:, 2] = 3.0
    plain = sl.search.beam(Chain(table), start=1, end=0, max_steps=2, size=4, n_best=4, batch_size=1, **PLAIN)
    groups = sl.search.beam(
        Chain(table), start=1, end=0, max_steps=2, size=4, n_best=4, groups=4, diversity=100.0, batch_size=1, **PLAIN
    )
    firsts = {tuple(y[:1]) for y in groups.to_lists()[0]}
    assert len(firsts) == 4 > len({tuple(y[:1]) for y in plain.to_lists()[0]}) and not groups.proved_best.any()
    no_penalty = sl.search.beam(
        Chain(table), start=1, end=0, max_steps=2, size=4, n_best=1, groups=4, batch_size=1, **PLAIN
    )
    assert (
        no_penalty.to_lists()
        == sl.search.greedy(Chain(table), start=1, end=0, max_steps=2, batch_size=1, **PLAIN).to_lists()
    )


@pytest.mark.parametrize("backend", ["reference"])
def test_stop_rules(backend):
    torch.manual_seed(1)
    model = Bigram(6).double()
    arguments = {"start": 1, "end": 0, "max_steps": 20, "size": 4, "n_best": 2, "batch_size": 1, "backend": backend}
    exact = sl.search.beam(model, **arguments)
    full = sl.search.beam(model, stop="all", **arguments)
    early = sl.search.beam(model, stop=("patience", 0.25), **arguments)
    assert exact.to_lists() == full.to_lists() and exact.labels.shape[2] <= full.labels.shape[2]
    assert early.labels.shape[2] <= full.labels.shape[2]


def test_new_functions_at_every_call_are_seen():
    model = chain()
    given = {"start": 1, "end": None, "max_steps": 3, "batch_size": 1, **PLAIN}
    for shift in (0.0, 9.0):
        bonus = shift * (torch.arange(5) == 3)
        hyps = sl.search.greedy(model, scores=lambda output, bonus=bonus: output + bonus, **given)
        assert (hyps.labels == 3).all() == (shift > 0)
        kept = sl.search.greedy(model, keep=lambda output, shift=shift: output[:, :1] * 0 + shift, **given).kept
        assert (next(iter(kept.values())) == shift).all()
        scored = sl.search.beam(model, length_penalty=lambda total, length, shift=shift: total + shift, size=2, **given)
        assert float(scored.scores[0, 0]) == pytest.approx(float(scored.log_probs[0, 0]) + shift)
        few = sl.search.greedy(
            model, allowed=lambda so_far, at=int(shift) % 5: (torch.arange(5) == at).expand(1, 5), **given
        )
        assert (few.labels == int(shift) % 5).all()
