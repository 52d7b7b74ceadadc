"""The character model's parts: windows of streams, drawing characters, reading on with a state."""

import math

import pytest
import torch

import steploop as sl
from steploop.recipes import texts
from steploop.recipes.charlm import CharModel, Choice, Shape, Streams, Writer, bits, cross_entropy

SMALL = Shape("gru", 2, 8, 4, 0.0)


def small_loop(characters: int = 5, shape: Shape = SMALL) -> sl.Loop:
    torch.manual_seed(0)
    return sl.Loop(CharModel(characters, shape), backend="eager").eval()


def test_windows_go_on_where_the_last_one_stopped():
    streams = Streams(torch.arange(101), streams=4, steps=10)
    windows = list(streams.one_pass())
    assert [window.fresh for window in windows] == [True, False, False]
    inputs = torch.cat([window.inputs for window in windows])
    assert inputs.shape == (25, 4)
    assert torch.equal(inputs.t().flatten(), torch.arange(100))
    for window in windows:
        assert torch.equal(window.targets, window.inputs + 1)


def test_each_pass_begins_elsewhere_and_depends_on_nothing_but_the_seed():
    numbers = torch.arange(1000)
    first, second = (Streams(numbers, streams=4, steps=16, seed=s) for s in (1, 2))
    passes = [first.window(k * first.windows) for k in range(4)]
    assert all(window.fresh for window in passes)
    assert len({window.inputs[0, 0].item() for window in passes}) > 1
    again = Streams(numbers, streams=4, steps=16, seed=1)
    assert torch.equal(again.window(2 * first.windows + 1).inputs, first.window(2 * first.windows + 1).inputs)
    assert any(
        not torch.equal(first.window(k * first.windows).inputs, second.window(k * first.windows).inputs)
        for k in range(4)
    )


def test_every_window_lies_within_the_text():
    for length in (81, 97, 130, 1000):
        streams = Streams(torch.arange(length), streams=4, steps=16, seed=3)
        for k in range(5 * streams.windows):
            window = streams.window(k)
            assert window.inputs.shape == (16, 4)
            assert window.targets.max() < length


def test_a_text_that_is_too_short():
    with pytest.raises(
        sl.DataError, match=r"80 characters cannot be cut into 4 streams of 16 steps.*takes 81"
    ):
        Streams(torch.arange(80), streams=4, steps=16, seed=0)
    Streams(torch.arange(81), streams=4, steps=16, seed=0)


def test_a_carried_state_makes_windows_one_long_sequence():
    loop, numbers = small_loop(), torch.randint(5, (61,))
    whole, _ = loop(numbers[:-1, None])
    state, total, count = None, 0.0, 0
    for window in Streams(numbers, streams=1, steps=7).one_pass():
        logits, state = loop(window.inputs, state=state)
        total += cross_entropy(logits, window.targets, reduction="sum").item()
        count += window.targets.numel()
    assert count == 60
    assert total / count == pytest.approx(cross_entropy(whole, numbers[1:, None]).item(), rel=1e-5)


@pytest.mark.parametrize("cell, states", [("gru", ["h"]), ("lstm", ["h", "c"])])
def test_each_layer_has_states_of_its_own(cell, states):
    loop = small_loop(shape=Shape(cell, 3, 8, 4, 0.1))
    _, state = loop(torch.zeros(4, 2, dtype=torch.int64))
    assert sorted(state) == sorted(f"layers.{place}.{name}" for place in (1, 3, 5) for name in states)


def test_bits():
    assert bits(math.log(2)) == pytest.approx(1.0)


LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


@pytest.mark.parametrize(
    "choice, expected",
    [
        (Choice(1.0), [0.1, 0.4, 0.2, 0.3]),
        (Choice(0.0), [0, 1, 0, 0]),
        (Choice(0.5), [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        (Choice(1.0, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Choice(1.0, top_k=9), [0.1, 0.4, 0.2, 0.3]),
        (Choice(1.0, top_p=0.6), [0, 4 / 7, 0, 3 / 7]),
        (Choice(1.0, top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Choice(1.0, top_p=0.001), [0, 1, 0, 0]),
        (Choice(1.0, top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7]),
    ],
)
def test_which_characters_can_be_drawn(choice, expected):
    assert torch.allclose(
        choice.probabilities(LOGITS), torch.tensor(expected, dtype=torch.float32), atol=1e-6
    )


@pytest.mark.parametrize(
    "wrong, told",
    [
        (dict(temperature=-1), "--temperature is 0 or more, got -1"),
        (dict(top_k=-2), r"--top-k is 0 \(no limit\) or more, got -2"),
        (dict(top_p=0), "--top-p is above 0 and at most 1, got 0"),
        (dict(top_p=1.5), "--top-p is above 0 and at most 1, got 1.5"),
    ],
)
def test_choices_that_mean_nothing(wrong, told):
    with pytest.raises(sl.DataError, match=told):
        Choice(**wrong)


def writer(seed: int = 1) -> Writer:
    return Writer(small_loop(), texts.Vocabulary("abcde"), Choice(1.0), seed)


def test_the_same_seed_writes_the_same_text():
    texts_written = []
    for seed in (1, 1, 2):
        one = writer(seed)
        one.read("abc")
        texts_written.append("".join(one.write(60)))
    assert texts_written[0] == texts_written[1] != texts_written[2]


def test_what_was_read_is_remembered_between_prompts():
    together, apart = writer(), writer()
    together.read("abcd")
    apart.read("ab")
    apart.read("cd")
    assert torch.equal(together.logits, apart.logits)
    fresh = writer()
    fresh.read("cd")
    assert not torch.allclose(fresh.logits, apart.logits)


def test_what_was_written_is_remembered_too():
    one, other = writer(), writer()
    one.read("ab")
    written = "".join(one.write(10))
    other.read("ab" + written)
    assert torch.allclose(one.logits, other.logits)


def test_a_prompt_with_unknown_characters_changes_nothing():
    one = writer()
    one.read("ab")
    before = one.logits
    with pytest.raises(sl.DataError, match="The prompt has the character 'x'"):
        one.read("cx")
    assert one.logits is before


def test_nothing_to_go_on_from():
    with pytest.raises(sl.DataError, match="The prompt is empty"):
        next(writer().write(1))
