"""Loops that end by themselves, against the plain loop: values, gradients, streams, and what rows are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import steploop as sl
from steploop import until
from steploop.backends.cpu import runner as native
from steploop.compiler.batch import OncePiece

BACKENDS = ["eager", "cpu"]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


class Decoder(sl.Step):
    """Feeds its own label back; ends at label 0 or 3."""

    def __init__(self, labels=7, size=8):
        super().__init__()
        self.embedding = nn.Embedding(labels, size, dtype=torch.float64)
        self.cell = sl.nn.GRUCell(size, size).double()
        self.head = nn.Linear(size, labels, dtype=torch.float64)
        self.label = sl.State(init=1, dtype=torch.int64)
        self.done = sl.State(init=False, dtype=torch.bool)

    def step(self):
        scores = self.head(self.cell(self.embedding(self.label.prev)))
        label = scores.argmax(-1)
        self.label.next = label
        self.done.next = (label == 0) | (label == 3)
        return {"scores": scores, "label": label}


class Counter(sl.Step):
    """Ends when the sum of what it read reaches a limit. `self.filter` is a recurrence that `done` does not need."""

    def __init__(self, limit=3.0):
        super().__init__()
        self.limit = limit
        self.weight = nn.Parameter(torch.tensor([0.7, -0.3], dtype=torch.float64))
        self.total = sl.State()
        self.filter = sl.State(2)
        self.done = sl.State(init=False, dtype=torch.bool)

    def step(self, x):
        self.total.next = self.total.prev + x.abs()
        self.filter.next = torch.tanh(self.filter.prev * self.weight + x.unsqueeze(1))
        self.done.next = self.total.next > self.limit
        return self.filter.next * self.total.next.unsqueeze(1)


class Walk(sl.Step):
    """Reads a memory at its own position and ends at the memory's end, behind which there is nothing."""

    def __init__(self):
        super().__init__()
        self.at = sl.State(init=0, dtype=torch.int64)
        self.done = sl.State(init=False, dtype=torch.bool)

    def step(self, *, memory, stride):
        found = memory.gather(1, self.at.prev.unsqueeze(1)).squeeze(1)
        self.at.next = self.at.prev + stride
        self.done.next = self.at.next >= memory.shape[1]
        return found


class Remembering(sl.Step):
    """A history, a delay and a count; ends by what it finds in them."""

    def __init__(self):
        super().__init__()
        self.attention = sl.memory.CausalSelfAttention(2, 4).double()
        self.delay = sl.memory.Delay(2)
        self.y = sl.State(4)
        self.done = sl.State(init=False, dtype=torch.bool)

    def step(self, x):
        y = torch.tanh(self.attention(self.y.prev + x) + self.delay(x))
        self.y.next = y
        self.done.next = y.sum(-1) > 1.0
        return y


def both(step, *xs, backend, **arguments):
    """(outputs, state, gradients) by the plain loop and by a backend."""
    results = []
    for name in ("reference", backend):
        given = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in xs]
        outputs, state = sl.Loop(step, until="done", backend=name)(*given, **arguments)
        leaves = [*torch.utils._pytree.tree_leaves(outputs), *state.values()]
        loss = sum((leaf * torch.cos(torch.arange(leaf.numel(), dtype=leaf.dtype).reshape(leaf.shape))).sum()
                   for leaf in leaves if leaf.is_floating_point() and leaf.requires_grad)  # fmt: skip
        targets = [*step.parameters(), *(x for x in given if x.requires_grad)]
        gradients = (
            torch.autograd.grad(loss, targets, allow_unused=True) if torch.is_tensor(loss) else [None] * len(targets)
        )
        gradients = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, targets, strict=True)]
        results.append((outputs, dict(state), gradients, state.steps))
    return results


