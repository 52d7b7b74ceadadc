"""Streams against the plain loop, in sequences of everything: marks that are there and not, grad modes that change,
states that are read, set, reset and forked, outputs that are written into."""

import contextlib
import copy
import random
import types

import pytest
import torch
from torch import nn

import steploop as sl
from steploop import dispatch

B, I = 5, 4


class Actor(sl.Step):
    """A GRU with layer norm and two heads."""

    def __init__(self):
        super().__init__()
        self.x, self.r = nn.Linear(I, 18), nn.Linear(6, 18, bias=False)
        self.x_norm, self.r_norm = nn.LayerNorm(18), nn.LayerNorm(18)
        self.policy, self.value = nn.Linear(6, 3), nn.Linear(6, 1)
        self.h = sl.State(6, init="learned")

    def step(self, x):
        h = self.h.prev
        xr, xz, xn = self.x_norm(self.x(x)).chunk(3, -1)
        hr, hz, hn = self.r_norm(self.r(h)).chunk(3, -1)
        z, n = torch.sigmoid(xz + hz), torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        self.h.next = (1 - z) * n + z * h
        return {"policy": self.policy(self.h.next), "value": self.value(self.h.next)}


class Odd(sl.Step):
    """Gives its states and its input as they are; two states change places, one holds ints, one is never written."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((I,), 0.9))
        self.a, self.b, self.last = sl.State(I), sl.State(I, init=0.5), sl.State(I)
        self.count, self.still = sl.State(dtype=torch.int64), sl.State(2, init=3.0)

    def step(self, x):
        seen = {"a": self.a.prev, "last": self.last.prev, "x": x, "still": self.still.prev}
        seen["gain"] = self.gain.expand_as(x)
        self.a.next, self.b.next = self.b.prev, (self.a.prev * self.gain + x).clamp_(-3, 3)
        self.last.next = x
        self.count.next = self.count.prev + 1
        return seen | {"b": self.b.next, "count": self.count.next}


class Mixed(sl.Step):
    """One row sees the others."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(I, I)
        self.h = sl.State(I)

    def step(self, x):
        self.h.next = torch.tanh(self.a(x) + self.h.prev - self.h.prev.mean(0))
        return self.h.next


class Steps(sl.Step):
    """Looks its labels up, which need not be any where a row takes no part."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, I)
        self.cell = sl.nn.LSTMCell(I, 3)
        self.label = sl.State(dtype=torch.int64)

    def step(self, x):
        label = (self.label.prev + x[:, 0].round().long()) % 7
        label = torch.where(x[:, 0].isnan(), 1000, label)
        self.label.next = label
        return self.cell(self.table(label))


class Ends(Actor):
    def __init__(self):
        super().__init__()
        self.done, self.steps = sl.State(init=False, dtype=torch.bool), sl.State(dtype=torch.int64)

    def step(self, x):
        self.steps.next = self.steps.prev + 1
        self.done.next = self.steps.next >= 4
        return super().step(x)


STEPS = {"actor": Actor, "odd": Odd, "mixed": Mixed, "labels": Steps, "ends": Ends}


def leaves(y):
    return {"": y} if isinstance(y, torch.Tensor) else y


class Both:
    """A stream and the plain loop's, to which the same is done. What either has given must stay as it was."""

    def __init__(self, stream, plain, draw):
        self.stream, self.plain, self.draw = stream, plain, draw
        self.given = []

    def same(self, found, expected, what):
        for name, value in leaves(expected).items():
            message = lambda m, name=name: f"{what} {name}: {m}"  # noqa: E731
            torch.testing.assert_close(leaves(found)[name], value, rtol=1e-4, atol=1e-5, msg=message)

    def keep(self, values):
        self.given += [(value, value.detach().clone()) for value in leaves(values).values()]

    def unchanged(self):
        assert all(torch.equal(value, copy) for value, copy in self.given)
        self.given = self.given[-20:]

    def step(self):
        x, marks = torch.randn(B, I), {}
        if self.draw.random() < 0.5:
            marks["resets"] = torch.rand(B) < self.draw.choice([0.0, 0.4, 1.0])
        if self.draw.random() < 0.5:
            marks["mask"] = torch.rand(B) < self.draw.choice([0.0, 0.6, 1.0])
            x[~marks["mask"]] = float("nan")
        if self.draw.random() < 0.2:
            marks = {name: value.tolist() for name, value in marks.items()}
        elif self.draw.random() < 0.2:
            marks = {name: torch.stack([value, ~value], 1)[:, 0] for name, value in marks.items()}
        modes = [torch.no_grad, torch.no_grad, torch.inference_mode, torch.enable_grad]
        with self.draw.choice(modes)():
            expected = self.plain(x.clone(), **marks)
            expected = {name: value.detach().clone() for name, value in leaves(expected).items()}
            found = self.stream(x, **marks)
        self.same(found, expected, f"step with {', '.join(marks) or 'no marks'}")
        self.unchanged()
        x.fill_(7)  # the caller's own, and used again
        if self.draw.random() < 0.5:
            self.keep({name: value for name, value in leaves(found).items() if not value.is_inference()})
        else:
            with torch.inference_mode():
                for value in leaves(found).values():
                    if not value.requires_grad:
                        value.zero_()

    def look(self):
        with torch.no_grad():
            state = self.stream.state.detach()
            self.same(state, self.plain.state, "state")
            self.keep({n: v for n, v in state.items() if not v.is_inference()})

    def put(self):
        with torch.no_grad():
            state = {name: v.detach().clone() for name, v in self.plain.state.items()}
            self.stream.state, self.plain.state = {n: v.clone() for n, v in state.items()}, state

    def reset(self):
        rows = self.draw.choice([None, [0, B - 1], torch.rand(B) < 0.5, slice(1, 3), 2, []])
        with torch.no_grad():
            self.stream.reset(rows)
            self.plain.reset(rows)

    def fork(self):
        streams = self.draw.choice([fork, copy.copy])
        with torch.no_grad():
            return Both(streams(self.stream), streams(self.plain), self.draw)

    def cut(self):
        for stream in (self.stream, self.plain):
            stream.state = stream.state.detach()


