"""Loops that are gone leave nothing behind. Counted in a process of their own: other tests' garbage is not theirs."""

from __future__ import annotations

import subprocess
import sys

import pytest

MAKE = {
    "a loop with gradients": """
    sl.Loop(Cell(), backend=BACKEND)(torch.randn(5, 2, 8, requires_grad=True))[0].sum().backward()""",
    "a loop with other sizes": """
    loop = sl.Loop(Cell(), backend=BACKEND)
    for batch in (2, 1, 3):
        loop(torch.randn(5, batch, 8), lengths=torch.full((batch,), 4))""",
    "a stream": """
    with torch.no_grad():
        stream = sl.Loop(Cell(), backend=BACKEND).stream(2)
        for _ in range(3):
            stream(torch.randn(2, 8))""",
    "a function": """
    weight = torch.randn(8, 8, requires_grad=True)
    sl.scan(lambda h, x: (torch.tanh(h @ weight + x),) * 2, torch.zeros(2, 8), torch.randn(5, 2, 8),
            backend=BACKEND)""",
    "a memory": """
    sl.Loop(sl.memory.CumSum(), backend=BACKEND)(torch.randn(5, 2, 8, requires_grad=True))[0].sum().backward()""",
    "a loop in a step": """
    sl.Loop(Outer(), backend=BACKEND)(torch.randn(5, 2, 3, 8, requires_grad=True))[0].sum().backward()""",
    "a class that is defined anew, as a notebook's cells are": """
    names = {**globals(), "__name__": "cell"}
    exec(CELL, names)
    with torch.no_grad():
        names["loop"].stream(2)(torch.randn(2, 8))
    names["loop"](torch.randn(5, 2, 8, requires_grad=True))[0].sum().backward()""",
    "a model that is given as a constant": """
    loop = sl.Loop(Reads(), backend=BACKEND)
    with torch.no_grad():
        loop(torch.randn(5, 2, 8), model=nn.Linear(8, 8))
        loop.stream(2, model={"a": nn.Linear(8, 8)}["a"])(torch.randn(2, 8))""",
    "a step that is refused": """
    try:
        sl.Loop(Refused(), backend=BACKEND)(torch.randn(5, 2, 8))
    except sl.StepError:
        pass""",
}
PROGRAM = """
import gc, linecache, torch, steploop as sl
from torch import nn

BACKEND = {backend!r}
CELL = '''
class Config:
    scale, kept = 2.0, [1.0]

class Anew(sl.Step):
    config = Config()
    def __init__(self):
        super().__init__()
        self.w, self.h = nn.Linear(8, 8), sl.State(8)
    def step(self, x):
        self.h.next = torch.tanh(self.w(x) * self.config.scale + self.h.prev * kept[0])
        return self.h.next

kept = [0.5]
step = Anew()
loop = sl.Loop(step, backend=BACKEND)
'''

class Cell(sl.Step):
    def __init__(self):
        super().__init__()
        self.w, self.h = nn.Linear(8, 8), sl.State(8)

    def step(self, x):
        self.h.next = torch.tanh(self.w(x) + self.h.prev)
        return self.h.next

class Outer(sl.Step):
    def __init__(self):
        super().__init__()
        self.inner, self.h = sl.Loop(Cell()), sl.State(8)

    def step(self, x):
        self.h.next = self.h.prev + self.inner(x.transpose(0, 1))[0][-1]
        return self.h.next

class Reads(Cell):
    def step(self, x, *, model):
        return super().step(model(x))

class Refused(Cell):
    def step(self, x):
        return x if float(self.h.prev.sum()) > 0 else -x

def objects(make, count):
    for _ in range(count):
        make()
    gc.collect()
    return len(gc.get_objects()) + len(linecache.cache)

def check(what, make):
    objects(make, 3)
    before = objects(make, 1)
    stay = (objects(make, 4) - before) / 4
    if stay >= 20:
        print(f"{{what}}: {{stay}} objects stay of each")

{checks}
"""


def test_nothing_stays():
    checks = "".join(f"def make():{make}\n\ncheck({what!r}, make)\n" for what, make in MAKE.items())
    script = PROGRAM.format(backend="eager", checks=checks)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout, done.stdout


MEMORY = """
import gc, torch, steploop as sl
from pathlib import Path
from torch import nn

torch.set_num_threads(1)
calls = [0]


class Cell(sl.Step):
    def __init__(self, size):
        super().__init__()
        self.w, self.h, self.own = nn.Linear(8, 8), sl.State(8), [size]  # the list's number: no capture serves another

    def step(self, x):
        self.h.next = torch.tanh(self.w(x) + self.h.prev) * self.own[0]
        return self.h.next


def resident():
    gc.collect()
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS")).split()[1])


def run(count):
    for _ in range(count):
        calls[0] += 1
        loop = sl.Loop(Cell(calls[0]), backend="eager")
        loop(torch.randn(5, 2, 8, requires_grad=True))[0].sum().backward()


run(100)
before = resident()
run(COUNT)
grown = (resident() - before) / 1000
assert grown < 20, f"COUNT loops made and dropped left {grown:.0f} MB"
"""


def memory_of(count):
    script = MEMORY.replace("COUNT", str(count))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_thousand_loops_leave_little_memory():
    done = memory_of(1000)
    assert done.returncode == 0, done.stderr
