"""Every mistake a user can make has its own error, with both sides, the user's line and what to type next."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence

import steploop as sl


class Cell(sl.Step):
    def __init__(self, inputs=2, hidden=3):
        super().__init__()
        self.a = nn.Linear(inputs + hidden, hidden)
        self.h = sl.State(hidden)

    def step(self, x):
        self.h.next = torch.tanh(self.a(torch.cat([x, self.h.prev], -1)))
        return self.h.next


def step_class(step, begin=None, **states):
    """A Step of the given functions and States, made by keyword: h=sl.State(3)."""

    class Made(sl.Step):
        def __init__(self):
            super().__init__()
            for name, state in states.items():
                setattr(self, name, state)

    Made.step = step
    if begin is not None:
        Made.begin = begin
    return Made


def loop_of(step, begin=None, **states):
    return sl.Loop(step_class(step, begin, **states)(), backend="reference")


def line_of(function, text):
    """'file.py:14' of the first line of a function's source that contains `text`."""
    lines, start = inspect.getsourcelines(function)
    offset = next(i for i, line in enumerate(lines) if text in line)
    return f"{__file__}:{start + offset}"


def raises(error, *parts):
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))


XS = torch.zeros(4, 2, 3)

# states


def test_next_read_before_written():
    def step(self, x):
        return self.h.next

    with raises(
        sl.StateError, "'h'.next was read before it was written", line_of(step, "h.next"), "read .prev"
    ):
        loop_of(step, h=sl.State(3))(XS)


def test_next_written_twice():
    def step(self, x):
        self.h.next = x
        self.h.next = x + 1

    with raises(sl.StateError, "'h'.next was written twice", line_of(step, "x + 1"), "once"):
        loop_of(step, h=sl.State(3))(XS)


def test_next_of_another_shape():
    def step(self, x):
        self.h.next = torch.cat([x, x], -1)

    with raises(
        sl.StateError, "'h'.next", "(2, 3) float32", "(2, 6) float32", line_of(step, "cat"), "sl.State(6)"
    ):
        loop_of(step, h=sl.State(3))(XS)


def test_next_of_another_dtype():
    def step(self, x):
        self.h.next = x.double()

    with raises(sl.StateError, "(2, 3) float32", "(2, 3) float64", "dtype=torch.float64"):
        loop_of(step, h=sl.State(3))(XS)


def test_next_that_is_no_tensor():
    def step(self, x):
        self.h.next = 0.0

    with raises(sl.StateError, "(2, 3) float32", "float 0.0", "assign a tensor"):
        loop_of(step, h=sl.State(3))(XS)


def test_prev_assigned_in_step():
    def step(self, x):
        self.h.prev = x

    with raises(
        sl.StateError, "'h'.prev was assigned inside step", line_of(step, "h.prev"), "self.<name>.next"
    ):
        loop_of(step, h=sl.State(3))(XS)


def test_next_written_in_begin():
    def begin(self):
        self.h.next = torch.zeros(2, 3)

    with raises(sl.StateError, "inside begin", line_of(begin, "h.next"), ".prev = value"):
        loop_of(lambda self, x: x, begin, h=sl.State(3))(XS)


def test_prev_of_another_shape_in_begin():
    def begin(self):
        self.h.prev = torch.zeros(3)

    with raises(sl.StateError, "'h'.prev", "(2, 3) float32", "(3,) float32", line_of(begin, "h.prev")):
        loop_of(lambda self, x: x, begin, h=sl.State(3))(XS)


def test_no_initial_value_at_all():
    with raises(sl.StateError, "'h' has no value before the first step", "init=None", "def begin"):
        loop_of(lambda self, x: x, h=sl.State(init=None))(XS)


