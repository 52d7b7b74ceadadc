"""The battery that every operation of sl.memory passes: both forms against plain definitions, in all
situations."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import devices
import pytest
import torch
from torch.utils import _pytree as pytree

import steploop as sl
from steploop import memory

sys.path.insert(0, str(Path(__file__).parent.parent))

from agree import agree, situations
from compiled_backends import COMPILED, may_decline
from memory_cases import CASES, FIRST, Case

pytestmark = [pytest.mark.pairs, pytest.mark.shared_captures]

STEPS, BATCH = 7, 3
LENGTHS = torch.tensor([7, 4, 0])
HOLES = torch.tensor(
    [[1, 1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1]], dtype=torch.bool
).t()
RESETS = torch.tensor(
    [[0, 0, 1, 0, 0, 1, 0], [1, 0, 0, 1, 0, 0, 1], [0, 1, 1, 0, 0, 0, 0]], dtype=torch.bool
).t()
SITUATIONS = situations(LENGTHS, HOLES, RESETS)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
first_cases = pytest.mark.parametrize("case", FIRST, ids=lambda case: case.name)


def set_up(case: Case):
    torch.manual_seed(1)
    op = case.make().double()
    for parameter in op.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return op, [make(STEPS, BATCH) for make in case.xs], case.constants(BATCH)


def valid_of(lengths=None, mask=None, resets=None):
    lengths, mask = devices.moved((lengths, mask))
    valid = torch.ones(STEPS, BATCH, dtype=torch.bool) if mask is None else mask
    return valid if lengths is None else valid & (torch.arange(STEPS)[:, None] < lengths)


def spoiled(x, valid):
    """x with NaN (or a label that means nothing, or True) where no step is valid."""
    hole = ~valid.reshape(*valid.shape, *[1] * (x.dim() - 2)).expand_as(x)
    with torch.no_grad():
        y = x.masked_fill(hole, float("nan") if x.is_floating_point() else 1)
    return y.requires_grad_(x.requires_grad)


def leaves(outputs):
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def by_definition(case, op, xs, constants, situation, reverse):
    """The outputs (T, B, ...), leaf by leaf; zeros where no step is valid."""
    valid, resets = valid_of(**situation), situation.get("resets")
    table = {}
    for b in range(BATCH):
        seen = []
        row = {name: value[b] for name, value in constants.items()}
        for t in reversed(range(STEPS)) if reverse else range(STEPS):
            if not valid[t, b]:
                continue
            if resets is not None and resets[t, b]:
                seen = []
            seen.append(tuple(x[t, b] for x in xs))
            table[t, b] = leaves(case.plain(op, seen, row, STEPS))
    some = next(iter(table.values()))
    absent = [torch.zeros_like(leaf) for leaf in some]
    return [
        torch.stack([torch.stack([table.get((t, b), absent)[i] for b in range(BATCH)]) for t in range(STEPS)])
        for i in range(len(some))
    ]


def cotangents(values):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.dtype) for v in values]


def gradients(values, inputs):
    tracked = [(v, c) for v, c in zip(values, cotangents(values), strict=True) if v.requires_grad]
    if not tracked:
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(
        [v for v, _ in tracked], inputs, [c for _, c in tracked], allow_unused=True, materialize_grads=True
    )


def close(found, expected, tolerance, what):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, f"{what} {i}: {tuple(a.shape)}, not {tuple(b.shape)}"
        torch.testing.assert_close(
            a.double(),
            b.double(),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m: f"{what} {i}: {m}",  # noqa: B023
        )


def test_every_operation_has_a_case():
    public = {getattr(memory, name) for name in memory.__all__ if isinstance(getattr(memory, name), type)}
    operations = {kind for kind in public if issubclass(kind, sl.Step)} - {memory.Memory}
    assert operations == {case.op for case in CASES}


def test_every_operation_has_both_forms():
    without = {case.op for case in CASES if issubclass(case.op, memory.Memory) and not case.op.has_sequence()}
    assert not without


@every_case
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_is_what_its_definition_says(case, situation, backend):
    """ "reference" runs the one-step form, "auto" the whole-sequence form."""
    op, xs, constants = set_up(case)
    given = SITUATIONS[situation]
    valid = valid_of(**given)
    reverse = situation in ("holes", "all")
    expected = by_definition(case, op, xs, constants, given, reverse)
    dirty = [spoiled(x, valid) for x in xs]
    found, _ = sl.Loop(op, backend=backend, reverse=reverse)(*dirty, **constants, **given)
    close(leaves(found), expected, case.tolerance, "output")
    parameters = [*op.parameters(), *(c for c in constants.values() if c.requires_grad)]
    inputs = [x for x in xs if x.requires_grad]
    dirty_inputs = [x for x in dirty if x.requires_grad]
    close(
        gradients(leaves(found), [*dirty_inputs, *parameters]),
        gradients(expected, [*inputs, *parameters]),
        10 * case.tolerance,
        "gradient",
    )


@every_case
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "reverse"])
def test_both_forms_give_the_same_states(case, reverse):
    op, xs, constants = set_up(case)
    _, carried = sl.Loop(op, backend="reference")(*xs, **constants)
    state = {n: v.detach().requires_grad_(v.is_floating_point()) for n, v in carried.items()}
    grown = {n: op.get_submodule(n).grows_with is not None for n in state}
    for given in SITUATIONS.values():
        agree(op, *xs, backend="auto", save="all", loop={"reverse": reverse}, **constants, **given)
        if not any(grown.values()) or not reverse:
            agree(
                op,
                *xs,
                backend="auto",
                save="all",
                loop={"reverse": reverse},
                state=state,
                **constants,
                **given,
            )
        agree(op, *xs, backend="auto", save="all", on_masked="repeat", **constants, **given)


def parts_of(outputs):
    """What does not depend on how much room a history has."""
    if isinstance(outputs, memory.Past):
        return [torch.where(outputs.mask.unsqueeze(-1), outputs.values, 0.0).sum(-2), outputs.lengths]
    return leaves(outputs)


@every_case
@pytest.mark.parametrize("backends", [("auto", "auto"), ("auto", "reference"), ("reference", "auto")])
def test_states_handed_over_in_the_middle(case, backends):
    if case.op is memory.RelativePositions:
        pytest.skip("its output is as wide as the room of the call")
    op, xs, constants = set_up(case)
    whole, last = sl.Loop(op, backend="reference")(*xs, **constants, resets=RESETS)
    first, second = (sl.Loop(op, backend=backend) for backend in backends)
    a, state = first(*[x[:3] for x in xs], **constants, resets=RESETS[:3])
    b, after = second(*[x[3:] for x in xs], **constants, resets=RESETS[3:], state=state)
    found = [torch.cat(pair) for pair in zip(parts_of(a), parts_of(b), strict=True)]
    close(found, parts_of(whole), case.tolerance, "output")
    for name, value in last.items():
        value, got = (
            v[:, : STEPS - 5] if op.get_submodule(name).grows_with else v for v in (value, after[name])
        )
        close([got], [value], case.tolerance, f"state {name}")
    inputs = [*(x for x in xs if x.requires_grad), *op.parameters()]
    if inputs:
        close(gradients(found, inputs), gradients(parts_of(whole), inputs), 10 * case.tolerance, "gradient")


@every_case
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_stream_is_the_whole_sequence(case, backend):
    if case.op is memory.RelativePositions:
        pytest.skip("its output is as wide as the room of the call")
    op, xs, constants = set_up(case)
    whole, last = op(*xs, **constants, resets=RESETS, mask=HOLES)
    stream = sl.Loop(op, backend=backend).stream(BATCH, **constants)
    with torch.no_grad():
        steps = [parts_of(stream(*[x[t] for x in xs], resets=RESETS[t], mask=HOLES[t])) for t in range(STEPS)]
    found = [torch.stack(values) for values in zip(*steps, strict=True)]
    close(found, parts_of(whole), case.tolerance, "output")
    for name, value in last.items():
        if not op.get_submodule(name).grows_with:
            close([stream.state[name]], [value], case.tolerance, f"state {name}")


def mean_of_rows(y):
    return y.double().flatten(1).mean(1) if y.dim() > 1 else y.double()


class Inside(sl.Step):
    """An operation inside a step; with `recurrent` its input depends on what it gave before."""

    def __init__(self, op, recurrent, count=1):
        super().__init__()
        self.op = op
        if count == 2:
            self.again = sl.share(op)
        self.recurrent = recurrent
        self.h = sl.State(dtype=torch.float64)

    def step(self, x, *others, **constants):
        if self.recurrent:
            x = self.mixed(x)
        outputs = leaves(self.op(x, *others, **constants))
        if hasattr(self, "again"):
            outputs += leaves(self.again(x, *others, **constants))
        self.h.next = torch.tanh(sum(mean_of_rows(y) for y in outputs))
        return outputs

    def mixed(self, x):
        if x.is_floating_point():
            return x + self.h.prev[(...,) + (None,) * (x.dim() - 1)]
        if x.dtype == torch.bool:
            return x ^ (self.h.prev > 0.5)
        return (x + (self.h.prev > 0.5)).clamp(max=3)


@first_cases
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("recurrent", [True, False], ids=["recurrent", "not recurrent"])
def test_inside_another_step(case, backend, recurrent):
    op, xs, constants = set_up(case)
    step = Inside(op, recurrent)
    with may_decline(backend):
        agree(step, *xs, backend=backend, save="all", lengths=LENGTHS, resets=RESETS, **constants)


@first_cases
def test_twice_in_one_model(case):
    op, xs, constants = set_up(case)
    agree(Inside(op, True, 2), *xs, backend="auto", save="states", mask=HOLES, **constants)


@first_cases
def test_no_steps_and_no_valid_steps(case):
    op, xs, constants = set_up(case)
    op(*[x[:0] for x in xs], **constants)
    outputs, state = op(*xs, **constants, lengths=torch.zeros(BATCH, dtype=torch.int64))
    fresh = sl.Loop(op, backend="reference")(
        *xs, **constants, mask=torch.zeros(STEPS, BATCH, dtype=torch.bool)
    )
    for a, b in zip(leaves((outputs, dict(state))), leaves((fresh[0], dict(fresh[1]))), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", sorted({case.op for case in CASES}, key=lambda kind: kind.__name__))
def test_docstrings_give_formula_and_shapes(kind):
    assert "(B, " in inspect.getdoc(kind) or "(B," in inspect.getdoc(kind)


@every_case
@pytest.mark.parametrize("seed", range(2))
def test_random_lengths_holes_and_resets(case, seed):
    op, xs, constants = set_up(case)
    generator = torch.Generator().manual_seed(100 * seed + CASES.index(case))

    def drawn(share):
        return torch.rand(STEPS, BATCH, generator=generator) < share

    given = {
        "lengths": torch.randint(0, STEPS + 1, (BATCH,), generator=generator),
        "mask": drawn(0.8),
        "resets": drawn(0.2),
    }
    reverse = bool(seed % 2)
    agree(op, *xs, backend="auto", save="all", loop={"reverse": reverse}, **constants, **given)
