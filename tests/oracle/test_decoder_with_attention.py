"""DecoderWithAttention: its equations written out, any cell and attention, streams, and the rollout example."""

from __future__ import annotations

import pytest
import torch
from agree import agree
from test_memory_examples import example
from torch import nn

import steploop as sl

T, B, S, V, E, D, H, A = 5, 3, 4, 7, 3, 5, 6, 4
at = sl.nn.attention


def decoder(cell=None, attention=None, context=D, **options):
    torch.manual_seed(2)
    fed = A if options.get("input_feeding", True) else 0
    return at.DecoderWithAttention(
        nn.Embedding(V, E),
        cell or sl.nn.GRUCell(E + fed, H),
        attention or at.GeneralAttention(H, D),
        combine=nn.Linear(context + H, A, bias=False),
        output=nn.Linear(A, V),
        **options,
    ).double()


def batch():
    labels = torch.randint(0, V, (T, B))
    memory = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    return labels, dict(memory=memory, memory_lengths=torch.tensor([S, 2, 1]))


def by_hand(step, labels, memory, memory_lengths):
    """Equations 5 to 7 of the paper, with input feeding, a row and a step at a time."""
    rows = []
    for b in range(B):
        h, fed, found = torch.zeros(1, H, dtype=torch.float64), torch.zeros(A, dtype=torch.float64), []
        entries = memory[b, : memory_lengths[b]]
        for label in labels[:, b]:
            x = torch.cat([step.embedding.weight[label], fed]) if step.fed is not None else step.embedding.weight[label]
            cell = step.cell
            h = torch.gru_cell(x[None], h, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
            weights = torch.softmax(entries @ step.attention.keys.weight.t() @ h[0], 0)
            fed = torch.tanh(step.combine.weight @ torch.cat([weights @ entries, h[0]]))
            found.append(step.output.weight @ fed + step.output.bias)
        rows.append(torch.stack(found))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("input_feeding", [True, False])
def test_is_what_the_paper_says(input_feeding):
    step, (labels, constants) = decoder(input_feeding=input_feeding), batch()
    expected = by_hand(step, labels, **constants)
    leaves = [constants["memory"], *step.parameters()]
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, cotangent)
    for backend in ("reference", "auto"):
        scores, state = sl.Loop(step, backend=backend)(labels, **constants)
        torch.testing.assert_close(scores, expected, rtol=1e-11, atol=1e-11)
        for a, b in zip(torch.autograd.grad(scores, leaves, cotangent), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert sorted(state) == (["cell.h", "fed"] if input_feeding else ["cell.h"])


def test_only_what_feeds_back_is_in_the_loop():
    step, (labels, constants) = decoder(), batch()
    plan = sl.Loop(step).plan(labels, **constants)
    (loop,), (back,) = plan.loops, plan.backward.loops
    assert loop.backend == back.backend == "cpu" and sorted(loop.states) == ["cell.h", "fed"]
    assert "embedding" in {op.name for op in plan.before}
    lines = {op.line for op in plan.after if op.name == "mm"}  # the scores of all steps at once
    assert any(line.startswith("decoder.py") for line in lines)
    names = [op.name for op in loop.ops]
    assert names.count("mm") <= 3, str(plan)  # of the state, of what was fed, and W_c
    without = sl.Loop(decoder(input_feeding=False)).plan(labels, **constants)
    assert all("general.py" not in op.line and "dot.py" not in op.line for op in without.loops[0].ops), str(without)


class Odd(sl.Step):
    """A cell with a dict of states of several kinds, and a constant of its own."""

    def __init__(self, inputs):
        super().__init__()
        self.mix, self.h, self.count = nn.Linear(inputs, H), sl.State(H), sl.State(init=0, dtype=torch.int64)

    def step(self, x, *, speaker):
        states = {"h": self.h.prev, "count": self.count.prev + 1}
        h = self.mix(x) + speaker
        h += states["h"] / states["count"].unsqueeze(1)
        self.h.next, self.count.next = h.tanh(), states["count"]
        return self.h.next


CELLS = {
    "stack": lambda: sl.nn.Stack(
        sl.nn.LSTMCell(E + A, 5), sl.nn.Dropout(0.0), sl.nn.Residual(sl.nn.GRUCell(5, 5)), nn.Linear(5, H)
    ),
    "zoneout": lambda: sl.nn.Zoneout(sl.nn.LSTMCell(E + A, H), 0.3).eval(),
    "odd": lambda: Odd(E + A),
}
ATTENTIONS = {
    "location": (lambda: at.LocationSensitiveAttention(H, D, 3, filters=2, width=3), D),
    "heads": (lambda: at.MultiHeadAttention(H, D, 2, 4), 4),
}


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_any_cell_and_any_attention(cell, attention):
    make, context = ATTENTIONS[attention]
    step = decoder(CELLS[cell](), make(), context, return_weights=True)
    labels, constants = batch()
    if cell == "odd":
        constants["speaker"] = torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    agree(step, labels, backend="cpu", save="states", lengths=torch.tensor([5, 0, 3]), **constants)
    output, _ = step(labels, **constants)
    assert output["scores"].shape == (T, B, V) and output["weights"].shape[-1] == S
    stream = sl.Loop(step).stream(B, **{name: value.detach() for name, value in constants.items()})
    with torch.no_grad():
        streamed = torch.stack([stream(label)["scores"] for label in labels])
    torch.testing.assert_close(streamed, output["scores"].detach())


def test_a_label_may_be_a_vector():
    step, (labels, constants) = decoder(), batch()
    one_hot = nn.functional.one_hot(labels, V).double()
    torch.testing.assert_close(step(one_hot, **constants)[0], step(labels, **constants)[0])


def test_a_subclass_may_start_from_the_memory():
    class Bridged(at.DecoderWithAttention):
        def __init__(self, *args, **named):
            super().__init__(*args, **named)
            self.bridge = nn.Linear(D, H)

        def begin(self, memory):
            self.cell.h.prev = torch.tanh(self.bridge(memory.mean(1)))

    plain = decoder()
    step = Bridged(plain.embedding, plain.cell, plain.attention, plain.combine, plain.output).double()
    labels, constants = batch()
    agree(step, labels, backend="cpu", save="states", **constants)


def test_wrong_parts_are_named():
    parts = dict(
        embedding=nn.Embedding(V, E), cell=sl.nn.GRUCell(E + A, H), attention=at.DotAttention(H),
        combine=nn.Linear(2 * H, A), output=nn.Linear(A, V),
    )  # fmt: skip
    with pytest.raises(sl.StepError, match="cell is a Step"):
        at.DecoderWithAttention(**{**parts, "cell": nn.GRUCell(E + A, H)})
    with pytest.raises(sl.StepError, match="size="):
        at.DecoderWithAttention(**{**parts, "combine": nn.Sequential(nn.Linear(2 * H, A))})
    at.DecoderWithAttention(**{**parts, "combine": nn.Sequential(nn.Linear(2 * H, A))}, size=A)
    with pytest.raises(sl.StepError, match="wrong"):
        at.DecoderWithAttention(**parts)(torch.zeros(T, B).long(), memory=torch.randn(B, S, H), wrong=torch.ones(B))
    with pytest.raises(sl.SteploopError, match="memory"):
        at.DecoderWithAttention(**parts)(torch.zeros(T, B).long())


def test_the_rollout_has_its_attention_and_three_cells_in_loops_and_nothing_else():
    module = example("rollout")
    step, labels, constants = module.example()
    plan = sl.Loop(step).plan(labels, **constants)
    states = [["layers.0.h"], ["layers.1.h"], ["layers.2.h"]]
    assert [loop.states for loop in plan.loops] == states, str(plan)
    assert [loop.states for loop in plan.backward.loops] == states[::-1], str(plan)
    assert {loop.backend for loop in (*plan.loops, *plan.backward.loops)} == {"cpu"}
    products = [[op.name for op in loop.ops if op.name in ("mm", "bmm")] for loop in plan.loops]
    # bottom: the query, its energies, the context, and two of the cell; above: one of the state
    assert products == [["mm", "mm", "bmm", "mm", "mm"], ["mm"], ["mm"]], str(plan)


def test_the_rollout_equals_the_plain_loop_with_given_labels_its_own_and_some_of_each():
    module = example("rollout")
    step = module.Rollout(9, 4, D).double()
    labels, constants = batch()
    where = torch.rand(T, B) < 0.5
    for xs, more in (((labels,), {}), ((labels, where), {}), ((), dict(steps=T, batch_size=B))):
        agree(step, *xs, backend="cpu", save="states", lengths=torch.tensor([5, 1, 3]), **constants, **more)


def test_the_rollout_learns():
    torch.manual_seed(0)
    module = example("rollout")
    model = module.Model(6, 24)
    losses = module.train(model, 50, 6, longest=3, rows=32)
    losses += module.train(model, 5, 6, longest=3, rows=32, own=0.5)
    assert losses[-1] < 0.7 * losses[0]
    assert 0 <= module.accuracy(model, 6, longest=3) <= 1