def test_an_init_of_a_state_whose_shape_the_first_step_tells():
    for wrong, found in (("learned", "nothing tells the shape"), (None, "None"), ([0.0], "a list")):
        with pytest.raises(sl.StateError) as caught:
            sl.memory.Delay(1, init=wrong)
        expected = str(caught.value).split("expected:")[1].splitlines()[0]
        assert "learned" not in expected and found in str(caught.value)
    start = nn.Parameter(torch.ones(3))
    outputs, _ = sl.memory.Delay(2, init=start)(XS)
    assert torch.equal(outputs[0], torch.ones(2, 3)) and outputs.requires_grad


def test_resets_without_an_own_initial_value():
    loop = loop_of(lambda self, x: x, h=sl.State(init=None))
    loop(XS, state={"h": torch.zeros(2)})
    with raises(sl.StateError, "'h' has no value", "resets need begin"):
        loop(XS, state={"h": torch.zeros(2)}, resets=torch.ones(4, 2, dtype=torch.bool))


@pytest.mark.parametrize("use", [lambda s: s.prev, lambda s: s.next, lambda s: setattr(s, "next", XS[0])])
def test_touched_outside_a_loop(use):
    with raises(sl.StateError, "outside a running loop", __file__, "loop(xs"):
        use(Cell().h)


def test_a_state_that_is_no_part_of_the_step():
    other = Cell()

    def step(self, x):
        return other.h.prev

    with raises(sl.StateError, "not part of the step", "self.cell = cell"):
        loop_of(step, h=sl.State(3))(XS)


@pytest.mark.parametrize(
    "arguments", [{"init": "zeros"}, {"init": torch.zeros(2, 3)}, {"init": [0.0]}, {"dtype": "f"}]
)
def test_a_state_declared_wrongly(arguments):
    with raises(sl.StateError, "A State's"):
        sl.State(3, **arguments)


def test_a_state_shape_of_no_integers():
    with raises(sl.StateError, "integers", "float 3.0"):
        sl.State(3.0)


# given states


class Two(sl.Step):
    def __init__(self):
        super().__init__()
        self.cell1, self.cell2 = Cell(2, 8), Cell(8, 3)

    def step(self, x):
        return self.cell2(self.cell1(x))


def two():
    return sl.Loop(Two(), backend="reference"), torch.zeros(5, 4, 2)


def test_missing_and_unknown_names():
    loop, xs = two()
    with raises(sl.StateError, "'cell1.h', 'cell2.h'", "missing 'cell2.h'; unknown 'h'"):
        loop(xs, state={"cell1.h": torch.zeros(4, 8), "h": torch.zeros(4, 3)})


def test_swapped_layers():
    loop, xs = two()
    state = {"cell1.h": torch.zeros(4, 3), "cell2.h": torch.zeros(4, 8)}
    with raises(
        sl.StateError,
        "'cell1.h' expects (4, 8) float32",
        "'cell1.h' is (4, 3) float32",
        "'cell1.h' and 'cell2.h' look swapped",
    ):
        loop(xs, state=state)


def test_a_state_of_another_batch_or_dtype():
    loop, xs = two()
    state = loop(xs)[1]
    with raises(sl.StateError, "(4, 8) float32", "(2, 8) float32", "state.select"):
        loop(xs, state=state.select([0, 1]))
    with raises(sl.StateError, "(4, 8) float32", "(4, 8) float64", "state.to(torch.float32)"):
        loop(xs, state=state.to(torch.float64))


def test_a_state_that_is_no_dictionary():
    loop, xs = two()
    with raises(sl.StateError, "not a dictionary", "cell1.h, cell2.h", "a tuple"):
        loop(xs, state=(torch.zeros(4, 8),))


def test_states_made_by_hand_cannot_reset():
    with raises(sl.StateError, "own initial values: h", "made by hand"):
        sl.States({"h": torch.zeros(2)}).reset_()


# steps


def test_a_child_called_twice():
    class Twice(sl.Step):
        def __init__(self):
            super().__init__()
            self.cell = Cell(3, 3)

        def step(self, x):
            y = self.cell(x)
            return self.cell(y)

    with raises(
        sl.StepError,
        "Cell was called twice",
        line_of(Twice, "y = self.cell(x)"),
        line_of(Twice, "return"),
        "sl.share(",
    ):
        sl.Loop(Twice(), backend="reference")(XS)


