"""Loads exported programs in a process that never saw their steps. Prints JSON: what went wrong with each, or "".

python load_exports.py FOLDER     with NAME.pt2 and NAME.pt (see test_exports.py); AOTInductor's are package*.pt2
"""

from __future__ import annotations

import io
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import steploop as sl


class Decoy(sl.Step):
    """Of the same signature as the steps of many cases."""

    def __init__(self):
        super().__init__()
        self.w, self.h = nn.Linear(5, 3), sl.State(3)

    def step(self, x):
        self.h.next = self.h.prev - self.w(torch.cat([x, self.h.prev], -1))
        return {"h": self.h.next, "more": (self.h.prev.cos(), self.h.next)}


def load_another_one() -> None:
    """What is known of this process by its numbers alone is taken by now."""
    file, loop, xs = io.BytesIO(), sl.Loop(Decoy(), backend="eager"), torch.randn(5, 3, 2)
    torch.export.save(torch.export.export(loop, (xs,)), file)
    file.seek(0)
    found, _ = torch.export.load(file).module()(xs)
    torch.testing.assert_close(found["h"], loop(xs)[0]["h"])


def check(model: Any, calls: list[dict[str, Any]]) -> None:
    for number, call in enumerate(calls):
        leaves, spec = pytree.tree_flatten(call["inputs"])
        training = call["gradients"] is not None
        leaves = [t.requires_grad_() if training and t.is_floating_point() else t for t in leaves]
        try:
            compare(model, pytree.tree_unflatten(leaves, spec), leaves, call)
        except Exception as error:
            raise AssertionError(f"call {number}, {[tuple(t.shape) for t in leaves]}") from error


def gradients(outputs: list[torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of a weighted sum of the outputs; the weights are the same for the same outputs."""
    torch.manual_seed(1)
    weighted = [(o * torch.randn(o.shape, dtype=torch.float64)).sum() for o in outputs if o.is_floating_point()]
    total = sum([w for w in weighted if w.requires_grad], torch.zeros((), requires_grad=True))
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(wanted, found))


def compare(model: nn.Module, inputs: tuple, leaves: list[torch.Tensor], call: dict[str, Any]) -> None:
    outputs = [o for o in pytree.tree_leaves(model(*inputs)) if o is not None]
    close = {"rtol": 2e-2, "atol": 5e-2} if any(o.dtype == torch.bfloat16 for o in outputs) else {}
    torch.testing.assert_close([o.detach() for o in outputs], call["outputs"], **close)
    if call["gradients"] is None:
        return
    weights = dict(getattr(model, "_orig_mod", model).named_parameters(remove_duplicate=False))
    wanted = {**{str(i): t for i, t in enumerate(leaves) if t.requires_grad}, **weights}
    found = gradients(outputs, wanted)
    for names, value in call["gradients"].items():
        # A loaded program has a parameter for each name: where weights were tied, their gradients are parts of one sum.
        total = torch.stack([found[name] for name in names.split(" + ")]).sum(0)
        torch.testing.assert_close(total, value, msg=lambda text, n=names: f"gradient of {n}: {text}", **close)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    load_another_one()
    report = {}
    for path in sorted(folder.glob("*.pt2")):
        try:
            package = path.stem.startswith("package")
            model = torch._inductor.aoti_load_package(str(path)) if package else torch.export.load(path).module()
            check(model, torch.load(path.with_suffix(".pt")))
            report[path.stem] = ""
        except Exception:
            report[path.stem] = traceback.format_exc()
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
