"""Step, State, share: what belongs to the module itself."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

import steploop as sl


class Cell(sl.Step):
    def __init__(self, inputs, hidden):
        super().__init__()
        self.a = nn.Linear(inputs, hidden)
        self.b = nn.Linear(hidden, hidden)
        self.h = sl.State(hidden)

    def step(self, x):
        self.h.next = torch.tanh(self.a(x) + self.b(self.h.prev))
        return self.h.next


class Tied(sl.Step):
    def __init__(self):
        super().__init__()
        self.first = Cell(4, 4)
        self.second = sl.share(self.first)

    def step(self, x):
        return self.second(self.first(x))


def by_hand(cell, xs, h=None):
    h = xs.new_zeros(xs.shape[1], cell.b.in_features) if h is None else h
    ys = []
    for x in xs:
        h = torch.tanh(cell.a(x) + cell.b(h))
        ys.append(h)
    return torch.stack(ys), h


def reference(step, **options):
    return sl.Loop(step, backend="reference", **options)


def test_share_same_parameters_own_states():
    step, xs = Tied(), torch.randn(5, 3, 4)
    ys, state = reference(step)(xs)
    one, h1 = by_hand(step.first, xs)
    two, h2 = by_hand(step.first, one)
    torch.testing.assert_close(ys, two)
    assert list(state) == ["first.h", "second.h"]
    torch.testing.assert_close(state["first.h"], h1)
    torch.testing.assert_close(state["second.h"], h2)


def test_shared_parameters_appear_once():
    step = Tied()
    assert all(key.startswith("first.") for key in step.state_dict())
    assert len(list(step.parameters())) == 4
    other = Tied()
    assert str(other.load_state_dict(step.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(other.second.a.weight, step.first.a.weight)


def _deepcopied(step):
    return copy.deepcopy(step)


def _pickled(step):
    return pickle.loads(pickle.dumps(step))


def _saved(step):
    file = io.BytesIO()
    torch.save(step, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _own_state(step):
    class Keeper(Tied):
        def __getstate__(self):
            return dict(self.__dict__)

    step.__class__ = Keeper
    return copy.deepcopy(step)


@pytest.mark.parametrize("copied", [_deepcopied, _pickled, _saved, _own_state])
def test_copies_stay_tied_and_work(copied):
    step, xs = Tied(), torch.randn(5, 3, 4)
    before, _ = reference(step)(xs)
    step.whole_sequence()  # what a call keeps on the module is no part of a copy
    twin = copied(step)
    assert not twin._kept or twin.whole_sequence().step is twin
    assert twin.first.a.weight is twin.second.a.weight
    assert twin.first.a.weight is not step.first.a.weight
    assert twin.first.h is not twin.second.h
    torch.testing.assert_close(reference(twin)(xs)[0], before)


def test_a_shallow_copy_has_a_loop_of_its_own():
    step = Tied()
    loop = step.whole_sequence()
    twin = copy.copy(step)
    assert twin.whole_sequence().step is twin and step.whole_sequence() is loop


def test_shared_follows_to_and_new_parameters():
    step = Tied().double()
    assert step.second.a.weight.dtype == torch.float64
    step.first.a.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    assert step.second.a.weight is step.first.a.weight


def test_share_of_a_learned_state_shares_the_parameter():
    class Learned(sl.Step):
        def __init__(self):
            super().__init__()
            self.h = sl.State(4, init="learned")

        def step(self, x):
            self.h.next = self.h.prev + x
            return self.h.next

    cell = Learned()
    twin = sl.share(cell)
    assert twin.h is not cell.h and twin.h.init is cell.h.init


def test_state_kinds_in_the_state_dict():
    class Kinds(sl.Step):
        def __init__(self):
            super().__init__()
            self.a = sl.State(3, init="learned")
            self.b = sl.State(3, init=torch.arange(3.0))
            self.c = sl.State(3, init=2.0)
            self.n = sl.State(dtype=torch.int64, init=1)

        def step(self):
            self.n.next = self.n.prev + 1
            return self.a.prev, self.b.prev, self.c.prev, self.n.prev

    step = Kinds()
    assert list(step.state_dict()) == ["a.init"]
    (a, b, c, n), state = reference(step)(steps=2, batch_size=2)
    assert torch.equal(a, torch.zeros(2, 2, 3))
    assert torch.equal(b[1], torch.arange(3.0).expand(2, 3))
    assert torch.equal(c, torch.full((2, 2, 3), 2.0))
    assert n[:, 0].tolist() == [1, 2] and n.dtype == torch.int64 and state["n"].tolist() == [3, 3]


def test_learned_init_gets_its_gradient():
    class Sum(sl.Step):
        def __init__(self):
            super().__init__()
            self.h = sl.State(3, init="learned")

        def step(self, x):
            self.h.next = self.h.prev * x
            return self.h.next

    step = Sum()
    _, state = reference(step)(torch.full((2, 4, 3), 3.0))
    state["h"].sum().backward()
    torch.testing.assert_close(step.h.init.grad, torch.full((3,), 36.0))


def test_the_state_takes_the_dtype_of_the_first_floating_parameter():
    cell = Cell(2, 3).double()
    _, state = reference(cell)(torch.randn(2, 4, 2, dtype=torch.float64))
    assert state["h"].dtype == torch.float64


def test_without_parameters_the_state_takes_the_dtype_of_the_first_floating_input():
    class Sum(sl.Step):
        def __init__(self):
            super().__init__()
            self.h = sl.State(3)

        def step(self, i, x):
            self.h.next = self.h.prev + x
            return None

    _, state = reference(Sum())(
        torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, 3, dtype=torch.float64)
    )
    assert state["h"].dtype == torch.float64


def test_a_step_called_outside_a_loop_runs_the_whole_sequence():
    cell, xs = Cell(2, 3), torch.randn(5, 4, 2)
    cell.whole_sequence().backend = "reference"
    ys, state = cell(xs, lengths=[5, 5, 5, 5])
    torch.testing.assert_close(ys, by_hand(cell, xs)[0])
    assert len(list(cell.modules())) == 4 and not copy.deepcopy(cell)._kept


def test_begin_runs_parents_first_with_the_constants_it_names():
    order = []

    class Child(sl.Step):
        def __init__(self):
            super().__init__()
            self.h = sl.State(init=None)

        def begin(self, memory):
            order.append("child")
            self.h.prev = memory.mean(1) + self.h.prev

        def step(self):
            self.h.next = self.h.prev + 1
            return self.h.prev

    class Parent(sl.Step):
        def __init__(self):
            super().__init__()
            self.child = Child()

        def begin(self, *, scale, memory):
            order.append("parent")
            self.child.h.prev = memory.sum(1) * scale

        def step(self, *, memory):
            return self.child()

    memory = torch.randn(2, 6, 3, requires_grad=True)
    ys, state = reference(Parent())(steps=3, memory=memory, scale=2.0)
    assert order == ["parent", "child"]
    start = 2 * memory.sum(1) + memory.mean(1)
    torch.testing.assert_close(ys, torch.stack([start, start + 1, start + 2]))
    ys.sum().backward()
    assert memory.grad is not None


def test_begin_with_a_given_state_and_resets():
    class Count(sl.Step):
        def __init__(self):
            super().__init__()
            self.h = sl.State(init=None)

        def begin(self, start):
            self.h.prev = start

        def step(self, x):
            self.h.next = self.h.prev + x
            return self.h.next

    loop = reference(Count())
    resets = torch.tensor([[False, False], [False, True], [False, False]])
    ys, state = loop(
        torch.ones(3, 2),
        state={"h": torch.tensor([10.0, 20.0])},
        resets=resets,
        start=torch.tensor([1.0, 2.0]),
    )
    assert ys.tolist() == [[11, 21], [12, 3], [13, 4]]
    assert state.reset_()["h"].tolist() == [1, 2]


def test_a_loop_in_a_step_is_an_inner_sequence_with_fresh_states():
    class Inner(sl.Step):
        def __init__(self):
            super().__init__()
            self.words = sl.Loop(Cell(2, 3), backend="reference", batch_first=True)
            self.h = sl.State(3)

        def step(self, sentence):
            _, state = self.words(sentence)
            self.h.next = self.h.prev + state["h"]
            return self.h.next

    step, xs = Inner(), torch.randn(3, 4, 6, 2)
    ys, state = reference(step)(xs)
    assert list(state) == ["h"]
    wanted = sum(by_hand(step.words.step, x.transpose(0, 1))[1] for x in xs)
    torch.testing.assert_close(ys[-1], wanted)


def test_one_module_serves_many_threads_at_once():
    cell = Cell(2, 3)
    loop = reference(cell)
    inputs = [torch.randn(20, 2, 2) for _ in range(4)]
    wanted = [by_hand(cell, xs)[0] for xs in inputs]
    found = [None] * 4

    def work(i):
        found[i] = loop(inputs[i])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_wrapper_may_rewrite_what_its_child_wrote():
    class Halve(sl.Step):
        def __init__(self):
            super().__init__()
            self.cell = Cell(2, 3)

        def step(self, x):
            self.cell(x)
            self.cell.h.rewrite(self.cell.h.latest * 0.5)
            return self.cell.h.next

    step, xs = Halve(), torch.randn(3, 4, 2)
    ys, _ = reference(step)(xs)
    h = torch.zeros(4, 3)
    for x, y in zip(xs, ys, strict=True):
        h = 0.5 * torch.tanh(step.cell.a(x) + step.cell.b(h))
        torch.testing.assert_close(y, h)


def test_forward_hooks_of_a_step_run_at_every_step():
    cell, calls = Cell(2, 3), []
    cell.register_forward_hook(lambda *_: calls.append(1))
    reference(cell)(torch.randn(5, 4, 2))
    assert len(calls) == 5


def test_autocast_keeps_the_states_dtype():
    cell = Cell(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = reference(cell)(torch.randn(3, 4, 2))
    assert state["h"].dtype == torch.float32
