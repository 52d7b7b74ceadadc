"""Loops as native code: one C++ function runs all steps for a tile of rows (see `native` for its text).

kernels/, headers.py  what stands around a loop's text: vectors, functions on them, threads, products
build.py              C++ -> a library, kept per user
runner.py             calls it
stepper.py            calls it for one step at a time; comparing.py: what streams and guards need beside it
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch

from ...compiler.ir.graph import LoopProgram
from ...errors import BuildError
from .. import contract
from ..native.cache import folder
from ..native.language import RowProgram
from ..native.lower import lower
from ..native.lowering import DTYPES
from . import products
from .build import TRIAL, begin, compiler, problem, what_to_install, wide_vectors
from .comparing import comparison
from .runner import Runner
from .stepper import Stepper
from .threads import runtime


def reasons_against(loop: LoopProgram) -> contract.Reasons:
    """Why this backend can't take a loop, as (reason, source line). Empty: it takes it."""
    trouble = problem()
    if trouble:
        _warn_once(trouble)
        return [(trouble, "")]
    return _lowered(loop)[1]


@functools.cache
def _warn_once(trouble: str) -> None:
    warnings.warn(f"steploop runs loops without native code, which is slower: {trouble}", stacklevel=3)


def wider(loop: LoopProgram, widen: contract.Widen) -> LoopProgram:
    """The loop with what it absorbs: products too, where the kernels' own are as good as torch's."""
    for operations in (True, False):
        found = widen(products=wide_vectors(), operations=operations)
        if found is None or not _lowered(found)[1]:
            return found or loop
    return loop


def compile(loop: LoopProgram) -> Runner:
    program, reasons = _lowered(loop)
    if program is None:
        raise BuildError("; ".join(f"{reason} ({line})" for reason, line in reasons))
    return Runner(loop, program).begin()


class Cpu(contract.Backend):
    """See the functions above."""

    name = "cpu"
    words = "native C++ loops, on the CPU"
    steps = takes_along = True

    def reasons_against(self, loop: LoopProgram) -> contract.Reasons:
        return reasons_against(loop)

    def compile(self, loop: LoopProgram) -> Runner:
        return compile(loop)

    def wider(self, loop: LoopProgram, widen: contract.Widen) -> LoopProgram:
        return wider(loop, widen)

    def prepare(self, dtypes: set[torch.dtype]) -> None:
        if compiler() is not None:
            begin(TRIAL)
            for dtype in dtypes & set(DTYPES):
                products.under_way(dtype)

    def stepper(self, runner: Any, *arguments: Any) -> Stepper:
        return Stepper(runner, *arguments)


def _lowered(loop: LoopProgram) -> tuple[RowProgram | None, contract.Reasons]:
    """Lowered once: asking for reasons and compiling share the work."""
    found = getattr(loop, "_native", None)
    if found is None:
        found = loop._native = lower(loop)  # type: ignore[attr-defined]
    return found


def doctor() -> dict[str, str]:
    """What native loops find on this machine."""
    using = compiler()
    return {
        "compiler": f"{using.path} ({using.version})" if using else f"none; {what_to_install()}",
        "flags": " ".join(using.flags("")) if using else "",
        "builds": problem() or "yes",
        "cache": str(folder()),
        "threads": runtime()[0] or "own threads (no OpenMP runtime is loaded)",
    }


__all__ = ["Cpu", "Runner", "comparison", "compile", "doctor", "reasons_against", "wider"]
