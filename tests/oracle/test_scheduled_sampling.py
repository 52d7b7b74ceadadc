"""ScheduledSampling: what the model reads at each step, how often it is its own choice, and where gradients go."""

from __future__ import annotations

import copy

import pytest
import torch
from agree import agree
from torch import nn

import steploop as sl
from steploop.search import ScheduledSampling

T, B, V, H = 6, 4, 5, 3


class Reads(sl.Step):
    """label (B,) or (B, V) -> scores (B, V), and what it read."""

    def __init__(self):
        super().__init__()
        self.embedding, self.cell, self.out = nn.Embedding(V, H), sl.nn.GRUCell(H, H), nn.Linear(H, V)
        with torch.no_grad():
            self.out.weight.mul_(8)

    def step(self, label, *, offset=None):
        x = label @ self.embedding.weight if label.is_floating_point() else self.embedding(label)
        scores = self.out(self.cell(x if offset is None else x + offset))
        return {"scores": scores, "read": label}


def model():
    torch.manual_seed(4)
    return Reads().double()


def labels(steps=T, batch=B):
    return torch.randint(0, V, (steps, batch))


def by_hand(inner, given, feeds_back):
    """The plain loop, with the coins (T, B) given; argmax."""
    rows = []
    for b in range(given.shape[1]):
        h, own, found = torch.zeros(1, H, dtype=torch.float64), None, []
        for t in range(len(given)):
            label = given[t, b] if own is None or not feeds_back[t, b] else own
            c = inner.cell
            h = torch.gru_cell(inner.embedding(label)[None], h, c.weight_ih, c.weight_hh, c.bias_ih, c.bias_hh)
            scores = inner.out(h)[0]
            own = scores.argmax()
            found.append((scores, label))
        rows.append([torch.stack(parts) for parts in zip(*found, strict=True)])
    return [torch.stack(parts, 1) for parts in zip(*rows, strict=True)]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("p", [0, 1, 1.0])
def test_all_given_and_all_its_own(backend, p):
    inner, given = model(), labels()
    loop = sl.Loop(ScheduledSampling(inner, p, scores="scores"), backend=backend)
    output, state = loop(given)
    scores, read = by_hand(inner, given, torch.full((T, B), bool(p)))
    torch.testing.assert_close(output["scores"], scores)
    assert torch.equal(output["read"], read)
    assert torch.equal(state["own"], scores[-1].argmax(-1))
    if p == 0:
        torch.testing.assert_close(output["scores"], inner(given)[0]["scores"])


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("p", [0.3, torch.tensor(0.3), lambda updates: 0.3])
def test_each_row_throws_its_own_coin_at_each_step(backend, p):
    inner, given = model(), torch.full((40, 50), -5)
    given[0] = 0
    given[1:] = V - 1
    inner.out.bias.data[0] = 1e3  # it always chooses 0
    output, _ = sl.Loop(ScheduledSampling(inner, p, scores="scores"), backend=backend)(given)
    coins = (output["read"] == 0)[1:]
    assert abs(coins.double().mean() - 0.3) < 4 * (0.21 / coins.numel()) ** 0.5
    assert not torch.equal(coins[0], coins[1]) and not torch.equal(coins[:, 0], coins[:, 1])
    both = (coins[1:] & coins[:-1]).double().mean()
    assert abs(both - 0.09) < 0.03
    torch.testing.assert_close(output["scores"], by_hand(inner, given, output["read"] == 0)[0])


def test_lengths_masks_resets_and_states_as_in_the_plain_loop():
    """With p=1 nothing is random."""
    step, given = ScheduledSampling(model(), 1.0, scores="scores"), labels()
    mask, resets = torch.rand(T, B) < 0.7, torch.rand(T, B) < 0.4
    for arguments in ({}, {"lengths": torch.tensor([6, 0, 2, 4])}, {"mask": mask}, {"mask": mask, "resets": resets}):
        agree(step, given, backend="cpu", save="states", **arguments)
    output, _ = step(given, resets=resets)
    assert torch.equal(output["read"][resets], given[resets])  # a row that starts anew takes the given label
    whole, last = step(given)
    a, state = step(given[:2])
    b, after = step(given[2:], state=state)
    assert torch.equal(torch.cat([a["read"], b["read"]]), whole["read"]) and torch.equal(after["own"], last["own"])
    stream = sl.Loop(step).stream(B)
    with torch.no_grad():
        assert torch.equal(torch.stack([stream(label)["read"] for label in given]), whole["read"])


def test_it_is_one_native_loop_with_constants_and_draws_outside():
    step, given = ScheduledSampling(model(), 0.5, "sample", scores="scores"), labels()
    offset = torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    plan = sl.Loop(step).plan(given, offset=offset)
    assert [loop.backend for loop in (*plan.loops, *plan.backward.loops)] == ["cpu", "cpu"], str(plan)
    drawn = {"rand", "exponential", "uniform"}
    assert not drawn & {op.name for op in plan.loops[0].ops}, str(plan)
    report = sl.verify(sl.Loop(step), given, offset=offset)
    assert "same ones" in str(report)


def test_a_sampled_choice_is_drawn_from_the_scores():
    inner = model()
    inner.out.weight.data.zero_()
    inner.out.bias.data.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4, 1e-9]).log())
    output, _ = ScheduledSampling(inner, 1, "sample", scores=lambda o: o["scores"])(labels(60, 50))
    share = torch.bincount(output["read"][1:].flatten(), minlength=V) / output["read"][1:].numel()
    assert (share - torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0])).abs().max() < 4 * 0.5 / (59 * 50) ** 0.5


