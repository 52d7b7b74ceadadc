"""`steploop sample`: the same seed, prompts in turn, what it refuses."""

import pytest

from steploop.recipes.charlm import Checkpoint, Choice, Writer


def test_the_same_seed_the_same_text(steploop, trained):
    command = ("sample", "--checkpoint", trained / "best.ckpt", "--prompt", "the cat", "--length", "40")
    first, again, other = (steploop(*command, "--seed", seed) for seed in (1, 1, 2))
    assert first.code == 0, first.err
    assert first.out.startswith("the cat")
    assert len(first.out) == len("the cat") + 40 + 1
    assert first.out == again.out != other.out


def test_greedy_needs_no_seed(steploop, trained):
    command = ("sample", "--checkpoint", trained / "best.ckpt", "--prompt", "the", "--temperature", "0")
    assert steploop(*command).out == steploop(*command).out
    assert steploop(*command, "--top-k", "1").out == steploop(*command, "--top-p", "0.0001").out


def test_interactive_is_one_writer_for_all_prompts(steploop, trained):
    checkpoint = Checkpoint.read(trained / "best.ckpt")
    writer = Writer(checkpoint.model(), checkpoint.vocabulary, Choice(0.8), seed=3)
    expected = ""
    for prompt in ("the cat", "", "sat"):
        writer.read(prompt)
        expected += prompt + "".join(writer.write(30)) + "\n"
    ran = steploop(
        *("sample", "--checkpoint", trained / "best.ckpt", "--interactive", "--length", "30", "--seed", "3"),
        input="the cat\n\nsat\n",
    )
    assert ran.code == 0, ran.err
    assert ran.out == expected


def test_interactive_goes_on_after_a_line_it_cannot_read(steploop, trained):
    ran = steploop(
        "sample", "--checkpoint", trained / "best.ckpt", "--interactive", "--length", "5", input="XYZ\nthe\n"
    )
    assert ran.code == 0
    assert "The prompt has the characters 'X', 'Y', 'Z'" in ran.err
    assert ran.out.startswith("the") and len(ran.out) == len("the") + 5 + 1


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("--prompt", "Zebra the"), "The prompt has the characters 'Z', 'b', which the model has never seen"),
        (("--prompt", ""), "The prompt is empty"),
        (("--prompt", "the", "--top-p", "2"), "--top-p is above 0 and at most 1, got 2"),
    ],
)
def test_what_it_refuses(steploop, trained, arguments, told):
    ran = steploop("sample", "--checkpoint", trained / "best.ckpt", *arguments)
    assert ran.code == 2
    assert told in ran.err
    assert ran.out == ""


def test_no_checkpoint(steploop, tmp_path):
    ran = steploop("sample", "--checkpoint", tmp_path / "no.ckpt", "--prompt", "x")
    assert ran.code == 2
    assert "No such checkpoint" in ran.err
    assert "steploop train charlm" in ran.err
