"""The notebooks of the documentation run, cell by cell, and are kept without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))


BY_THE_PLAIN_LOOP = """
from steploop import dispatch
dispatch.run = lambda program, call, *_, run=dispatch.run: run(program, call, "reference")
"""


def test_all_run(monkeypatch, request):
    """One kernel for all, which forgets its names in between: to start one takes as long as to run one.

    Calls run by the plain loop, as most of the time would go into compiling. `--long`: as for a reader.
    """
    assert [path.stem for path in NOTEBOOKS] == ["own-cell", "search", "start"]
    together = nbformat.v4.new_notebook()
    if not request.config.getoption("--long"):
        monkeypatch.setenv("STEPLOOP_CXX", "no-compiler-for-notebooks")
        together.cells.append(nbformat.v4.new_code_cell(BY_THE_PLAIN_LOOP))
    for path in NOTEBOOKS:
        together.cells += [nbformat.v4.new_code_cell("%reset -f"), *nbformat.read(path, 4).cells]
    NotebookClient(together, timeout=300, kernel_name="python3").execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_kept_without_outputs(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)