def check(step, *xs, backend, **arguments):
    expected, found = both(step, *xs, backend=backend, **arguments)
    torch.testing.assert_close(found, expected, **CLOSE)
    with torch.no_grad():
        outputs, state = sl.Loop(step, until="done", backend=backend)(*xs, **arguments)
    torch.testing.assert_close((outputs, dict(state)), (expected[0], expected[1]), **CLOSE)
    return expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decoder_ends_by_its_own_labels_in_a_sequence_of_sizes(backend):
    torch.manual_seed(2)
    step = Decoder()
    ends = set()
    for batch, limit in [(5, 30), (1, 30), (1, 3), (17, 60), (0, 4), (5, 0), (3, 1), (5, 31)]:
        state = {
            "cell.h": torch.randn(batch, 8, dtype=torch.float64) * 3,
            "label": torch.randint(0, 7, (batch,)),
            "done": torch.zeros(batch, dtype=torch.bool),
        }
        outputs, after, _, steps = check(step, backend=backend, steps=limit, batch_size=batch, state=state)
        longest = int(steps.max()) if batch else 0
        assert outputs["scores"].shape == (longest, batch, 7)
        for row in range(batch):
            labels = outputs["label"][: int(steps[row]), row].tolist()
            assert all(label not in (0, 3) for label in labels[:-1])
            assert bool(after["done"][row]) == (labels != [] and labels[-1] in (0, 3))
            assert not outputs["scores"][int(steps[row]) :, row].any()
        ends.add(longest)
    assert len(ends) > 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_given_sequences_are_the_limit_and_combine_with_lengths_masks_and_resets(backend):
    torch.manual_seed(0)
    step = Counter()
    for time, batch in [(20, 6), (50, 3), (1, 1), (9, 1), (0, 3), (20, 6)]:
        x = torch.randn(time, batch, dtype=torch.float64)
        lengths = torch.randint(0, time + 1, (batch,))
        mask = torch.rand(time, batch) < 0.7
        resets = torch.rand(time, batch) < 0.1
        kept = mask.clone()
        for options in (
            {}, {"lengths": lengths}, {"mask": mask}, {"resets": resets}, {"lengths": lengths, "on_masked": "repeat"},
            {"mask": mask, "resets": resets, "lengths": lengths}, {"mask": mask, "on_masked": "repeat"},
        ):  # fmt: skip
            check(step, x, backend=backend, **options)
        assert torch.equal(mask, kept)


