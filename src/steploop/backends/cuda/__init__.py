"""Loops as CUDA C++: one kernel runs all steps. Experimental; see docs/gpu.md for what it was tried on.

The text of a loop is that of the native loops on the CPU (`native`). A thread of a team is a warp here, the lanes of
a vector are its lanes.

kernels/      what stands around a loop's text: lanes and functions on them, teams and their barriers, products
nvrtc.py      CUDA C++ -> a cubin.  driver.py: loads it, launches it.  machine.py: both, as one kernel
ways.py       how a loop is launched, by a model of what a step costs
runner.py     calls it
"""

from __future__ import annotations

from ...compiler.ir.graph import LoopProgram
from ...errors import BuildError
from .. import BACKENDS, contract
from ..native.language import RowProgram
from ..native.lower import lower
from .machine import Gpu, Machine
from .runner import Runner


class Cuda(contract.Backend):
    """Takes what the native loops of the CPU take, on CUDA tensors."""

    name = "cuda"
    words = BACKENDS["cuda"]

    def __init__(self, machine: Machine | None = None):
        self.machine = machine or Gpu()

    def reasons_against(self, loop: LoopProgram) -> contract.Reasons:
        trouble = self.machine.problem()
        return [(trouble, "")] if trouble else self._lowered(loop)[1]

    def compile(self, loop: LoopProgram) -> Runner:
        program, reasons = self._lowered(loop)
        if program is None:
            raise BuildError("; ".join(f"{reason} ({line})" for reason, line in reasons))
        return Runner(loop, program, self.machine).begin()

    def _lowered(self, loop: LoopProgram) -> tuple[RowProgram | None, contract.Reasons]:
        """Lowered once: asking for reasons and compiling share the work."""
        found = getattr(loop, "_for_cuda", None)
        if found is None:
            found = loop._for_cuda = lower(loop, self.machine.device, halves=True)  # type: ignore[attr-defined]
        return found


__all__ = ["Cuda", "Runner"]
