"""Programs that torch.export saved: in another process, where their steps were never seen, they compute what the plain
loop does, values and gradients, at sizes of all kinds one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_cases import CASES, Case, plain
from load_exports import gradients
from torch.utils import _pytree as pytree

HERE = Path(__file__).parent


def export(case: Case) -> torch.export.ExportedProgram:
    with torch.set_grad_enabled(case.training):
        return torch.export.export(case.model, case.calls[0], dynamic_shapes=case.dynamic, strict=case.strict)


def expected(case: Case) -> list[dict]:
    """What the plain loop gives for the calls of a case."""
    model = plain(case.model)
    return [_expected_of(model, inputs, case.training) for inputs in case.calls]


def _expected_of(model, inputs, training):
    leaves, spec = pytree.tree_flatten(inputs)
    inner = [t.clone().requires_grad_() if t.is_floating_point() else t for t in leaves]
    outputs = pytree.tree_leaves(model(*pytree.tree_unflatten(inner, spec)))
    wanted = {str(i): t for i, t in enumerate(inner) if t.requires_grad} | dict(model.named_parameters())
    found = gradients(outputs, wanted) if training else None
    return {"inputs": inputs, "outputs": [o.detach() for o in outputs], "gradients": found}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, str]:
    """What went wrong with each case."""
    folder, found = tmp_path_factory.mktemp("exported"), {}
    for name, make in CASES.items():
        torch.manual_seed(0)
        try:
            case = make()
            torch.save(expected(case), folder / f"{name}.pt")
            torch.export.save(export(case), folder / f"{name}.pt2")
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    command = [sys.executable, HERE / "load_exports.py", folder]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    return {**json.loads(ran.stdout.splitlines()[-1]), **found}


@pytest.mark.parametrize("name", CASES)
def test_a_program_in_another_process(report, name):
    assert not report[name], report[name]