def test_the_steps_are_those_that_a_loop_by_hand_takes():
    torch.manual_seed(1)
    x = torch.randn(12, 4, dtype=torch.float64)
    mask = torch.rand(12, 4) < 0.8
    step = Counter(2.0)
    outputs, state = sl.Loop(step, until="done")(x, mask=mask)
    for row in range(4):
        total, taken = 0.0, 0
        for t in range(12):
            if mask[t, row] and total <= 2.0:
                total, taken = total + abs(float(x[t, row])), taken + 1
                assert outputs[t, row].any()
            elif t < len(outputs):
                assert not outputs[t, row].any()
        assert int(state.steps[row]) == taken
        assert float(state["total"][row].detach()) == pytest.approx(total)
    _, plain = sl.Loop(step)(x, mask=mask)
    assert torch.equal(plain.steps, mask.sum(0)) and plain.select([1, 2]).steps.tolist() == mask.sum(0)[1:3].tolist()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_what_stands_after_the_end_is_never_read(backend):
    step = Counter()
    x = torch.ones(40, 2, dtype=torch.float64)
    x[4:, 0] = float("nan")
    x[:, 1] = 0.25
    x[13:, 1] = float("nan")
    x.requires_grad_()
    outputs, state = sl.Loop(step, until="done", backend=backend)(x)
    assert state.steps.tolist() == [4, 13] and len(outputs) == 13
    (outputs.sum() + state["total"].sum()).backward()
    assert torch.isfinite(outputs).all() and torch.isfinite(x.grad).all() and torch.isfinite(step.weight.grad).all()
    assert not x.grad[4:, 0].any() and not x.grad[13:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_has_ended_does_not_read_behind_its_memory(backend):
    for batch, size in [(3, 20), (1, 9), (3, 2)]:
        memory = torch.randn(batch, size, dtype=torch.float64)
        stride = torch.arange(1, batch + 1) if batch > 1 else torch.tensor([3])
        check(Walk(), backend=backend, steps=50, memory=memory, stride=stride)


class Looks(sl.Step):
    """Looks up what it is given, and ends after as many steps as its `last`."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
        self.total, self.count = sl.State(3), sl.State(dtype=torch.int64)
        self.done = sl.State(init=False, dtype=torch.bool)

    def step(self, place, *, last):
        self.total.next = torch.tanh(self.total.prev + self.table[place])
        self.count.next = self.count.prev + 1
        self.done.next = self.count.next >= last
        return self.total.next


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_has_ended_looks_nothing_up(backend):
    last = torch.tensor([6, 4, 2])
    places = torch.randint(5, (6, 3))
    places[4:, 1], places[2:, 2] = 99, 99
    check(Looks(), places, backend=backend, last=last)
    places[3, 0] = 99
    with pytest.raises(IndexError):
        sl.Loop(Looks(), until="done", backend=backend)(places, last=last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_histories_delays_and_nested_steps(backend):
    torch.manual_seed(0)
    step = Remembering()
    for time, batch in [(30, 4), (7, 2)]:
        check(step, torch.randn(time, batch, 4, dtype=torch.float64), backend=backend)


def test_rows_do_not_depend_on_each_other_and_ended_ones_stay_ended():
    torch.manual_seed(3)
    x = torch.randn(40, 5, dtype=torch.float64)
    loop = sl.Loop(Counter(), until="done")
    outputs, state = loop(x)
    for row in range(5):
        alone, one = loop(x[:, row : row + 1])
        torch.testing.assert_close(alone[:, 0], outputs[: len(alone), row], **CLOSE)
        torch.testing.assert_close(dict(one), {k: v[row : row + 1] for k, v in state.items()}, **CLOSE)
    again, after = loop(x, state=state.detach())
    assert after.steps.tolist() == [0] * 5 and again.shape == (0, 5, 2)
    torch.testing.assert_close(dict(after), dict(state.detach()), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS, "auto"])
def test_a_stream_keeps_a_row_where_it_ended_until_it_is_reset(backend):
    torch.manual_seed(4)
    x = torch.randn(30, 3, dtype=torch.float64)
    resets = torch.zeros(30, 3, dtype=torch.bool)
    resets[20, 1] = True
    step = Counter()
    for on_masked in ("zero", "repeat"):
        outputs, after = sl.Loop(step, until="done", backend="reference")(x, resets=resets, on_masked=on_masked)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                stream = sl.Loop(step, until="done", backend=backend).stream(3, on_masked=on_masked)
                for t in range(len(outputs)):
                    given = {"resets": resets[t]} if resets[t].any() else {}
                    torch.testing.assert_close(stream(x[t], **given), outputs[t], **CLOSE)
        torch.testing.assert_close(dict(stream.state), dict(after), **CLOSE)


class Random(sl.Step):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.h = sl.State(3)
        self.done = sl.State(init=False, dtype=torch.bool)

    def step(self):
        noise = torch.rand_like(self.h.prev)
        self.h.next = self.h.prev * 0.5 + noise * self.weight
        self.done.next = noise[:, 0] > 0.9
        return noise, self.h.next


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_step_that_draws_is_differentiated_through_the_very_draws_that_ended_it(backend):
    step = Random()
    loop = sl.Loop(step, until="done", backend=backend)
    torch.manual_seed(0)
    (noise, h), state = loop(steps=200, batch_size=8)
    steps = state.steps
    for row in range(8):
        ended = noise[:, row, 0] > 0.9
        assert int(ended.nonzero()[0]) == int(steps[row]) - 1
    h.sum().backward()
    weight = step.weight.detach().clone().requires_grad_()
    value, total = torch.zeros(8, 3), 0
    for t in range(len(noise)):
        inside = (t < steps).unsqueeze(1)
        value = torch.where(inside, value * 0.5 + noise[t].detach() * weight, value)
        total = total + torch.where(inside, value, 0).sum()
    total.backward()
    torch.testing.assert_close(step.weight.grad, weight.grad)


def test_other_forms_of_arguments():
    torch.manual_seed(5)
    x = torch.randn(14, 3, dtype=torch.float64)
    step = Counter()
    outputs, state = sl.Loop(step, until="done")(x)
    turned, _ = sl.Loop(step, until="done", batch_first=True)(x.T)
    torch.testing.assert_close(turned.transpose(0, 1), outputs)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 14, 9]), enforce_sorted=False)
    spread, lengths = nn.utils.rnn.pad_packed_sequence(sl.Loop(step, until="done")(packed)[0])
    assert lengths.tolist() == [5, 14, 9]
    plain, _ = sl.Loop(step, until="done")(x, lengths=lengths)
    torch.testing.assert_close(spread[: len(plain)], plain)
    assert "after" in str(sl.Loop(step, until="done").plan(x)) and sl.verify(sl.Loop(step, until="done"), x).ok
    assert "until='done'" in repr(sl.Loop(step, until="done"))


class Bad(sl.Step):
    def __init__(self, done):
        super().__init__()
        self.finished = done

    def step(self, x):
        return x


def test_errors_say_what_to_write():
    x = torch.zeros(3, 2)
    with pytest.raises(sl.StateError, match="names no State of this step(.|\n)*'finished'"):
        sl.Loop(Bad(sl.State(init=False, dtype=torch.bool)), until="done")(x)
    for wrong in (sl.State(), sl.State(2, init=False, dtype=torch.bool)):
        with pytest.raises(sl.StateError, match=r"one bool per row(.|\n)*\(B,\) bool"):
            sl.Loop(Bad(wrong), until="finished")(x)
    with pytest.raises(sl.UnsupportedError, match="reverse=True cannot end by itself"):
        sl.Loop(Counter(), until="done", reverse=True)


class Outer(sl.Step):
    def __init__(self):
        super().__init__()
        self.inner = sl.Loop(Counter(), until="done")

    def step(self, x):
        return self.inner(x.transpose(0, 1))[1]["total"]


def test_inside_another_step_it_is_refused():
    with pytest.raises(sl.UnsupportedError, match="ends by itself was called inside a step"):
        sl.Loop(Outer(), backend="eager")(torch.randn(3, 2, 5, dtype=torch.float64))


class Draws(sl.Step):
    """Ends at random, each row at its own step; what it gives depends on what it reads at that step."""

    def __init__(self):
        super().__init__()
        self.h = sl.State(3)
        self.last = sl.State(init=-1, dtype=torch.int64)
        self.done = sl.State(init=False, dtype=torch.bool)

    def step(self, x, *, ends):
        self.h.next = torch.tanh(self.h.prev + x.unsqueeze(1))
        self.last.next = self.last.prev + 1
        self.done.next = (self.last.next >= ends) | (self.h.next.sum(1) > 100)
        return {"h": self.h.next, "wide": self.h.next.unsqueeze(2) * x.reshape(-1, 1, 1), "at": self.last.next}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 5, 70])
def test_a_native_loop_that_stops_by_itself(threads, batch, monkeypatch):
    """Tiles stop at steps of their own; one call of a long piece, then one with a single row left."""
    calls = []
    plain = native.Runner._call
    monkeypatch.setattr(native.Runner, "_call", lambda self, *given: (calls.append(self), plain(self, *given))[1])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step = Draws().double()
        for longest in (3, 39, 300):
            ends = torch.randint(0, 4, (batch,))
            ends[-1] = longest
            x = torch.randn(400, batch, dtype=torch.float64)
            calls.clear()
            with torch.no_grad():
                found, state = sl.Loop(step, until="done", backend="cpu")(x, ends=ends)
                expected, end = sl.Loop(step, until="done", backend="reference")(x, ends=ends)
            assert len(calls) == (1 if longest < 256 else 2)
            assert torch.equal(state.steps, ends + 1) and torch.equal(end.steps, ends + 1)
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], **CLOSE)
            for name in end:
                torch.testing.assert_close(state[name], end[name], **CLOSE)
    finally:
        torch.set_num_threads(before)


class Reads(sl.Step):
    """Attends to a memory through keys that are the same at every step."""

    def __init__(self):
        super().__init__()
        self.key = nn.Linear(3, 3, dtype=torch.float64)
        self.h, self.at = sl.State(3, init=0.1), sl.State(init=0, dtype=torch.int64)
        self.done = sl.State(init=False, dtype=torch.bool)

    def step(self, *, memory, ends):
        weights = (self.key(memory) * self.h.prev.unsqueeze(1)).sum(2).softmax(1)
        self.h.next = (weights.unsqueeze(2) * memory).sum(1)
        self.at.next = self.at.prev + 1
        self.done.next = self.at.next >= ends
        return self.h.next


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_the_same_at_every_step_is_made_once_a_call_and_follows_the_rows(backend, monkeypatch):
    made = []
    plain = OncePiece.__call__
    monkeypatch.setattr(OncePiece, "__call__", lambda self, *given: (made.append(1), plain(self, *given))[1])
    monkeypatch.setattr(until, "LONG_PIECE", 16)
    step = Reads()
    memory = torch.randn(4, 5, 3, dtype=torch.float64)
    with torch.no_grad():
        for ends in ([40] * 4, [3, 40, 20, 37], [40] * 4):
            ends = torch.tensor(ends)
            made.clear()
            found, _ = sl.Loop(step, until="done", backend=backend)(steps=99, memory=memory, ends=ends)
            assert len(made) == 1 or len(ends.unique()) > 1
            expected, _ = sl.Loop(step, until="done", backend="reference")(steps=99, memory=memory, ends=ends)
            torch.testing.assert_close(found, expected, **CLOSE)
            memory.mul_(-1.5)
            step.key.weight.mul_(0.7)
