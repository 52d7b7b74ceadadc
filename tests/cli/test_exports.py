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
from torch import nn
from torch.utils import _pytree as pytree

HERE = Path(__file__).parent


def export(case: Case) -> torch.export.ExportedProgram:
    with torch.set_grad_enabled(case.training):
        return torch.export.export(case.model, case.calls[0], dynamic_shapes=case.dynamic, strict=case.strict)


def expected(case: Case) -> list[dict]:
    """What the plain loop gives for the calls of a case. (In float64 for bfloat16, in which it would itself add up
    gradients with large errors.)"""
    model, low = plain(case.model), any(p.dtype == torch.bfloat16 for p in case.model.parameters())
    return [_expected_of(model.double() if low else model, inputs, case.training, low) for inputs in case.calls]


def _expected_of(model: nn.Module, inputs: tuple, training: bool, low: bool) -> dict:
    leaves, spec = pytree.tree_flatten(inputs)
    inner = [t.double() if low else t.clone() for t in leaves]
    inner = [t.requires_grad_() if t.is_floating_point() else t for t in inner]
    outputs = pytree.tree_leaves(model(*pytree.tree_unflatten(inner, spec)))
    found = None
    if training:
        names: dict[torch.Tensor, list[str]] = {t: [str(i)] for i, t in enumerate(inner) if t.requires_grad}
        for name, weight in model.named_parameters(remove_duplicate=False):
            names.setdefault(weight, []).append(name)
        found = gradients(outputs, {" + ".join(all_of_it): t for t, all_of_it in names.items()})
        found = {name: value.bfloat16() if low else value for name, value in found.items()}
    outputs = [o.detach().bfloat16() if low and o.dtype == torch.float64 else o.detach() for o in outputs]
    return {"inputs": inputs, "outputs": outputs, "gradients": found}


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
