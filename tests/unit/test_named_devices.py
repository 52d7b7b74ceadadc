"""The library makes every tensor where it belongs: each call that makes one names the device, "cpu" included.

Without it, a tensor is made on torch's default device, which is the CPU for most, and CUDA for some.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import steploop

ROOT = Path(steploop.__file__).parent
MAKERS = {
    "arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint",
    "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
# The native backend knows the CPU only; recipes move whole batches; the command line makes examples.
LEFT_OUT = ("backends/cpu/", "backends/native/", "recipes/", "cli.py")
# A module's own tensors are made on torch's default device, as those of torch.nn.
IN_CONSTRUCTORS = ("__init__", "_learn")
FILES = [p for p in sorted(ROOT.rglob("*.py")) if not str(p.relative_to(ROOT)).startswith(LEFT_OUT)]


def makers_without_a_device(tree: ast.AST) -> list[int]:
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name in IN_CONSTRUCTORS:
            continue
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in MAKERS}:
            if not any(k.arg in ("device", None) for k in node.keywords):
                found.append(node.lineno)
        found.extend(makers_without_a_device(node))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_tensor_is_made_on_a_named_device(path):
    lines = makers_without_a_device(ast.parse(path.read_text()))
    assert not lines, f"{path}: torch calls without device= in lines {lines}"


def test_a_forgotten_device_is_found():
    text = "def f(x):\n    return torch.zeros(3) + torch.ones(3, device=x.device)\nclass C:\n"
    text += "    def __init__(self):\n        self.w = torch.empty(2)\n"
    assert makers_without_a_device(ast.parse(text)) == [2]