def fork(stream):
    return stream.fork()


@pytest.mark.parametrize("on_masked", ["zero", "repeat"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", STEPS)
def test_sequences_of_everything(name, backend, on_masked):
    draw = random.Random(f"{name} {backend} {on_masked}")
    torch.manual_seed(0)
    step = STEPS[name]()
    until = {"until": "done"} if name == "ends" else {}
    loops = [sl.Loop(step, backend=one, **until) for one in (backend, "reference")]
    both = [Both(*(loop.stream(B, on_masked=on_masked) for loop in loops), draw)]
    for _ in range(30):
        one = draw.choice(both)
        action = draw.choice(["step"] * 6 + ["look", "put", "reset", "fork"])
        made = getattr(one, action)()
        if made is not None and len(both) < 3:
            both.append(made)
        for other in both:
            other.unchanged()
            other.cut()
    for one in both:
        one.look()


@contextlib.contextmanager
def short_way_only(monkeypatch):
    def run(*_):
        raise AssertionError("the usual way was taken")

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(dispatch, "run", run)
        yield


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("on_masked", ["zero", "repeat"])
def test_marks_take_the_short_way(backend, on_masked, monkeypatch):
    stream = sl.Loop(Actor(), backend=backend).stream(B, on_masked=on_masked)
    x, flags = torch.randn(B, I), torch.tensor([True, False, True, True, False])
    with torch.no_grad():
        stream(x, resets=flags)
    with short_way_only(monkeypatch):
        for marks in ({"resets": flags}, {}, {"mask": flags}, {"mask": flags, "resets": ~flags}):
            stream(x, **marks)
        stream.reset([1])
        twin = stream.fork()
        twin(x, mask=flags)
        stream(x)
        with torch.inference_mode():
            stream(x, resets=flags)
        stream(x)


def test_states_are_written_into_two_places_in_turn():
    stream = sl.Loop(sl.nn.LSTMCell(I, 3)).stream(B)
    x = torch.randn(B, I)
    with torch.no_grad():
        for _ in range(4):
            stream(x)
        places = []
        for _ in range(6):
            stream(x)
            places.append(tuple(v.data_ptr() for v in stream._values))
        assert len(set(places)) == 2
        before, twin = stream.state, stream.fork()
        copies = before.clone()
        for _ in range(3):
            stream(x), twin(x)
        torch.testing.assert_close(dict(before), dict(copies), rtol=0, atol=0)
        torch.testing.assert_close(dict(stream.state), dict(twin.state), rtol=0, atol=0)


def test_a_graph_that_holds_a_state_of_a_stream_is_differentiated_after_more_steps():
    step = Actor()
    loops = [sl.Loop(step), sl.Loop(step, backend="reference")]
    xs = torch.randn(9, B, I)
    found = []
    for loop in loops:
        stream = loop.stream(B)
        with torch.no_grad():
            for x in xs[:4]:
                stream(x)
        with torch.enable_grad():
            y = stream(xs[4])["policy"].square().sum()
        stream.state = stream.state.detach()
        with torch.no_grad():
            for x in xs[5:]:
                stream(x)
        found.append(torch.autograd.grad(y, [step.x.weight, step.r.weight]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_another_number_of_rows_is_an_error_and_changes_nothing():
    stream = sl.Loop(Actor()).stream(B)
    x = torch.randn(B, I)
    with torch.no_grad():
        for _ in range(3):
            stream(x)
        before = stream.state.clone()
        for wrong in (torch.randn(B + 1, I), torch.randn(1, I)):
            with pytest.raises(sl.InputError, match=r"x0?.*\(5, \.\.\.\)|\(5, \.\.\.\)"):
                stream(wrong, resets=torch.zeros(B, dtype=torch.bool))
        for flags in (torch.zeros(B + 1, dtype=torch.bool), torch.zeros(B), torch.zeros(1, B, dtype=torch.bool)):
            for name in ("mask", "resets"):
                with pytest.raises(sl.InputError, match=name):
                    stream(x, **{name: flags})
        torch.testing.assert_close(dict(stream.state), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [[5], [-6], torch.zeros(4, dtype=torch.bool), [0.5], "all", object()])
def test_rows_to_reset_that_are_none(rows):
    with pytest.raises(sl.InputError, match="stream.reset"):
        sl.Loop(Actor()).stream(B).reset(rows)


def test_a_given_state_is_left_for_the_states_own_start():
    class Given(sl.Step):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(I, 2)
            self.h = sl.State(2, init=None)

        def step(self, x):
            self.h.next = self.h.prev + self.w(x)
            return self.h.next

    stream = sl.Loop(Given()).stream(B, state={"h": torch.ones(B, 2)})
    with pytest.raises(sl.StateError, match="init=None"):
        stream.reset()
    stream = sl.Loop(Actor()).stream(B, state={"h": torch.ones(B, 6)})
    stream.reset([0])
    assert stream.state["h"][:, 0].tolist() == [0.0] + [1.0] * (B - 1)


def test_a_state_of_another_size_is_looked_at():
    class Any(sl.Step):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))
            self.h = sl.State(init=None)

        def step(self, x):
            self.h.next = self.h.prev * self.w + x
            return self.h.next.sum(-1)

    streams = [sl.Loop(Any(), backend=b).stream(B, state={"h": torch.ones(B, 3)}) for b in ("auto", "reference")]
    with torch.no_grad():
        for size in (3, 5, 1, 3):
            for stream in streams:
                stream.state = {"h": torch.ones(B, size)}
            for _ in range(3):
                torch.testing.assert_close(*(stream(torch.ones(B, 1)) for stream in streams))


def test_what_a_stream_prints():
    stream = sl.Loop(Actor(), backend="reference").stream(B, on_masked="repeat")
    assert repr(stream) == "Stream(Actor, batch_size=5, states: h (5, 6) float32, on_masked='repeat')"


class Square(sl.Step):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(I, I))
        self.h = sl.State(I)

    def step(self, x, *, table):
        self.h.next = torch.tanh(self.h.prev @ self.w + x @ table)
        return self.h.next


TURNED = {
    "the weight's data": lambda step, table: setattr(step.w, "data", step.w.data.t()),
    "the constant": lambda step, table: table.t_(),
    "the constant's data": lambda step, table: setattr(table, "data", table.data.t()),
    "the weight's numbers": lambda step, table: step.w.detach().numpy().fill(0.25),
    "the constant's numbers": lambda step, table: table.numpy().fill(0.25),
}


@pytest.mark.parametrize("what", TURNED)
def test_what_lies_at_the_same_place_in_another_way(what):
    step, table = Square(), torch.randn(I, I)
    streams = [sl.Loop(step, backend=b).stream(B, table=sl.unbatched(table)) for b in ("auto", "reference")]
    with torch.no_grad():
        for change in (False, False, False, True, False, True, False):
            if change:
                TURNED[what](step, table)
            x = torch.randn(B, I)
            torch.testing.assert_close(*(stream(x) for stream in streams))


@pytest.mark.filterwarnings("ignore:.*captured again")
def test_a_step_at_the_top_of_a_notebook_whose_other_variables_change():
    """The variables of its module change at every step; now and then one of them is one that it reads."""
    module = types.ModuleType("notebook")
    exec("factor = 2.0\ndef scale(x): return x * factor\n", module.__dict__)

    class Reads(sl.Step):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(I))
            self.h = sl.State(I)

        def step(self, x):
            self.h.next = self.h.prev * 0.5 + module.scale(x) * self.w
            return self.h.next

    streams = [sl.Loop(Reads(), backend=b).stream(B) for b in ("auto", "reference")]
    with torch.no_grad():
        for t in range(12):
            module.y = t
            if t in (5, 8):
                module.factor = float(t)
            if t == 10:
                module.scale = lambda x: x - 1
            x = torch.randn(B, I)
            torch.testing.assert_close(*(stream(x) for stream in streams))
