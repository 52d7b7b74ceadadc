"""Every cell under every combination of a Loop's arguments: the reference against a plain loop written
without steploop, and every other backend against the reference; outputs, final states and all gradients."""

from __future__ import annotations

import functools
import inspect
import itertools
from dataclasses import dataclass

import pytest
import torch
from cell_cases import CASES, INPUT, randomised
from compiled_backends import COMPILED, may_decline
from plain_loop import plain_loop

import steploop as sl

pytestmark = pytest.mark.pairs

IDS = [case.name for case in CASES]


@dataclass(frozen=True)
class Arguments:
    """Which of a Loop's arguments one call uses."""

    lengths: bool
    mask: bool
    resets: bool
    state: bool
    reverse: bool
    repeat: bool

    def __str__(self):
        return "+".join(name for name, on in vars(self).items() if on) or "plain"


def every_combination():
    """Every combination; "repeat" means something only where steps are masked."""
    for flags in itertools.product([False, True], repeat=6):
        arguments = Arguments(*flags)
        if arguments.lengths or arguments.mask or not arguments.repeat:
            yield arguments


ALL_ARGUMENTS = list(every_combination())
# Compiled backends compile anew for each: every combination of the others, with on_masked alternating.
ALTERNATING = [a for a in ALL_ARGUMENTS if a.repeat == ((a.lengths or a.mask) and a.state != a.reverse)]
EVERYTHING = [Arguments(True, True, True, True, reverse, reverse) for reverse in (False, True)]
# (T, B)
EDGE_SIZES = [(5, 1), (1, 3), (0, 3), (0, 1), (1, 1), (64, 3)]


@functools.cache
def cell_of(case, dtype):
    return randomised(case.make(), dtype)


@functools.cache
def loop_of(case, dtype, backend, reverse, save="auto"):
    """One Loop per configuration, used for all arguments and sizes: a capture must serve them all."""
    return sl.Loop(cell_of(case, dtype), backend=backend, reverse=reverse, save=save)


def make_call(case, arguments, steps, batch, dtype):
    """xs (with NaN where masked), leaves that take gradients, and the keyword arguments of the call."""
    generator = torch.Generator().manual_seed(1000 * steps + batch)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def coin(probability):
        return torch.rand(steps, batch, generator=generator) < probability

    xs, call = normal(steps, batch, INPUT), {}
    valid = torch.ones(steps, batch, dtype=torch.bool)
    if arguments.lengths:
        # The longest row is full, the next is empty, the others lie between.
        lengths = [steps, 0, *((7 * b) % (steps + 1) for b in range(2, batch))][:batch]
        call["lengths"] = torch.tensor(lengths)
        valid &= torch.arange(steps).unsqueeze(1) < call["lengths"]
    if arguments.mask:
        call["mask"] = coin(0.7)
        valid &= call["mask"]
    if arguments.resets:
        call["resets"] = coin(0.3)
    if arguments.repeat:
        call["on_masked"] = "repeat"
    xs[~valid] = float("nan")
    given = (
        {n: normal(batch, size).requires_grad_() for n, size in case.states.items()}
        if arguments.state
        else None
    )
    return xs.requires_grad_(), given, call


def run(case, loop, xs, given, call):
    outputs, state = loop(xs, state=None if given is None else sl.States(given), **call)
    assert list(state) == list(case.states)
    return {"outputs": outputs} | {f"final {name}": value for name, value in state.items()}


def gradients(values, leaves, cotangents):
    """Gradients of the sum of all values times their cotangents. A leaf that nothing reaches has zero."""
    pairs = [(v, c) for v, c in zip(values.values(), cotangents, strict=True) if v.requires_grad]
    if not pairs:
        return {f"gradient of {name}": torch.zeros_like(leaf) for name, leaf in leaves.items()}
    results = torch.autograd.grad(
        [v for v, _ in pairs],
        list(leaves.values()),
        [c for _, c in pairs],
        materialize_grads=True,
        allow_unused=True,
    )
    return {f"gradient of {name}": value for name, value in zip(leaves, results, strict=True)}


def everything_from(case, loop, xs, given, call, cotangent):
    values = run(case, loop, xs, given, call)
    leaves = {"xs": xs} | {f"given {n}": v for n, v in (given or {}).items()}
    leaves |= dict(loop.named_parameters())
    return values | gradients(values, leaves, [cotangent(v) for v in values.values()])


