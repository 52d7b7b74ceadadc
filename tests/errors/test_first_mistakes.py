"""The mistakes of people's first hour: each has a message that says what to type; tracebacks are short."""

from __future__ import annotations

import os
import re
import traceback

import pytest
import torch
from torch import nn

import steploop as sl

XS = torch.zeros(4, 2, 3)
HERE = os.path.abspath(__file__)


class Cell(sl.Step):
    """A step whose body is given."""

    def __init__(self, body=lambda self, x: torch.tanh(self.linear(x) + self.h.prev)):
        super().__init__()
        self.linear, self.h, self.body = nn.Linear(3, 3), sl.State(3), body

    def step(self, x):
        self.h.next = self.body(self, x)
        return self.h.next


def raises(error, *parts):
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))


# -- a State is a slot -----------------------------------------------------------------------------------------

AS_A_TENSOR = {
    "h + x": lambda self, x: self.h + x,
    "x + h": lambda self, x: x + self.h,
    "2 * h": lambda self, x: 2 * self.h,
    "-h": lambda self, x: -self.h,
    "h @ w": lambda self, x: self.h @ self.linear.weight,
    "h > 0": lambda self, x: (self.h > 0) * x,
    "h[:, 0]": lambda self, x: self.h[:, 0],
    "h += x": lambda self, x: self.h.__iadd__(x),
    "cat": lambda self, x: torch.cat([x, self.h], -1),
    "where": lambda self, x: torch.where(x > 0, x, self.h),
    "a layer": lambda self, x: self.linear(self.h),
    "a cell of torch": lambda self, x: nn.GRUCell(3, 3)(x, self.h),
    "a method": lambda self, x: self.h.tanh(),
    "a size": lambda self, x: x * self.h.size(0),
}


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("use", AS_A_TENSOR)
def test_a_state_used_as_a_tensor(use, backend):
    with raises(sl.StateError, "State 'h' was", "not a tensor", "self.h.prev", HERE, "fix:", "self.h.prev"):
        sl.Loop(Cell(AS_A_TENSOR[use]), backend=backend)(XS)


def test_a_state_below_another_module_is_named_by_its_path():
    class Outer(sl.Step):
        def __init__(self):
            super().__init__()
            self.cell = Cell(lambda self, x: self.h + x)

        def step(self, x):
            return self.cell(x)

    with raises(sl.StateError, "State 'cell.h'", "fix:      self.cell.h.prev"):
        sl.Loop(Outer(), backend="eager")(XS)


def test_a_state_still_answers_hasattr_and_is_a_module():
    answers = []

    def body(self, x):
        answers.append((hasattr(self.h, "shape"), hasattr(self.h, "mean"), self.h == self.h, bool(self.h)))
        return x

    sl.Loop(Cell(body), backend="reference")(XS)
    assert set(answers) == {(True, False, True, True)}  # `shape` is the State's own
    state = sl.State(3)
    assert not hasattr(state, "mean") and state.training and {state: 1}[state] == 1
    assert sl.State(2, init=torch.zeros(2)).double().init.dtype == torch.float64


def test_a_state_replaced_by_a_tensor():
    def assigns(self, x):
        self.h = x
        return x

    with raises(sl.StateError, "State 'h' was replaced by a tensor", "(2, 3) float32", HERE, "self.h.next = value"):
        sl.Loop(Cell(assigns), backend="eager")(XS)
    cell = Cell()
    cell.h = sl.State(3)  # another State may take its place
    cell.linear = None


# -- how a step is written and called --------------------------------------------------------------------------


def test_forward_instead_of_step_is_told_when_the_step_is_made():
    class Forward(sl.Step):
        def forward(self, x):
            return x

    with raises(sl.StepError, "Forward defines forward", "a method named step", HERE, "def step(self, x)"):
        Forward()


@pytest.mark.parametrize("made", ["plan", "profile"])
def test_a_plan_without_inputs(made):
    with raises(sl.InputError, f"{made}() was called without the inputs", "takes x", HERE, f"loop.{made}(x)"):
        getattr(sl.Loop(Cell()), made)()


def test_what_sl_plan_takes():
    with raises(sl.InputError, "sl.plan takes a Loop or a Step", "the class Cell", "sl.plan(Cell(...), xs)"):
        sl.plan(Cell, XS)
    with raises(sl.InputError, "sl.plan takes", "sl.plan(fn, init, xs)"):
        sl.plan(lambda c, x: (c, x))
    with raises(sl.StepError, "takes a Step", "the class Cell", "sl.Loop(Cell(...))"):
        sl.Loop(Cell)


