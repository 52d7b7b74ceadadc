"""The tour of docs/how-it-works.md: one step through every stage of the compiler, as the compiler prints it.

After a change on purpose: STEPLOOP_UPDATE_GOLDEN=1 pytest tests/golden/test_tour.py, and read the diff.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tour_step import Tagger

import steploop as sl

PAGE = Path(__file__).parents[2] / "docs" / "how-it-works.md"
BEGIN, END = "<!-- tour:begin (made by tests/golden/test_tour.py) -->\n", "<!-- tour:end -->\n"
# The stages that change something, each with what there is to see. The file is where to look for more.
TOLD = {
    "capture": "**Captured** (`compiler/trace_step.py`). Python has run once, on tensors without numbers. `B` is the "
    "batch, a symbol. A linear layer is one `addmm`; the state before the step is an input like any other.",
    "expose_products": "**Simplified** (`compiler/passes/`). Products and sums stand apart now, so that each can go "
    "its own way.",
    "split_products": "**Freed from the loop**. By now it is known what must loop: what the state is made of. The "
    "product of `cat([x, h])` is split in two: the part of `x` depends on no state.",
    "gather_sums": "The bias is added outside the loop as well.",
    "loops of forward": "**Partitioned and lowered** (`compiler/partition.py`, `backends/`). Lines with `|` are the "
    'native loop\'s program for one row; what the loop makes "ahead" it takes along, because it does that well.',
    "capture with gradient": "**The gradient** is captured by running the step again, with autograd inside the trace. "
    "What is given now are the gradients of what the step gives (`d_...`).",
    "loops of backward": "After the same passes its loop holds few calls. The gradients of all weights are one product "
    "each, over all steps at once.",
}


def tour() -> str:
    text = sl.Loop(Tagger()).plan(torch.zeros(5, 2, 3)).stages()
    stages: dict[str, str] = {}
    for part in text.split("== ")[1:]:
        name, _, body = part.partition("\n")
        stages.setdefault(name, body.strip())
    source = Path(__file__).with_name("tour_step.py").read_text().strip()
    lines = [f"```python\n{source}\n```\n"]
    lines += [f"{told}\n\n```text\n{stages[name]}\n```\n" for name, told in TOLD.items()]
    return BEGIN + "\n" + "\n".join(lines) + "\n" + END


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="another torch may trace other operations")
def test_the_tour_is_what_the_compiler_prints():
    page, found = PAGE.read_text(), tour()
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    if os.environ.get("STEPLOOP_UPDATE_GOLDEN"):
        PAGE.write_text(before + found + after)
    assert PAGE.read_text() == before + found + after