def test_a_schedule_goes_on_with_the_updates_and_captures_nothing_anew():
    from steploop.compiler import capture_store

    step = ScheduledSampling(model(), lambda updates: min(1.0, updates / 4), scores="scores")
    loop, given = sl.Loop(step), labels()
    reference, made = sl.Loop(step, backend="reference"), None
    for expected in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0):
        assert step.p == expected
        output, _ = loop(given)
        if expected in (0.0, 1.0):
            assert torch.equal(output["read"], reference(given)[0]["read"])
        made = made or capture_store.captured
        step.advance()
    assert capture_store.captured == made
    restored = ScheduledSampling(model(), lambda updates: min(1.0, updates / 4), scores="scores")
    restored.load_state_dict(step.state_dict())
    assert restored.p == 1.0 and int(restored.updates) == 6
    restored.advance(2)
    assert int(restored.updates) == 8
    assert ScheduledSampling(model(), 0.5, scores="scores").extra_repr() == "p=0.5, choose='argmax'"


def test_a_tensor_may_be_written_into_at_any_time():
    p, given = torch.tensor([0.0], dtype=torch.float64), labels()
    step = ScheduledSampling(model(), p, scores="scores").to(torch.float64)
    loop = sl.Loop(step)
    first = loop(given)[0]["read"]
    assert torch.equal(first, given)
    p.fill_(1)
    own = loop(given)[0]["read"]
    assert not torch.equal(own, given)
    step.p = 0.0
    assert p == 0 and torch.equal(loop(given)[0]["read"], given)
    assert copy.deepcopy(step).p == 0.0


def test_straight_through():
    """The same labels, and the gradient of a softmax where a choice was fed back."""
    inner, given = model(), labels()
    plain = ScheduledSampling(inner, 1.0, scores="scores")
    step = ScheduledSampling(inner, 1.0, scores="scores", straight_through=True, labels=V)
    output, _ = step(given)
    expected, _ = plain(given)
    torch.testing.assert_close(output["scores"], expected["scores"])
    assert torch.equal(output["read"].argmax(-1), expected["read"])
    agree(step, given, backend="cpu", save="states", lengths=torch.tensor([6, 2, 0, 3]))

    def by_hand():
        h, vector, found = torch.zeros(B, H, dtype=torch.float64), nn.functional.one_hot(given[0], V).double(), []
        for _ in range(T):
            c = inner.cell
            x = vector @ inner.embedding.weight
            h = torch.gru_cell(x, h, c.weight_ih, c.weight_hh, c.bias_ih, c.bias_hh)
            scores = inner.out(h)
            soft = scores.softmax(-1)
            vector = nn.functional.one_hot(scores.argmax(-1), V) + soft - soft.detach()
            found.append(scores)
        return torch.stack(found)

    parameters = list(inner.parameters())
    weights = torch.randn(T, B, V, dtype=torch.float64)
    found = torch.autograd.grad((output["scores"] * weights).sum(), parameters)
    wanted = torch.autograd.grad((by_hand() * weights).sum(), parameters)
    without = torch.autograd.grad((expected["scores"] * weights).sum(), parameters)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found[-1], without[-1])


def test_a_decoder_with_attention_is_a_model():
    at = sl.nn.attention
    decoder = at.DecoderWithAttention(
        nn.Embedding(V, H), sl.nn.LSTMCell(H + 2, H), at.LocationSensitiveAttention(H, 4, 3, filters=2, width=3),
        combine=nn.Linear(4 + H, 2), output=nn.Linear(2, V),
    )  # fmt: skip
    memory, given = torch.randn(B, 3, 4), labels()
    for options in ({}, {"straight_through": True, "labels": V}):
        step = ScheduledSampling(sl.Loop(decoder), 0.5, **options)
        scores, state = step(given, memory=memory, memory_lengths=torch.tensor([3, 1, 2, 0]))
        assert scores.shape == (T, B, V) and scores.isfinite().all()
        assert {"own", "model.fed", "model.cell.c", "model.attention.before"} <= set(state)
        scores.logsumexp(-1).sum().backward()


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: ScheduledSampling(nn.Linear(1, 1), 0.5), sl.StepError, "wraps a Step"),
        (lambda: ScheduledSampling(Reads(), 1.5), sl.InputError, r"a number in \[0, 1\]"),
        (lambda: ScheduledSampling(Reads(), True), sl.InputError, "probability"),
        (lambda: ScheduledSampling(Reads(), float("nan")), sl.InputError, "nan"),
        (lambda: ScheduledSampling(Reads(), torch.ones(2)), sl.InputError, r"\(2,\) float32"),
        (lambda: ScheduledSampling(Reads(), lambda updates: -1), sl.InputError, "probability"),
        (lambda: ScheduledSampling(Reads(), 0.5, "best"), sl.InputError, "argmax"),
        (lambda: ScheduledSampling(Reads(), 0.5, straight_through=True), sl.InputError, "labels=V"),
        (lambda: ScheduledSampling(Reads(), 0.5, scores="scores")(labels(), wrong=labels()[0]), sl.StepError, "wrong"),
    ],
)
def test_wrong_arguments_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()