@pytest.mark.parametrize(
    "wrong, right",
    [("length", "lengths"), ("lenghts", "lengths"), ("masks", "mask"), ("reset", "resets"), ("hx", "state"),
     ("h0", "state"), ("initial_state", "state"), ("sequence_length", "lengths"), ("dones", "resets")],
)  # fmt: skip
def test_an_argument_by_another_name(wrong, right):
    with raises(sl.InputError, f"`{wrong}`", "arguments named x", HERE, f"fix:      {right}=... if that is meant"):
        sl.Loop(Cell())(XS, **{wrong: torch.tensor([1, 2])})


def test_a_missing_input_is_shown_in_its_place():
    with pytest.raises(sl.InputError) as caught:
        sl.Loop(Cell())()
    assert str(caught.value).endswith("fix:      loop(x)")


def test_another_batch_than_the_streams():
    stream = sl.Loop(Cell()).stream(5)
    with raises(sl.InputError, "This stream has 5 rows, and x has 2", "(5, ...)", "(2, 3) float32", "loop.stream(2)"):
        stream(XS[0])
    with raises(sl.InputError, "no time axis", "stream(x[t])"):
        sl.Loop(Cell()).stream(2)(XS)


@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
@pytest.mark.parametrize("what, xs", [("features", torch.zeros(4, 2, 7)), ("dtype", XS.double())])
def test_features_and_dtypes_that_do_not_fit_name_the_users_line(what, xs, backend):
    with pytest.raises(Exception) as caught:
        sl.Loop(Cell(), backend=backend)(xs)
    last = traceback.extract_tb(caught.value.__traceback__)
    assert f"{HERE}:" in str(caught.value) or any(frame.filename == HERE and frame.name != "<module>" for frame in last)
    if backend != "reference":
        assert isinstance(caught.value, sl.SteploopError) and f"{HERE}:" in str(caught.value)


def test_a_bidirectional_layer_in_a_stack_or_in_a_step():
    layer = sl.nn.Bidirectional(sl.nn.GRUCell(3, 3), sl.nn.GRUCell(3, 3))
    for whole in (layer, sl.Loop(Cell()), nn.LSTM(3, 3)):
        with raises(sl.StepError, f"layer 0 is a {type(whole).__name__}", "whole sequences", "ys, state = layer(xs)"):
            sl.nn.Stack(whole, sl.nn.GRUCell(6, 3))
    with raises(sl.StepError, "takes a Step", "call it with the sequences"):
        sl.Loop(layer)
    cell = Cell(lambda self, x: self.layer(x)[0][:, :3])
    cell.layer = layer
    with raises(sl.StepError, "Bidirectional was called inside a step", "(S, B, features)", HERE, "ys, _ = layer(xs)"):
        sl.Loop(cell, backend="eager")(XS)


def test_a_bidirectional_layer_over_an_inner_sequence_stays_right():
    class Words(sl.Step):
        def __init__(self):
            super().__init__()
            self.spell = sl.nn.Bidirectional(sl.nn.RNNCell(3, 2), sl.nn.RNNCell(3, 2), backend="eager")
            self.h = sl.State(4)

        def step(self, letters):  # (B, S, 3)
            spelled, _ = self.spell(letters.transpose(0, 1))
            self.h.next = self.h.prev * 0.5 + spelled[-1]
            return self.h.next

    with torch.no_grad():
        assert sl.verify(sl.Loop(Words(), backend="eager"), torch.randn(3, 2, 4, 3)).ok


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_states_among_the_outputs_of_a_step(backend):
    inner = sl.Loop(Cell(), backend="eager")

    class Returns(sl.Step):
        def step(self, x):
            return inner(x.unsqueeze(0))

    with raises(sl.StepError, "Returns.step returned an sl.States", "(outputs, States)", "ys, _ = self.layer(x)"):
        sl.Loop(Returns(), backend=backend)(XS)


class Attends(sl.Step):
    def __init__(self):
        super().__init__()
        self.h = sl.State(3)

    def step(self, x, *, memory):
        self.h.next = self.h.prev + x + memory["keys"].sum(1)
        return self.h.next