def test_a_state_passed_by_hand_to_a_child():
    class ByHand(sl.Step):
        def __init__(self):
            super().__init__()
            self.cell = Cell(3, 3)

        def step(self, x):
            return self.cell(x, (x, x))

    with raises(
        sl.StepError, "Cell.step takes 1 positional", "2 were given", line_of(ByHand, "(x, x)"), "by hand"
    ):
        sl.Loop(ByHand(), backend="reference")(XS)


def test_a_state_passed_by_hand_to_a_whole_sequence():
    with raises(sl.StepError, "takes 1 positional", "state="):
        Cell()(torch.zeros(4, 2, 2), (torch.zeros(2, 3), torch.zeros(2, 3)))


def test_a_state_passed_by_name_to_a_child():
    class ByName(sl.Step):
        def __init__(self):
            super().__init__()
            self.cell = Cell(3, 3)

        def step(self, x):
            return self.cell(x, state={"h": x})

    with raises(sl.StepError, "`state=`", "inside a step", "self.cell(x)"):
        sl.Loop(ByName(), backend="reference")(XS)


RESERVED = ["state", "lengths", "mask", "resets", "steps", "on_masked", "batch_size", "backend"]


@pytest.mark.parametrize("name", RESERVED)
def test_reserved_names(name):
    scope = {}
    exec(f"def step(self, x, *, {name}=None): return x", scope)
    with raises(sl.StepError, f"`{name}`", "any name but", "rename it"):
        loop_of(scope["step"])
    exec(f"def begin(self, {name}=None): pass", scope)
    with raises(sl.StepError, f"`{name}`"):
        loop_of(lambda self, x: x, scope["begin"])


def test_no_step_defined():
    class Empty(sl.Step):
        pass

    with raises(sl.StepError, "Empty does not define step", "def step(self, x)"):
        sl.Loop(Empty())


def test_forward_defined_instead_of_step():
    class Forward(sl.Step):
        def forward(self, x):
            return x

    with raises(sl.StepError, "defines forward", line_of(Forward, "def forward"), "def step"):
        sl.Loop(Forward())


def test_a_loop_of_something_else():
    with raises(sl.StepError, "takes a Step", "a Linear", "sl.scan"):
        sl.Loop(nn.Linear(2, 2))


def test_an_output_without_the_batch_axis():
    with raises(
        sl.StepError, "output without the batch axis first", "(2, ...)", "() float32", "reduce over the batch"
    ):
        loop_of(lambda self, x: x.sum())(XS)


def test_outputs_that_change_their_structure():
    count = []

    def step(self, x):
        count.append(1)
        return (x, x) if len(count) == 2 else x

    with raises(sl.StepError, "changes from one step to another", "*", "(*, *)"):
        loop_of(step)(XS)


def test_a_step_called_in_begin():
    class Early(sl.Step):
        def __init__(self):
            super().__init__()
            self.cell = Cell(3, 3)

        def begin(self):
            self.cell(torch.zeros(2, 3))

        def step(self, x):
            return self.cell(x)

    with raises(sl.StepError, "inside begin", "sl.Loop(cell)"):
        sl.Loop(Early(), backend="reference")(XS)


def test_share_takes_a_module():
    with raises(sl.StepError, "sl.share takes a Step", "a function"):
        sl.share(lambda x: x)


# inputs


def plain():
    return loop_of(lambda self, x, *, c=None: x)


def test_sequences_that_differ():
    loop = loop_of(lambda self, x, y: x)
    with raises(sl.InputError, "x and y differ", "T=4, B=2", "T=3, B=2", "constant"):
        loop(XS, XS[:3])


def test_a_sequence_without_axes():
    with raises(sl.InputError, "x has no time and batch axes", "(T, B, ...)", "(4,) float32", "unsqueeze"):
        plain()(torch.zeros(4))


