"""Loops in half precision, for kernels that compute in float32: numbers of 16 bits are what is read and written.

torch computes an operation on such numbers in float32 and rounds its result. So does a kernel: in the copy of a loop
that is lowered every value is float32, and what was half is rounded after each operation (`Lowering`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ...compiler.ir.graph import LoopProgram, line_of, op_name

ROUNDED = {torch.bfloat16: "round_bf16", torch.float16: "round_f16"}  # -> the operation (scalars.py)


def has_halves(loop: LoopProgram) -> bool:
    return any(_is_half(v) for n in loop.graph.nodes for v in pytree.tree_leaves(n.meta.get("val")))


def in_single(loop: LoopProgram) -> tuple[LoopProgram, dict[fx.Node, torch.dtype]]:
    """A copy of the loop in float32, and what each of its nodes that was half is rounded to."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    halves: dict[fx.Node, torch.dtype] = {}
    for node in loop.graph.nodes:
        made = copies[node] = graph.node_copy(node, copies.__getitem__)
        made.args, made.kwargs = _single(made.args), _single(made.kwargs)
        if _is_half(node.meta.get("val")):
            halves[made] = node.meta["val"].dtype
        if "val" in node.meta:
            made.meta["val"] = pytree.tree_map(_wide, node.meta["val"])
    inputs = [replace(i, node=copies[i.node]) for i in loop.inputs]
    prevs, nexts, kept = ([copies[n] for n in nodes] for nodes in (loop.prevs, loop.nexts, loop.kept))
    return replace(loop, graph=graph, prevs=prevs, nexts=nexts, kept=kept, inputs=inputs), halves


# What compares numbers. torch takes a number beside halves for a half too, but not in every kernel.
_COMPARE = {"eq", "ne", "lt", "le", "gt", "ge", "threshold", "threshold_backward", "hardshrink", "hardshrink_backward",
            "softshrink", "softshrink_backward", "hardtanh", "hardtanh_backward"}  # fmt: skip
_BY_DTYPE = {"nan_to_num", "frexp", "nextafter", "ldexp"}  # what depends on which numbers a dtype has


def reasons_against(loop: LoopProgram) -> list[tuple[str, str]]:
    """Calls that mean something else in float32, as (reason, source line)."""
    found = []
    for node in loop.calls:
        tensors = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        kinds = {t.dtype for t in tensors if t.dtype in ROUNDED}
        name = op_name(node)
        if kinds and name in _BY_DTYPE:
            found.append((f"no native form of {name} in half precision", line_of(node)))
        if kinds and name in _COMPARE:
            numbers = [a for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, (int, float))]
            lone = any(t.dim() == 0 and t.dtype.is_floating_point and t.dtype not in ROUNDED for t in tensors)
            if lone or any(not _holds(dtype, n) for dtype in kinds for n in numbers):
                found.append((f"{name} of half precision and a number that it does not hold", line_of(node)))
    return found


def _holds(dtype: torch.dtype, number: float) -> bool:
    """Whether a number is one of the dtype's."""
    with _disable_current_modes():
        return math.isnan(number) or torch.tensor(number, dtype=torch.float64, device="cpu").to(dtype).item() == number


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in ROUNDED


def _wide(value: Any) -> Any:
    if not _is_half(value):
        return value
    with _disable_current_modes(), torch.no_grad():
        return value.to(torch.float32)


def _single(arguments: Any) -> Any:
    """Arguments of a call, with float32 for dtypes of half precision."""
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(map(_single, arguments))
    if isinstance(arguments, dict):
        return {name: _single(value) for name, value in arguments.items()}
    return torch.float32 if isinstance(arguments, torch.dtype) and arguments in ROUNDED else arguments