@pytest.mark.parametrize(
    "memory, parts",
    [
        ({"keys": torch.zeros(5, 7, 3)}, ("`memory['keys']` does not have B first", "sl.unbatched(memory['keys'])")),
        ({"keys": torch.zeros(2, 7, 3).numpy()}, ("NumPy array", "`memory['keys']`", "torch.as_tensor(array)")),
    ],
)
def test_a_dictionary_of_wrong_constants(memory, parts):
    with raises(sl.InputError, *parts):
        sl.Loop(Attends())(XS, memory=memory)


def test_constants_by_the_wrong_name_or_place():
    with raises(sl.InputError, "`memry`", "arguments named memory, x", "memory=... if that is meant"):
        sl.Loop(Attends())(XS, memry={"keys": torch.zeros(2, 7, 3)})
    with raises(sl.StepError, "2 were given", "a constant goes by keyword: memory=..."):
        sl.Loop(Attends())(XS, {"keys": torch.zeros(2, 7, 3)})


# -- tracebacks ------------------------------------------------------------------------------------------------


def own_and_others(error):
    """The user's lines of a traceback, and how many others it has."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.line for frame in frames if frame.filename == HERE], sum(f.filename != HERE for f in frames)


CALLS = {
    "a loop": lambda cell: sl.Loop(cell)(XS),
    "a step": lambda cell: cell(XS),
    "a stream": lambda cell: sl.Loop(cell).stream(2)(XS[0]),
    "a plan": lambda cell: sl.Loop(cell).plan(XS),
    "sl.plan": lambda cell: sl.plan(cell, XS),
    "sl.verify": lambda cell: sl.verify(cell, XS),
    "a layer": lambda cell: sl.nn.Bidirectional(cell, Cell())(XS),
    "the plain loop": lambda cell: sl.Loop(cell, backend="reference")(XS),
    "a scan": lambda cell: sl.scan(lambda c, x: (c, cell.h + x), torch.zeros(2, 3), XS),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_traceback_has_the_users_lines_alone(call, monkeypatch):
    monkeypatch.delenv("STEPLOOP_TRACEBACK", raising=False)
    cell = Cell(lambda self, x: self.h + x)
    with pytest.raises(sl.StateError) as caught:
        CALLS[call](cell)
    lines, others = own_and_others(caught.value)
    assert lines[0] == "CALLS[call](cell)" and "self.h + x" in lines[-1] or call == "a scan"
    assert others == 1, traceback.format_exception(caught.value)  # the one that says how to see the rest
    assert len(traceback.format_exception(caught.value)) < 12 and caught.value.__cause__ is None


def test_the_rest_of_a_traceback_is_there_on_demand(monkeypatch):
    monkeypatch.setenv("STEPLOOP_TRACEBACK", "full")
    with pytest.raises(sl.StateError) as caught:
        sl.Loop(Cell(lambda self, x: self.h + x))(XS)
    assert own_and_others(caught.value)[1] > 10


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_what_the_users_own_code_raises_keeps_its_cause(backend, monkeypatch):
    monkeypatch.delenv("STEPLOOP_TRACEBACK", raising=False)

    def body(self, x):
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("mine") from error

    with pytest.raises(ValueError, match="mine") as caught:
        sl.Loop(Cell(body), backend=backend)(XS)
    assert isinstance(caught.value.__cause__, KeyError)
    lines, others = own_and_others(caught.value)
    assert lines[-1] == 'raise ValueError("mine") from error' and others == 1


def test_an_error_that_is_nobodys_mistake_stays_whole(monkeypatch):
    """What breaks inside the library is told as it is: somebody has to find it."""
    from steploop.compiler import pipeline

    monkeypatch.delenv("STEPLOOP_TRACEBACK", raising=False)
    monkeypatch.setattr(pipeline, "invocation_of", [].index)
    with pytest.raises(TypeError) as caught:
        sl.Loop(sl.nn.GRUCell(3, 3), backend="eager")(XS)
    assert own_and_others(caught.value)[1] > 4


def test_an_error_in_an_inner_loop_is_cut_once():
    inner = sl.Loop(Cell(lambda self, x: self.h + x))

    class Outer(sl.Step):
        def step(self, x):
            return inner(x.unsqueeze(0))[0][0]

    with pytest.raises(sl.StateError) as caught:
        sl.Loop(Outer(), backend="eager")(XS)
    lines, others = own_and_others(caught.value)
    assert "return inner(x.unsqueeze(0))[0][0]" in lines and others == 1
