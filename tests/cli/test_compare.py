"""`steploop compare`: a table, a picture and a sentence."""

import pytest

from steploop.recipes.charlm import Shape
from steploop.recipes.charlm_compare import Outcome, verdict


def outcome(layers: int, units: int, nats: float) -> Outcome:
    history = [dict(val_nats=nats + 1, characters=10, training_seconds=1.0)]
    history.append(dict(val_nats=nats, characters=20, training_seconds=2.0))
    return Outcome(Shape("gru", layers, units), 1000, history)


@pytest.mark.parametrize(
    "outcomes, sentence",
    [
        (
            [(1, 64, 1.9), (2, 64, 1.8), (1, 128, 1.7), (2, 128, 1.6)],
            "2 x 128 is the best with 1.600 nats per character; "
            "more layers helped (at 128 units 1 layer reaches 1.700 and 2 layers 1.600).",
        ),
        (
            [(1, 64, 1.5), (2, 64, 1.8), (3, 64, 1.7)],
            "1 x 64 is the best with 1.500 nats per character; more layers did not help within this budget "
            "(at 64 units 1 layer reaches 1.500 and 3 layers 1.700).",
        ),
        (
            [(1, 64, 1.501), (2, 64, 1.5)],
            "2 x 64 is the best with 1.500 nats per character; more layers made no difference that this "
            "budget can show (at 64 units 1 layer reaches 1.501 and 2 layers 1.500).",
        ),
        (
            [(2, 64, 1.6), (2, 128, 1.5)],
            "2 x 128 is the best with 1.500 nats per character; "
            "one depth says nothing about whether more layers help.",
        ),
    ],
)
def test_the_sentence(outcomes, sentence):
    assert verdict([outcome(*one) for one in outcomes]) == sentence


def test_a_sweep(steploop, text, tmp_path):
    command = (
        "compare", "--data", text, "--out", tmp_path, "--layers", "1,2", "--units", "4,8", "--embedding", "4",
        "--streams", "4", "--steps", "8", "--characters", "160",
    )  # fmt: skip
    ran = steploop(*command)
    assert ran.code == 0, ran.err
    for name in (
        "1 x 4",
        "2 x 4",
        "1 x 8",
        "2 x 8",
        "bits/char",
        "chars/s",
        "is the best with",
        "more layers",
    ):
        assert name in ran.out, name
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "2x8-gru" / "best.ckpt").exists()
    again = steploop(*command)
    assert again.code == 2
    assert "is there already, and a new run would replace it" in again.err


@pytest.mark.parametrize("listed", ["", "a", "1,,2", "0,1"])
def test_lists_of_numbers(steploop, text, tmp_path, listed):
    ran = steploop("compare", "--data", text, "--out", tmp_path, "--layers", listed)
    assert ran.code == 2
    assert "--layers is a list of numbers such as 1,2,3" in ran.err
