"""What the native backend makes of some steps, as text to be read: the loop language, and the C++ of one step.

After a change on purpose: STEPLOOP_UPDATE_GOLDEN=1 pytest tests/golden/test_cpu_golden.py, and read the diff.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cpu_loops import make_case

from steploop.backends.native.emit import emit
from steploop.backends.native.fuse import fuse
from steploop.backends.native.lower import lower
from steploop.backends.native.show import show

HERE = Path(__file__).parent / "cpu"
T, B, H = 3, 4, 6


def lstm():
    weight = torch.zeros(4 * H, H)

    def step(xs, constants, states):
        (x,), (h, c) = xs, states
        i, f, g, o = (x + F.linear(h, weight)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return [h.clone()], [h, c]

    return make_case(step, [torch.zeros(T, B, 4 * H)], [torch.zeros(B, H)] * 2, names=["h", "c"])


def normalised():
    weight, gain = torch.zeros(H, H), torch.zeros(H)

    def step(xs, constants, states):
        h = torch.tanh(F.layer_norm(xs[0] + states[0] @ weight, (H,), gain))
        return [h.clone()], [h]

    return make_case(step, [torch.zeros(T, B, H)], [torch.zeros(B, H)], names=["h"])


def attention():
    weight = torch.zeros(H, H)

    def step(xs, constants, states):
        (x,), (h,), (memory, mask) = xs, states, constants
        energy = (torch.tanh((h @ weight)[:, None] + memory)).sum(-1)
        share = energy.masked_fill(~mask, -torch.inf).softmax(-1)
        h = torch.tanh(x + torch.bmm(share[:, None], memory)[:, 0])
        return [share.clone()], [h]

    constants = [torch.zeros(B, 5, H), torch.zeros(B, 5, dtype=torch.bool)]
    axes = [("constant", 0, 1), ("constant", 1, 1)]
    return make_case(step, [torch.zeros(T, B, H)], [torch.zeros(B, H)], constants, axes, names=["h"])


def free_running():
    table = torch.zeros(7, H)

    def step(xs, constants, states):
        (token, h) = states
        h = torch.tanh(h + F.embedding(token, table) + xs[0])
        token = (h @ table.t()).argmax(-1)
        return [token.clone()], [token, h]

    states = [torch.zeros(B, dtype=torch.long), torch.zeros(B, H)]
    return make_case(step, [torch.zeros(T, B, H)], states, names=["token", "h"])


def early():
    """A product of the input, which waits for no state."""
    inwards, back = torch.zeros(H, 4), torch.zeros(H, H)

    def step(xs, constants, states):
        (h,) = states
        h = torch.tanh(F.linear(xs[0], inwards) + F.linear(h, back))
        return [h.clone()], [h]

    return make_case(step, [torch.zeros(T, B, 4)], [torch.zeros(B, H)], names=["h"])


CASES = {f.__name__: f for f in (lstm, normalised, attention, free_running, early)}


def body(text: str) -> str:
    """The loop over the steps of an emitted kernel, and what is done some steps ahead."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(("  for (long step", "  auto make_early")))
    loop = next(i for i, line in enumerate(lines) if line.startswith("  for (long step"))
    last = next(i for i, line in enumerate(lines) if i > loop and line == "  }")
    return "\n".join(lines[first : last + 1]) + "\n"


def check(name: str, text: str) -> None:
    path = HERE / name
    if os.environ.get("STEPLOOP_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def plan_of(name: str):
    case = CASES[name]()
    program, reasons = lower(case.loop)
    assert not reasons
    return fuse(program), list(case.sizes)


@pytest.mark.parametrize("name", CASES)
def test_loop_language(name):
    plan, symbols = plan_of(name)
    text = show(plan)
    for symbol, plain in zip(symbols, "SUVW"):  # symbols are numbered by the whole process
        text = text.replace(symbol, plain)
    check(f"{name}.txt", text)


@pytest.mark.parametrize("name", ["lstm", "normalised", "free_running", "early"])
def test_emitted_step(name):
    check(f"{name}.cpp", body(emit(plan_of(name)[0])))
