"""What one way of running gave, and how it differs from what another gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .compare import Difference, compare
from .compiler.program import Call, Program, Result
from .errors import MismatchError, message


@dataclass
class Run:
    """What one way of running gave. gradients: by name, None where it is not reached."""

    outputs: list[tuple[str, Tensor]]
    states: list[tuple[str, Tensor]]
    gradients: list[tuple[str, Tensor]]
    buffers: list[tuple[str, Tensor]] = field(default_factory=list)

    @staticmethod
    def of(
        program: Program,
        call: Call,
        run: Callable[[Program, Call], Result],
        targets: list[tuple[str, Tensor]] | None,
    ) -> Run:
        with torch.set_grad_enabled(targets is not None):
            result = run(program, call)
        structure = result.out_spec if result.out_spec is not None else program.out_spec
        outputs = list(zip(structure.names("outputs"), result.outputs, strict=True))
        states = list(zip(program.state_names, result.states, strict=True))
        gradients = [] if targets is None else gradients_of(result, targets)
        return Run(outputs, states, gradients)


def gradients_of(result: Result, targets: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    values = [v for v in (*result.outputs, *result.states) if v.is_floating_point() or v.is_complex()]
    # drawn for every value, reached or not, so that both ways get the same ones
    generator = torch.Generator().manual_seed(0)
    cotangents = [
        torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu").to(value.device, value.dtype)
        for value in values
    ]
    reached = [(v, c) for v, c in zip(values, cotangents, strict=True) if v.requires_grad]
    tensors = [tensor for _, tensor in targets]
    gradients: Any = [None] * len(tensors)
    if reached and tensors:
        gradients = torch.autograd.grad(
            [v for v, _ in reached], tensors, [c for _, c in reached], allow_unused=True
        )
    return [
        (name, torch.zeros_like(tensor) if gradient is None else gradient)
        for (name, tensor), gradient in zip(targets, gradients, strict=True)
    ]


def dtypes_of(root: Any, call: Call) -> set[torch.dtype]:
    """Those of what a call computes with."""
    own = [*root.parameters(), *root.buffers()] if isinstance(root, nn.Module) else []
    return {t.dtype for t in (*call.xs, *call.constants, *call.initial, *own)}


def differences(first: Run, second: Run, dtypes: set[torch.dtype]) -> Iterator[Difference]:
    for kind, a, b, axes in _pairs(first, second):
        for (name, x), (_, y) in zip(a, b, strict=True):
            own_axes = ("step", "row") if kind == "gradient" and name.startswith("xs") else axes
            yield compare(name, kind, x, y, own_axes, dtypes)


def _pairs(first: Run, second: Run) -> Iterator[tuple[str, Any, Any, tuple[str, ...]]]:
    for kind, a, b, axes in (
        ("output", first.outputs, second.outputs, ("step", "row")),
        ("state", first.states, second.states, ("row",)),
        ("gradient", first.gradients, second.gradients, ()),
        ("buffer", first.buffers, second.buffers, ()),
    ):
        if [name for name, _ in a] != [name for name, _ in b]:
            raise MismatchError(
                message(
                    f"The reference and the optimised way do not give the same {kind}s.",
                    expected=", ".join(name for name, _ in a) or "none",
                    found=", ".join(name for name, _ in b) or "none",
                )
            )
        yield kind, a, b, axes


def shapes_only(first: Run, second: Run) -> Iterator[Difference]:
    for kind, a, b, axes in _pairs(first, second):
        for (name, x), (_, y) in zip(a, b, strict=True):
            same_finite = bool(torch.isfinite(x).all()) == bool(torch.isfinite(y).all())
            if x.shape == y.shape and x.dtype == y.dtype and same_finite:
                yield Difference(name, kind, 0.0, 0.0, axes=axes)
            else:
                yield compare(name, kind, x, y, axes)