def test_arrays_are_not_tensors():
    with raises(sl.InputError, "NumPy array", "torch.as_tensor"):
        plain()(np.zeros((4, 2, 3)))
    with raises(sl.InputError, "NumPy array", "constant"):
        plain()(XS, c=np.zeros(2))


def test_nothing_tells_the_steps_or_the_batch():
    loop = loop_of(lambda self: None, h=sl.State(2))
    with raises(sl.InputError, "how many steps", "steps="):
        loop()
    with raises(sl.InputError, "how many rows", "batch_size="):
        loop(steps=3)


def test_steps_and_batch_size_that_contradict():
    with raises(sl.InputError, "steps=5", "leave out"):
        plain()(XS, steps=5)
    with raises(sl.InputError, "batch_size=5", "leave out"):
        plain()(XS, batch_size=5)


def test_lengths():
    with raises(sl.InputError, "integers", "(2,) int64", "float32"):
        plain()(XS, lengths=torch.ones(2))
    with raises(sl.InputError, "one entry per row", "(2,) int64", "(3,) int64"):
        plain()(XS, lengths=[1, 2, 3])
    with raises(sl.InputError, "between 0 and T", "0 <= length <= 4", "smallest -1, largest 5", "clamp"):
        plain()(XS, lengths=[-1, 5])


@pytest.mark.parametrize("name", ["mask", "resets"])
def test_masks(name):
    with raises(sl.InputError, f"`{name}` is boolean", "(4, 2) bool", "float32", ".bool()"):
        plain()(XS, **{name: torch.ones(4, 2)})
    with raises(sl.InputError, f"`{name}`", "(4, 2) bool", "(2, 4) bool", f"{name}.T"):
        plain()(XS, **{name: torch.ones(2, 4, dtype=torch.bool)})


def test_lengths_with_a_packed_sequence():
    packed = pack_padded_sequence(XS, [4, 2])
    with raises(sl.InputError, "carries its own", "leave out lengths="):
        plain()(packed, lengths=[4, 2])
    with raises(sl.InputError, "different lengths"):
        loop_of(lambda self, x, y: x)(packed, pack_padded_sequence(XS, [4, 3]))
    with raises(sl.InputError, "inside a tuple"):
        plain()((packed,))


def test_constants():
    with raises(sl.InputError, "`c` does not have B first", "(2, ...)", "(5,) float32", "c=sl.unbatched(c)"):
        plain()(XS, c=torch.zeros(5))
    with raises(sl.InputError, "no step or begin names: `d`", "arguments named c, x"):
        plain()(XS, d=torch.zeros(2))
    with raises(sl.InputError, "needs c"):
        loop_of(lambda self, x, *, c: x)(XS)
    with raises(sl.InputError, "begin needs the constant c"):
        loop_of(lambda self, x: x, lambda self, c: None)(XS)
    with raises(sl.InputError, "`backend=`", "sl.Loop(step, backend=...)"):
        plain()(XS, backend="cpu")


def test_unknown_choices():
    with raises(sl.InputError, "no such backend", "'reference'", "'gpu'"):
        sl.Loop(Cell(), backend="gpu")
    with raises(sl.InputError, "`save`", "'states'"):
        sl.Loop(Cell(), save="some")
    with raises(sl.InputError, "`on_masked`", '"repeat"'):
        plain()(XS, on_masked="last")


def test_streams():
    stream = plain().stream(2)
    with raises(sl.InputError, "x has no time axis", "(2, ...)", "(4, 2, 3)", "loop(x)"):
        stream(XS)
    with raises(sl.InputError, "`mask` has one entry per row", "(2,) bool"):
        stream(XS[0], mask=torch.ones(1, 2, dtype=torch.bool))
    with raises(sl.UnsupportedError, "reverse=True cannot stream"):
        sl.Loop(Cell(), reverse=True).stream(2)


# scan


