"""Random steps under random calls: the compiled loop equals the plain one in outputs, final states and all
gradients. One capture serves several calls, as it does for a user.

    pytest tests/property --long --hypothesis-seed=7     10,000 steps; the seed that was used is printed
"""

from __future__ import annotations

import random

import pytest
import torch
from agree import agree
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from random_steps import Op, RandomStep, Recipe, recipes
from spans import cut_time

T_MAX, INPUT = 5, 3


@st.composite
def calls(draw):
    """Sizes, and which arguments of a Loop a call uses."""
    coin = st.booleans()
    names = ("lengths", "mask", "resets", "state", "reverse", "repeat", "gradient")
    return {
        "steps": draw(st.integers(0, T_MAX)),
        "batch": draw(st.integers(1, 4)),
        "save": draw(st.sampled_from(("states", "all"))),
        "spans": draw(st.sampled_from((None, None, 1, 2))),
        "seed": draw(st.integers(0, 1000)),
        **{name: draw(coin) for name in names},
    }


def check(recipe, variants, monkeypatch):
    step = RandomStep(recipe).double()
    for call in variants:
        with monkeypatch.context() as patch:
            if call["spans"] is not None:
                cut_time(patch, call["spans"])
            agree(step, *arguments(recipe, step, call)[0], **arguments(recipe, step, call)[1])


def arguments(recipe, step, call):
    generator = torch.Generator().manual_seed(call["seed"])
    steps, batch = call["steps"], call["batch"]

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    xs = normal(steps, batch, INPUT)
    valid = torch.ones(steps, batch, dtype=torch.bool)
    given = {}
    if call["lengths"]:
        given["lengths"] = torch.randint(0, steps + 1, (batch,), generator=generator)
        valid &= torch.arange(steps)[:, None] < given["lengths"]
    if call["mask"]:
        given["mask"] = torch.rand(steps, batch, generator=generator) < 0.7
        valid &= given["mask"]
    if call["resets"]:
        given["resets"] = torch.rand(steps, batch, generator=generator) < 0.4
    if call["repeat"]:
        given["on_masked"] = "repeat"
    xs[~valid] = float("nan")
    if recipe.constant:
        given["memory"] = normal(batch, 2, 3).requires_grad_(call["gradient"])
    if call["state"]:
        given["state"] = {
            f"s{i}": _state(kind, normal(batch, width), call["gradient"])
            for i, (kind, width) in enumerate(recipe.states)
        }
    given.update(save=call["save"], loop={"reverse": call["reverse"]})
    return [xs.requires_grad_(call["gradient"])], given


def _state(kind, value, gradient):
    if kind == "float":
        return value.requires_grad_(gradient)
    return (value[:, 0] * 3).to(torch.int64) if kind == "int" else value[:, 0] > 0


QUIET = dict(
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.data_too_large,
    ],
)


# What longer runs have found.
PLAIN = dict(steps=4, batch=3, save="states", spans=None, seed=0, lengths=False, mask=False, resets=False,
             state=False, reverse=False, repeat=False, gradient=False)  # fmt: skip
LINEAR = Op("linear", 0, 0)
ONLY_A_DELAY_READS_THE_LOOP = Recipe(
    states=(("float", 2), ("float", 2), ("bool", 2), ("float", 3)),
    ops=(Op("softmax", 3, 0), Op("count", 21, 0), Op("linear", 11, 0), Op("where", 28, 0), Op("linear", 27, 29),
         Op("count", 23, 0), Op("relu", 0, 11), LINEAR),
    nexts=(35, 0, 0, 0), outputs=(0,), weights=1,
)  # fmt: skip
NOTHING_VARIES_IN_THE_LOOP = Recipe(
    states=(("float", 2),), ops=(LINEAR, LINEAR, Op("centre", 0, 0), LINEAR), nexts=(40,), outputs=(0,), weights=1
)


@settings(max_examples=24, **{**QUIET, "derandomize": True})
@given(recipes(largest=6), st.lists(calls(), min_size=1, max_size=2))
@example(ONLY_A_DELAY_READS_THE_LOOP, [{**PLAIN, "steps": 0, "batch": 1}, PLAIN])
@example(NOTHING_VARIES_IN_THE_LOOP, [{**PLAIN, "mask": True}])
def test_random_steps(monkeypatch, recipe, variants):
    check(recipe, variants, monkeypatch)


@pytest.mark.long
def test_many_random_steps(monkeypatch, request, capsys):
    chosen = request.config.getoption("--hypothesis-seed")
    chosen = random.SystemRandom().randrange(2**32) if chosen in (None, "random") else int(chosen)
    with capsys.disabled():
        print(f"\nrandom steps with --hypothesis-seed={chosen}")

    @seed(chosen)
    @settings(max_examples=10_000, **QUIET)
    @given(recipes(), st.lists(calls(), min_size=1, max_size=3))
    def many(recipe, variants):
        check(recipe, variants, monkeypatch)

    many()
