"""Loop with the plain loop behind it, against loops written by hand."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import steploop as sl


class Cell(sl.Step):
    def __init__(self, inputs=2, hidden=3):
        super().__init__()
        self.a = nn.Linear(inputs, hidden)
        self.b = nn.Linear(hidden, hidden)
        self.h = sl.State(hidden)

    def step(self, x):
        self.h.next = torch.tanh(self.a(x) + self.b(self.h.prev))
        return self.h.next


def by_hand(cell, xs, valid, resets=None, state=None, reverse=False, repeat=False):
    """One row at a time, skipping masked steps altogether."""
    T, B = valid.shape
    ys = [[None] * B for _ in range(T)]
    finals = []
    for b in range(B):
        h = torch.zeros(cell.b.in_features) if state is None else state[b]
        last = torch.zeros(cell.b.in_features)
        for t in reversed(range(T)) if reverse else range(T):
            if valid[t, b]:
                if resets is not None and resets[t, b]:
                    h = torch.zeros(cell.b.in_features)
                h = last = torch.tanh(cell.a(xs[t, b]) + cell.b(h))
                ys[t][b] = h
            else:
                ys[t][b] = last if repeat else torch.zeros_like(last)
        finals.append(h)
    return torch.stack([torch.stack(row) for row in ys]), torch.stack(finals)


@pytest.fixture
def cell():
    return Cell()


def loop_of(cell, **options):
    return sl.Loop(cell, backend="reference", **options)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("repeat", [False, True])
def test_lengths_mask_resets_and_state(cell, reverse, repeat):
    T, B = 7, 5
    xs = torch.randn(T, B, 2)
    lengths = torch.tensor([7, 0, 3, 5, 6])
    mask = torch.rand(T, B) < 0.7
    resets = torch.rand(T, B) < 0.3
    given = torch.randn(B, 3)
    valid = mask & (torch.arange(T)[:, None] < lengths)
    poisoned = torch.where(valid[..., None], xs, torch.nan)
    poisoned.requires_grad_()
    ys, state = loop_of(cell, reverse=reverse)(
        poisoned,
        state={"h": given},
        lengths=lengths,
        mask=mask,
        resets=resets,
        on_masked="repeat" if repeat else "zero",
    )
    wanted, final = by_hand(cell, xs, valid, resets, given, reverse, repeat)
    torch.testing.assert_close(ys, wanted)
    torch.testing.assert_close(state["h"], final)
    ys.sum().backward()
    assert torch.isfinite(poisoned.grad).all() and (poisoned.grad[~valid] == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in cell.parameters())


def test_gradients_with_ragged_rows_are_those_of_the_rows_alone(cell):
    xs = torch.randn(6, 3, 2)
    lengths = [6, 2, 4]
    ys, state = loop_of(cell)(xs, lengths=lengths)
    (ys.square().sum() + state["h"].sum()).backward()
    found = [p.grad.clone() for p in cell.parameters()]
    cell.zero_grad()
    for b, n in enumerate(lengths):
        ys, state = loop_of(cell)(xs[:n, b : b + 1])
        (ys.square().sum() + state["h"].sum()).backward()
    for a, p in zip(found, cell.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_a_reset_stops_gradients(cell):
    xs = torch.randn(4, 2, 2, requires_grad=True)
    resets = torch.zeros(4, 2, dtype=torch.bool)
    resets[2, 0] = True
    ys, _ = loop_of(cell)(xs, resets=resets)
    ys[3].sum().backward()
    assert (xs.grad[:2, 0] == 0).all() and (xs.grad[:2, 1] != 0).any()


def test_gradients_flow_into_a_given_state_and_out_of_the_returned_one(cell):
    given = torch.randn(2, 3, requires_grad=True)
    _, state = loop_of(cell)(torch.randn(3, 2, 2), state={"h": given})
    state["h"].sum().backward()
    assert (given.grad != 0).any()


@pytest.mark.parametrize("batch_first", [False, True])
def test_batch_first_turns_sequences_mask_resets_and_outputs(cell, batch_first):
    xs, mask, resets = torch.randn(5, 3, 2), torch.rand(5, 3) < 0.6, torch.rand(5, 3) < 0.3
    wanted, state = loop_of(cell)(xs, mask=mask, resets=resets)
    turned, other = loop_of(cell, batch_first=True)(xs.transpose(0, 1), mask=mask.T, resets=resets.T)
    torch.testing.assert_close(turned.transpose(0, 1), wanted)
    torch.testing.assert_close(other["h"], state["h"])


@pytest.mark.parametrize("sorted_already", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_in_and_out(cell, sorted_already, reverse):
    lengths = [7, 5, 3, 1] if sorted_already else [3, 7, 1, 5]
    xs = torch.randn(7, 4, 2)
    packed = pack_padded_sequence(xs, lengths, enforce_sorted=sorted_already)
    given = {"h": torch.randn(4, 3)}
    ys, state = loop_of(cell, reverse=reverse)(packed, state=given)
    wanted, final = loop_of(cell, reverse=reverse)(xs, lengths=lengths, state=given)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        a, b = getattr(ys, name), getattr(packed, name)
        assert (a is None and b is None) or torch.equal(a, b)
    torch.testing.assert_close(pad_packed_sequence(ys)[0], wanted)
    torch.testing.assert_close(state["h"], final["h"])


def test_packed_outputs_are_packed_leaf_by_leaf():
    class Two(sl.Step):
        def step(self, x, y):
            return {"sum": x + y, "none": None}

    packed = pack_padded_sequence(torch.randn(4, 2, 3), [4, 2])
    outputs, _ = loop_of(Two(), batch_first=True)(packed, packed)
    torch.testing.assert_close(outputs["sum"].data, 2 * packed.data)
    assert outputs["none"] is None


def test_outputs_are_any_pytree_and_numbers_pass_through():
    class Tree(sl.Step):
        def step(self, x):
            return {"a": (x["u"], None), "n": 3}

    outputs, state = loop_of(Tree())({"u": torch.ones(2, 4), "k": 5})
    assert outputs["a"][0].shape == (2, 4) and outputs["a"][1] is None and outputs["n"] == 3 and state == {}


def test_a_step_may_return_nothing():
    class Quiet(sl.Step):
        def __init__(self):
            super().__init__()
            self.n = sl.State(dtype=torch.int64)

        def step(self):
            self.n.next = self.n.prev + 1

    outputs, state = loop_of(Quiet())(steps=4, batch_size=2)
    assert outputs is None and state["n"].tolist() == [4, 4]


def test_no_steps_gives_empty_outputs_and_the_initial_state(cell):
    xs = torch.randn(0, 2, 2, requires_grad=True)
    given = torch.randn(2, 3)
    ys, state = loop_of(cell)(xs, state={"h": given})
    assert ys.shape == (0, 2, 3) and torch.equal(state["h"], given) and state["h"] is not given


def test_no_rows(cell):
    ys, state = loop_of(cell)(torch.randn(3, 0, 2))
    assert ys.shape == (3, 0, 3) and state["h"].shape == (0, 3)


def test_lengths_of_zero_only(cell):
    ys, state = loop_of(cell)(torch.full((3, 2, 2), torch.nan), lengths=[0, 0])
    assert torch.equal(ys, torch.zeros(3, 2, 3)) and torch.equal(state["h"], torch.zeros(2, 3))


def test_constants_batched_unbatched_and_plain():
    class Mix(sl.Step):
        def step(self, x, *, memory, table, scale):
            return x + memory.sum(1) + table["t"].sum() * scale

    xs, memory, table = torch.randn(3, 2), torch.randn(2, 5), torch.randn(7)
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    ys, _ = loop_of(Mix())(xs, memory=memory, table=sl.unbatched({"t": table}), scale=2, mask=mask)
    torch.testing.assert_close(ys, torch.where(mask, xs + memory.sum(1) + 2 * table.sum(), 0.0))


def test_where_a_closure_fixes_the_batch_masked_rows_still_do_not_matter():
    other = torch.randn(4, 2)

    class Closed(sl.Step):
        def __init__(self):
            super().__init__()
            self.h = sl.State(2)

        def step(self, x):
            self.h.next = self.h.prev + x * other
            return self.h.next

    xs = torch.randn(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1]]).bool()
    poisoned = torch.where(mask[..., None], xs, torch.nan).requires_grad_()
    ys, state = loop_of(Closed())(poisoned, mask=mask)
    sums = (xs * other * mask[..., None]).cumsum(0)
    torch.testing.assert_close(ys, sums * mask[..., None])
    torch.testing.assert_close(state["h"], sums[-1])
    ys.sum().backward()
    assert torch.isfinite(poisoned.grad).all()


def test_the_caller_never_sees_what_a_step_writes_in_place():
    class Vandal(sl.Step):
        def __init__(self):
            super().__init__()
            self.h = sl.State(2)

        def step(self, x, *, c):
            x.add_(1)
            c.mul_(2)
            self.h.prev.add_(x)
            self.h.next = self.h.prev
            return x + c

    xs, c, h = torch.zeros(3, 1, 2), torch.ones(1, 2), torch.zeros(1, 2)
    ys, state = loop_of(Vandal())(xs, c=c, state={"h": h})
    assert torch.equal(ys, torch.full((3, 1, 2), 3.0)) and torch.equal(state["h"], torch.full((1, 2), 3.0))
    assert torch.equal(xs, torch.zeros(3, 1, 2)) and c.eq(1).all() and h.eq(0).all()


def test_python_control_flow_and_plain_autograd_work_in_the_reference(cell):
    class Branch(sl.Step):
        def step(self, x):
            return x if x.sum() > 0 else -x

    xs = torch.randn(4, 1, 3)
    ys, _ = loop_of(Branch())(xs)
    torch.testing.assert_close(ys.sum((1, 2)), xs.sum((1, 2)).abs())


def test_parameters_stand_under_step(cell):
    assert all(name.startswith("step.") for name in loop_of(cell).state_dict())


def test_a_state_added_later_is_seen(cell):
    loop = loop_of(cell)
    loop(torch.randn(2, 2, 2))
    cell.other = sl.State(1)
    assert list(loop(torch.randn(2, 2, 2))[1]) == ["h", "other"]


def test_the_program_is_the_same_object_at_every_call(cell):
    loop = loop_of(cell)
    first = loop.prepare(torch.randn(2, 2, 2)).program
    assert loop.prepare(torch.randn(9, 5, 2), lengths=[1] * 5).program is first
    assert sl.Loop(cell, reverse=True).prepare(torch.randn(9, 5, 2)).program is first


def test_inference_mode_passes_through(cell):
    with torch.inference_mode():
        ys, state = loop_of(cell)(torch.randn(2, 2, 2))
    assert ys.is_inference()


def test_second_derivatives_by_the_reference(cell):
    xs = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)
    loop = loop_of(cell.double())
    assert torch.autograd.gradgradcheck(lambda x: loop(x)[0], xs)
