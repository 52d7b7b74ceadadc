"""Random steps through the loop language: its interpreter, and compiled and emulated kernels, against torch."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from cpu_loops import Case, make_case, run
from emulated_gpu import registered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steploop.backends import cuda, eager
from steploop.backends.cpu.build import build
from steploop.backends.cpu.headers import entry, prelude
from steploop.backends.cpu.runner import Runner
from steploop.backends.native.fuse import fuse
from steploop.backends.native.interpret import Interpreter
from steploop.backends.native.lower import lower
from steploop.compiler.schedule import make_schedule

T, B = 3, 4
ROUNDS = 12  # operations of a step


def unary(rng, v):
    choices = [torch.tanh, torch.sigmoid, torch.relu, F.gelu, F.softplus, torch.neg, torch.abs, torch.sin,
               torch.exp2, lambda x: x * 0.5 + 1, lambda x: x.clamp(-1, 1), lambda x: torch.where(x > 0, x, 0.1 * x),
               lambda x: (x > 0).to(x.dtype), lambda x: x.double().mul(2).to(x.dtype)]  # fmt: skip
    return rng.choice(choices)(v)


def binary(rng, v, values):
    same = [u for u in values if u.shape == v.shape]
    other = rng.choice(same)
    choices = [torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum,
               lambda a, b: torch.where(a > b, a, b - 1), lambda a, b: a / (b.abs() + 1)]  # fmt: skip
    return rng.choice(choices)(v, other)


def reduction(rng, v, values):
    n = v.shape[-1]
    choices = [
        lambda x: x.softmax(-1), lambda x: F.layer_norm(x, (n,)), lambda x: x - x.mean(-1, keepdim=True),
        lambda x: x * x.amax(-1, keepdim=True), lambda x: x.cumsum(-1), lambda x: x.log_softmax(-1),
        lambda x: x + x.sum(-1, keepdim=True) * 0.1, lambda x: x * (x.argmax(-1, keepdim=True) % 3),
    ]  # fmt: skip
    return rng.choice(choices)(v)


def shaping(rng, v, values):
    n = v.shape[-1]
    if v.dim() == 3:
        return rng.choice([lambda x: x.flatten(1), lambda x: x.sum(1), lambda x: x.transpose(1, 2).flatten(1),
                           lambda x: x.softmax(1).flatten(1), lambda x: x.bmm(x.transpose(1, 2)).flatten(1),
                           lambda x: x[:, rng.randrange(x.shape[1])]])(v)  # fmt: skip
    cut = rng.randrange(1, n) if n > 1 else 0
    choices = [lambda x: torch.cat([x[:, cut:], x[:, :cut]], -1), lambda x: x.flip(-1), lambda x: x[:, cut:],
               lambda x: F.pad(x, (1, 2)), lambda x: torch.cat([x, x * 2], -1)[:, : n + 1],
               lambda x: torch.stack([x, x.tanh()], -1).flatten(1)[:, :n]]  # fmt: skip
    if n % 2 == 0:
        choices += [
            lambda x: x.view(-1, 2, n // 2),
            lambda x: x.chunk(2, -1)[1],
            lambda x: sum(x.chunk(2, -1)),
        ]
    return rng.choice(choices)(v)


def random_case(seed: int) -> Case:
    """A step of about a dozen operations on two states and one input."""
    generator = torch.Generator().manual_seed(seed)
    first = random.Random(seed)
    width, other = first.choice([1, 2, 3, 5, 8, 16, 17, 20]), first.choice([1, 4, 16, 19])
    dtype = first.choice([torch.float32, torch.float32, torch.float64])
    weights = {n: torch.randn(n, width, generator=generator, dtype=dtype) * 0.3 for n in range(1, 90)}

    def step(xs, constants, states):
        rng = random.Random(seed + 1)
        values = [*xs, *states]
        for _ in range(rng.randrange(2, ROUNDS)):
            v = rng.choice(values)
            kind = rng.random()
            if v.dim() == 3 or kind < 0.2:
                new = shaping(rng, v, values)
            elif kind < 0.45:
                new = unary(rng, v)
            elif kind < 0.65:
                new = binary(rng, v, values)
            elif kind < 0.85:
                new = reduction(rng, v, values)
            else:
                new = v @ weights[v.shape[-1]] if v.shape[-1] in weights else v
            if new.shape[-1] < 80:
                values.append(new)
        flat = [v.flatten(1) for v in values]
        nexts = [torch.tanh(fitted(rng, flat, s.shape[-1])) for s in states]
        return [v.clone() for v in values[-3:]], nexts

    steps = [torch.randn(T, B, width, generator=generator, dtype=dtype)]
    states = [torch.randn(B, n, generator=generator, dtype=dtype) for n in (width, other)]
    return make_case(step, steps, states)


def fitted(rng, values, n):
    v = rng.choice(values[-4:])
    return v[:, :n] if v.shape[-1] >= n else F.pad(v, (0, n - v.shape[-1]))


def schedule_of(seed: int):
    rng = random.Random(seed)
    lengths = torch.tensor([rng.randrange(T + 1) for _ in range(B)]) if rng.random() < 0.5 else None
    resets = torch.rand(T, B) < 0.3 if rng.random() < 0.3 else None
    return make_schedule(T, B, torch.device("cpu"), lengths, None, resets), rng.random() < 0.4


def compare(case: Case, runner, seed: int) -> None:
    schedule, down = schedule_of(seed)
    back = [torch.zeros_like(s) for s in case.states]
    wanted = run(eager.Runner(case.loop), case, schedule, down, back)
    found = run(runner, case, schedule, down, back)
    wide = case.states[0].dtype == torch.float64
    tolerance = 1e-9 if wide else 2e-4
    for a, b in zip([*wanted[0], *wanted[1]], [*found[0], *found[1]]):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, equal_nan=True)


def lowered(case: Case):
    program, reasons = lower(case.loop)
    assert not reasons, reasons
    return program


def through_interpreter(seed: int) -> None:
    case = random_case(seed)
    compare(case, Interpreter(case.loop, fuse(lowered(case))), seed)


def through_compiler(seeds) -> None:
    """All graphs in one translation unit."""
    runners, texts = [], [prelude()]
    for number, seed in enumerate(seeds):
        case = random_case(seed)
        runner = Runner(case.loop, lowered(case))
        text = runner.text + entry().replace("steploop_run", f"steploop_run_{number}")
        texts.append(f"namespace graph{number} {{\n{text}\n}}")
        runners.append((seed, case, runner))
    library = build("\n".join(texts))
    for number, (seed, case, runner) in enumerate(runners):
        compare(case, runner.bind(getattr(library, f"steploop_run_{number}")), seed)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.integers(0, 1 << 40))
def test_interpreter(seed):
    through_interpreter(seed)


@pytest.mark.parametrize("part", range(3))
def test_compiled(part):
    through_compiler(range(part * 1000, part * 1000 + 12))


def through_emulation(seed: int) -> None:
    """As a grid, then by blocks with tiles of two rows, then by what the costs say, with no memory for weights."""
    case = random_case(seed)
    for options in ({"together": True}, {"together": False, "rows": 2}, {"memory": 0}):
        with registered(**options) as backend:
            compare(case, cuda.Runner(case.loop, lowered(case), backend.machine).begin(), seed)
            assert backend.machine.launches or sum(schedule_of(seed)[0].sizes) == 0


@pytest.mark.parametrize("part", range(2))
def test_emulated_cuda(part):
    for seed in range(part * 1000, part * 1000 + 12):
        through_emulation(seed)


@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
def test_interpreter_long(part):
    for seed in range(10_000 + part * 500, 10_000 + (part + 1) * 500):
        through_interpreter(seed)


@pytest.mark.long
@pytest.mark.parametrize("part", range(10))
def test_emulated_cuda_long(part):
    for seed in range(10_000 + part * 100, 10_000 + part * 100 + 25):
        through_emulation(seed)


@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
def test_compiled_long(part):
    first = 100_000 + part * 100
    through_compiler(range(first, first + 25))