def scan(fn, init, xs=None, **options):
    options.setdefault("length", 3 if xs is None else None)
    return sl.scan(fn, init, xs, backend="reference", **options)


def test_a_carry_that_changes_shape_or_dtype():
    init = {"h": (torch.zeros(2), torch.zeros(3))}

    def shape(c, x):
        return {"h": (c["h"][0], torch.zeros(4))}, None

    with raises(
        sl.CarryError, "carry['h'][1]", "(3,) float32", "(4,) float32", line_of(shape, "def"), "shape (4,)"
    ):
        scan(shape, init)
    with raises(sl.CarryError, "carry['h'][0]", "(2,) float32", "(2,) float64", ".to(torch.float32)"):
        scan(lambda c, x: ({"h": (c["h"][0].double(), c["h"][1])}, None), init)


def test_a_carry_that_changes_structure():
    with raises(sl.CarryError, "another structure", "(*, *)", "[*, *]"):
        scan(lambda c, x: (list(c), None), (torch.zeros(2), torch.zeros(2)))
    with raises(sl.CarryError, "carry: (2,) float32", "a tuple"):
        scan(lambda c, x: ((c, c), None), torch.zeros(2))


def test_a_number_in_the_carry_that_changes():
    with raises(sl.CarryError, "carry[1]", "int 0", "int 1", "torch.tensor"):
        scan(lambda c, x: ((c[0], c[1] + 1), None), (torch.zeros(2), 0))
    with raises(sl.CarryError, "carry is not a tensor in init", "float 0.0", "(2,) float32"):
        scan(lambda c, x: (c + x, None), 0.0, torch.zeros(3, 2))


def test_a_function_that_returns_no_pair():
    with raises(sl.StepError, "does not return a pair", "(carry, y)", "(2,) float32"):
        scan(lambda c, x: c, torch.zeros(2))
    with raises(sl.StepError, "takes a function"):
        scan(3, torch.zeros(2))


def test_the_inputs_of_scan():
    def keep(c, x):
        return c, None

    with raises(sl.InputError, "xs has no tensors", "length="):
        scan(keep, torch.zeros(2), length=None)
    with raises(sl.InputError, "xs['b'] does not have T first", "(3, ...)", "(4,)"):
        scan(keep, torch.zeros(2), {"a": torch.zeros(3), "b": torch.zeros(4)})
    with raises(sl.InputError, "xs does not have T first", "length="):
        scan(keep, torch.zeros(2), torch.zeros(3), length=4)
    with raises(sl.InputError, "init does not fit", "(3, ...)", "(2,) float32"):
        scan(keep, torch.zeros(2), torch.zeros(4, 3), lengths=[1, 2, 3])
    with raises(sl.InputError, "y does not fit", "(3, ...)"):
        scan(lambda c, x: (c, x.sum()), torch.zeros(3), torch.zeros(4, 3), lengths=[4, 4, 4])


# transforms


def test_transforms_over_a_loop():
    loop = sl.Loop(Cell())
    xs = torch.zeros(4, 2, 2)
    with raises(sl.UnsupportedError, "torch.func transform", 'backend="reference"'):
        torch.func.vmap(lambda x: loop(x)[0])(xs[None])
    with raises(sl.UnsupportedError, "torch.func transform"):
        torch.func.grad(lambda x: loop(x)[0].sum())(xs)
    with forward_ad.dual_level(), raises(sl.UnsupportedError, "dual tensor"):
        loop(forward_ad.make_dual(xs, torch.ones_like(xs)))
    with raises(sl.UnsupportedError, "torch.func transform"):
        torch.func.vmap(lambda x: sl.scan(lambda c, v: (c + v, None), torch.zeros(()), x)[0])(
            torch.zeros(2, 3)
        )


# verify


def test_verify_takes_a_loop_a_step_or_a_function():
    with raises(sl.InputError, "takes a Loop, a Step, or a function", "a Linear"):
        sl.verify(nn.Linear(2, 2), XS)
