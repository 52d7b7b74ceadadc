"""Barriers of the backend "cuda": a checker of races (ThreadSanitizer) finds nothing in its kernels, and finds what is
missing in kernels from which a barrier was taken.

Kernels run on the emulated GPU, every lane a thread of the system, each launch in a process of its own (alone.h).
"""

from __future__ import annotations

import functools
import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import emulated_gpu
import pytest
import torch
from emulated_gpu import HERE, registered, source
from torch import Tensor, nn

import steploop as sl
from steploop.backends.cuda import runner, ways

FLAGS = ("-std=c++17", "-w", "-g", "-O1", "-fwrapv", "-DTHREADS", "-fsanitize=thread")
LANES = 4
T, B = 4, 5


@dataclass(frozen=True)
class Recorded:
    """One launch: the text of its loop, what its words point to or are, and how it was launched."""

    text: str
    words: list[Tensor | int]
    way: ways.Way
    bytes: int  # of the temporaries of one team
    warps: int

    def file(self, path: Path) -> Path:
        way = self.way
        data = struct.pack(
            "7q", len(self.words), self.bytes, way.near, way.teams, way.together, way.blocks, self.warps
        )
        for word in self.words:
            if isinstance(word, Tensor):
                held = word.contiguous().flatten().view(torch.uint8).numpy().tobytes() if word.numel() else b""
                data += struct.pack("q", len(held)) + held
            else:
                data += struct.pack("2q", -1, word)
        path.write_bytes(data)
        return path


