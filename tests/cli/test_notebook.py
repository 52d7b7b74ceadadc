"""In a notebook a step's module has no file, and cells redefine what it uses: every call must see it."""

from __future__ import annotations

import textwrap

import nbformat
import pytest
from nbclient import NotebookClient

CELLS = [
    """
    import torch, steploop as sl
    from torch import nn
    torch.set_num_threads(1); torch.manual_seed(0)
    SCALE, TABLE = 1.0, {"a": 1.0}
    def act(z): return torch.tanh(z)
    class Config: a = 1.0
    class Cell(sl.Step):
        factor = 1.0
        def __init__(self):
            super().__init__()
            self.w, self.h = nn.Linear(5, 3), sl.State(3)
        def step(self, x):
            z = self.w(torch.cat([x, self.h.prev], -1)) * SCALE * TABLE["a"] * Config.a * self.factor
            self.h.next = act(z)
            return self.h.next
    cell, xs = Cell(), torch.randn(4, 2, 2, requires_grad=True)
    loop, plain = sl.Loop(cell, backend="eager"), sl.Loop(cell, backend="reference")
    stream, slow = loop.stream(2), plain.stream(2)
    def check():
        a, b = loop(xs)[0], plain(xs)[0]
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), [xs, *cell.parameters()]) for y in (a, b)))
        with torch.no_grad():
            for _ in range(3):
                x = torch.randn(2, 2)
                torch.testing.assert_close(stream(x), slow(x))
    """,
    "check()",
    "SCALE = 2.0; check()",
    "TABLE['a'] = 3.0; check()",
    "TABLE = {'a': 0.5}; check()",
    "Config.a = 2.0; check()",
    "def act(z): return torch.sigmoid(z)\ncheck()",
    "Cell.factor = 3.0; check()",
    "class Config: a = 0.1\ncheck()",
    "Cell.step = lambda self, x: setattr(self.h, 'next', act(self.w(torch.cat([x, self.h.prev], -1)))) or self.h.next\n"
    "check()",
    "cell.w = nn.Linear(5, 3); check()",
    "SCALE = 7.0; check()",
]


@pytest.mark.filterwarnings("ignore")
def test_cells_that_redefine_things():
    cells = [nbformat.v4.new_code_cell(_dedented(text)) for text in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()


def _dedented(text: str) -> str:
    return textwrap.dedent(text).strip()
