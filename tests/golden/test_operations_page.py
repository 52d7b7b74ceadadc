"""docs/operations.md says what the compiler and the native backend know of each operation.

After a change on purpose: STEPLOOP_UPDATE_GOLDEN=1 pytest tests/golden/test_operations_page.py, and read the diff.
"""

from __future__ import annotations

import os
from pathlib import Path

from steploop.backends.native import lower  # noqa: F401  (fills the table of lowerings)
from steploop.backends.native.lowering import TABLE as NATIVE
from steploop.compiler import history_products, loop_operator, memory_operator  # noqa: F401  (they add rows)
from steploop.compiler.ops.rules import pointwise
from steploop.compiler.ops.table import TABLE, Operation

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
HEAD = """# What the compiler knows of operations

Made from the compiler's own tables by `tests/golden/test_operations_page.py`. One row per ATen operation:

- **rows**: whether it keeps the rows of a batch apart. "each number": the result is computed number by number.
  "rule": a rule says where the batch is in the result. An operation that mixes rows runs step by step.
- **additive in**: the arguments (numbered from 0) in which it is additive together: sums over steps may be
  taken before it.
- **kind**: a *view* computes nothing; what *moves* numbers copies them; what is *made of sizes* is made again
  where it is used; a *pass over a row* is as fast inside a native loop as outside.
- **native**: whether a native loop has a form of its own for it. Others are taken apart by torch's decompositions,
  where there are some; otherwise their loop runs on the backend "eager".

Operations that are not here, and that torch marks as element by element, count as such; all others mix rows.
[Operations of your own](extending.md#an-operation-of-torchlibrary) can be added.

| operation | rows | additive in | kind | native |
| --- | --- | --- | --- | --- |
"""


def page() -> str:
    names = sorted({str(n) for n in TABLE if isinstance(n, str) and "::" not in n} | set(NATIVE))
    return HEAD + "".join(f"{_row(name, TABLE.get(name, Operation(name)))}\n" for name in names if _is_aten(name))


def _is_aten(name: str) -> bool:
    return name not in ("loop", "inner_loop", "loop_backward", "inner_loop_backward", "memory", "memory_backward")


def _row(name: str, row: Operation) -> str:
    rows = "each number" if row.pointwise or row.rows is pointwise else "rule" if row.rows else ""
    additive = "; ".join(" + ".join(map(str, group)) for group in row.linear)
    kinds = [f"view ({row.view})" if row.view else "", "moves" if row.moves else "",
             "made of sizes" if row.factory else "", "pass over a row" if row.row_pass else ""]  # fmt: skip
    kind = ", ".join(k for k in kinds if k)
    return f"| `{name}` | {rows or _by_tag(name)} | {additive} | {kind} | {'yes' if name in NATIVE else ''} |"


def _by_tag(name: str) -> str:
    import torch

    packet = getattr(torch.ops.aten, name.split(".")[0], None)
    overloads = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
    if any(torch.Tag.pointwise in o.tags for o in overloads):
        return "each number"
    return "made of sizes" if name in TABLE and TABLE[name].factory else ""


def test_the_page_says_what_the_tables_say():
    if os.environ.get("STEPLOOP_UPDATE_GOLDEN"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page()