def recorded(step, together: bool, **call) -> list[Recorded]:
    """The launches of a forward and a backward pass."""
    found: list[Recorded] = []
    held: dict[int, Tensor] = {}

    def addresses(given):
        held.update((t.data_ptr(), t) for t in given if t is not None)
        return plain(given)

    def laid_out(self, inputs, span):
        held.update({t.data_ptr(): t for t in (span.schedule.source,) if t is not None})  # where the caller's rows are
        return lay_out(self, inputs, span)

    def zeros(*shape, **kind):
        made = make(*shape, **kind)
        held[made.data_ptr()] = made  # the number of a check that failed
        return made

    def launch(self, words, memory, barrier, way):
        given = [held[w].clone() if w in held else w for w in words]
        found.append(Recorded(self.text, given, way, memory.numel() // way.teams, self.machine.warps))
        run(self, words, memory, barrier, way)

    make = torch.zeros
    plain, run, lay_out = runner.addresses, emulated_gpu.EmulatedKernel.launch, runner.Runner._laid_out
    with pytest.MonkeyPatch.context() as patch, registered(together=together, rows=2, lanes=LANES) as backend:
        patch.setattr(runner, "addresses", addresses)
        patch.setattr(runner.Runner, "_laid_out", laid_out)
        patch.setattr(runner, "torch", SimpleNamespace(**{**vars(torch), "zeros": zeros}))
        patch.setattr(emulated_gpu.EmulatedKernel, "launch", launch)
        x = torch.randn(T, B, 3, requires_grad=True)
        y = sl.Loop(step, backend=backend.name, save="all")(x, **call)[0]
        y.float().sum().backward()
    return found


def program(text: str, folder: Path) -> Path:
    made = folder / f"program{len(list(folder.iterdir()))}"
    made.with_suffix(".cpp").write_text(text + (HERE / "alone.h").read_text())
    command = ["g++", *FLAGS, "-o", made, made.with_suffix(".cpp"), "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
    return made


def races(made: Path, launch: Recorded, folder: Path) -> str:
    """What the checker found; "" for nothing. (It needs addresses that are not drawn anew.)"""
    given = launch.file(folder / "launch")
    done = subprocess.run(["setarch", "-R", made, given], capture_output=True, text=True, timeout=120)
    if done.returncode == 0:
        return ""
    assert "data race" in done.stderr, done.stderr[-2000:]
    return done.stderr


@functools.cache
def _checker_works() -> bool:
    text = "int main() { return 0; }"
    try:
        made = subprocess.run(["g++", "-fsanitize=thread", "-x", "c++", "-", "-o", "/dev/null"], input=text, text=True,
                              capture_output=True)  # fmt: skip
        return made.returncode == 0 and subprocess.run(["setarch", "-R", "true"]).returncode == 0
    except OSError:
        return False


needs_a_checker = pytest.mark.skipif("not _checker_works()", reason="no g++ with ThreadSanitizer, or no setarch")


class Attention(sl.Step):
    def __init__(self):
        super().__init__()
        self.query, self.out, self.h = nn.Linear(6, 4), nn.Linear(3 + 4, 6), sl.State(6)

    def step(self, x, memory):
        share = (memory * self.query(self.h.prev)[:, None]).sum(-1).softmax(-1)
        self.h.next = self.out(torch.cat([x, (share[..., None] * memory).sum(1)], 1)).tanh()
        return self.h.next


class Best(sl.Step):
    """What is largest, running sums, and one of them picked by its place."""

    def __init__(self):
        super().__init__()
        self.mix, self.h = nn.Linear(6, 6), sl.State(6)

    def step(self, x):
        y = self.mix(self.h.prev).cumsum(1)
        picked = y.gather(1, y.argmax(1, keepdim=True))
        self.h.next = torch.cat([x, picked.sin() * x], 1) + y.amax(1, keepdim=True).tanh()
        return self.h.next


class Solved(sl.Step):
    def __init__(self):
        super().__init__()
        self.h = sl.State(3)

    def step(self, x):
        a = torch.eye(3) * 3 + self.h.prev[:, :, None] * x[:, None].tanh()
        self.h.next = torch.linalg.solve(a, x + self.h.prev)
        return self.h.next


class Matrix(sl.Step):
    def __init__(self):
        super().__init__()
        self.h = sl.State(3, 5)

    def step(self, x):
        self.h.next = (self.h.prev * 0.5 + x[:, :, None]).sin()
        return self.h.next.sum(2)


STEPS = {
    "lstm": (lambda: sl.nn.LSTMCell(3, 7), {}),
    "gru, lengths": (lambda: sl.nn.GRUCell(3, 7), {"lengths": torch.tensor([4, 1, 3, 0, 2])}),
    "layer norms, resets": (lambda: sl.nn.LayerNormLSTMCell(3, 7), {"resets": torch.rand(T, B) < 0.4}),
    "attention": (Attention, {"memory": torch.randn(B, 5, 4)}),
    "matrix, resets": (Matrix, {"resets": torch.rand(T, B) < 0.4}),
    "gru": (lambda: sl.nn.GRUCell(3, 7), {}),
    "best": (Best, {}),
    "solved": (Solved, {}),
}


@needs_a_checker
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("together", [False, True], ids=["blocks", "grid"])
def test_no_races(name, together, tmp_path):
    make, call = STEPS[name]
    launches = recorded(make(), together, **call)
    assert len(launches) >= 2  # forward and backward
    for launch in launches:
        assert not (found := races(program(source(launch.text, LANES), tmp_path), launch, tmp_path)), found[:3000]


def without(text: str, pattern: str) -> list[str]:
    """The text without one match of the pattern, for each of them."""
    return [text[: m.start()] + text[m.end() :] for m in re.finditer(pattern, text)]


# In the headers the barriers of lanes, of a block, and of the grid; in loops those of a team.
BARRIERS = r"(?m)^ *(meet_lanes|meet_block)\(\);|team\.wait\(\);|while \(look\(&barrier->phase\) == now\) \{\s*\}"


@needs_a_checker
def test_every_missing_barrier_is_found(tmp_path):
    launches = [
        launch
        for name in ("gru", "gru, lengths", "matrix, resets", "best", "solved")
        for launch in recorded(STEPS[name][0](), True, **STEPS[name][1])
    ]
    seen: dict[str, bool] = {}
    for launch in launches:
        text = source(launch.text, LANES)
        before = text.index("struct Mask")  # the machine itself stands before the words that loops are written in
        for number, mutant in enumerate(without(text[before:], BARRIERS)):
            place = _where(text[before:], number)
            if not seen.get(place):
                seen[place] = bool(races(program(text[:before] + mutant, tmp_path), launch, tmp_path))
    assert seen and all(seen.values()), [place for place, found in seen.items() if not found]


def _where(text: str, number: int) -> str:
    """What names a barrier: the line that it ends, and the one before it."""
    match = list(re.finditer(BARRIERS, text))[number]
    return "\n".join(text[: match.end()].splitlines()[-3:])