def assert_close(actual, expected, tolerance, gradient_tolerance):
    """Each tensor within tolerance times its largest expected entry; nothing but finite numbers."""
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].shape == value.shape and actual[name].dtype == value.dtype, name
        assert torch.isfinite(value).all() and torch.isfinite(actual[name]).all(), name
        if value.numel():
            bound = gradient_tolerance if name.startswith("gradient") else tolerance
            scale = max(value.abs().max().item(), 1e-30)
            error = (actual[name] - value).abs().max().item() / scale
            assert error <= bound, f"{name}: error {error:.3g} of its largest entry {scale:.3g}"


def cotangents_like(seed):
    """A function value -> cotangent that gives the same numbers in every run."""
    generator = torch.Generator().manual_seed(seed)
    return lambda v: torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.dtype)


def compare_with_plain(case, arguments, steps, batch):
    dtype = torch.float64
    xs, given, call = make_call(case, arguments, steps, batch, dtype)
    loop = loop_of(case, dtype, "reference", arguments.reverse)
    actual = everything_from(case, loop, xs, given, call, cotangents_like(3))

    initial = {name: torch.zeros(size, dtype=dtype) for name, size in case.states.items()}
    step = case.plain(cell_of(case, dtype))
    outputs, finals = plain_loop(step, initial, xs, case.width, given, reverse=arguments.reverse, **call)
    values = {"outputs": outputs} | {f"final {name}": value for name, value in finals.items()}
    leaves = {"xs": xs} | {f"given {n}": v for n, v in (given or {}).items()} | dict(loop.named_parameters())
    cotangent = cotangents_like(3)
    expected = values | gradients(values, leaves, [cotangent(v) for v in values.values()])
    assert_close(actual, expected, 1e-12, 1e-12)


def compare_with_reference(case, arguments, steps, batch, dtype, backend, save="auto"):
    results = []
    for name in (backend, "reference"):
        xs, given, call = make_call(case, arguments, steps, batch, dtype)
        loop = loop_of(case, dtype, name, arguments.reverse, save if name == backend else "auto")
        with may_decline(backend):
            results.append(everything_from(case, loop, xs, given, call, cotangents_like(3)))
    double = dtype == torch.float64
    assert_close(*results, 1e-9 if double else 1e-5, 1e-9 if double else 1e-4)


@pytest.mark.parametrize("arguments", ALL_ARGUMENTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_reference_is_the_plain_loop(case, arguments):
    compare_with_plain(case, arguments, steps=6, batch=4)


@pytest.mark.parametrize("arguments", EVERYTHING, ids=str)
@pytest.mark.parametrize("steps, batch", EDGE_SIZES)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_reference_is_the_plain_loop_at_edge_sizes(case, arguments, steps, batch):
    compare_with_plain(case, arguments, steps, batch)


@pytest.mark.parametrize("arguments", ALTERNATING, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("backend", COMPILED)
def test_backend_equals_reference(case, arguments, backend):
    compare_with_reference(case, arguments, 6, 4, torch.float64, backend)


@pytest.mark.parametrize("arguments", EVERYTHING, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("steps, batch", [*EDGE_SIZES, (6, 4)])
@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("backend", COMPILED)
def test_backend_equals_reference_at_edge_sizes(case, arguments, steps, batch, dtype, backend):
    compare_with_reference(case, arguments, steps, batch, dtype, backend)


@pytest.mark.parametrize("save", ["states", "all"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("backend", COMPILED)
def test_what_is_saved_changes_nothing(case, backend, save):
    compare_with_reference(case, EVERYTHING[1], 6, 4, torch.float64, backend, save)


def test_every_cell_has_a_case():
    exported = {v for v in vars(sl.nn).values() if inspect.isclass(v) and issubclass(v, sl.Step)}
    assert exported == {cls for case in CASES for cls in case.covers}


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_cases_name_their_states_and_width(case):
    outputs, state = sl.Loop(cell_of(case, torch.float64), backend="reference")(
        torch.zeros(2, 3, INPUT).double()
    )
    assert {name: value.shape[-1] for name, value in state.items()} == case.states
    assert outputs.shape == (2, 3, case.width)


def test_alternating_arguments_leave_no_combination_of_the_others_out():
    def others(arguments):
        return tuple(v for name, v in vars(arguments).items() if name != "repeat")

    assert sorted(map(others, ALTERNATING)) == list(itertools.product([False, True], repeat=5))
    assert {a.repeat for a in ALTERNATING if a.mask} == {False, True}


def test_the_comparison_can_fail():
    good = {"outputs": torch.tensor([1.0, 2.0])}
    assert_close(good, good, 1e-9, 1e-9)
    for bad in (torch.tensor([1.0, 2.0 + 1e-4]), torch.tensor([1.0, float("nan")]), torch.zeros(3)):
        with pytest.raises(AssertionError):
            assert_close({"outputs": bad}, good, 1e-9, 1e-9)
