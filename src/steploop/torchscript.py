"""What can't hold a loop: TorchScript (torch.jit, torch.onnx.export with dynamo=False) and torch.fx.symbolic_trace.
Their errors say what can."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

import torch

from .errors import UnsupportedError, message

is_tracing = torch._C._is_tracing
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))
_JIT = (os.path.join(_TORCH, "jit") + os.sep, os.path.join(_TORCH, "_jit_internal"))


def refuse(backend: str) -> None:
    """UnsupportedError under torch.jit.trace, which would record one run of a compiled loop as numbers."""
    if backend != "reference" and is_tracing():
        raise error()


def error() -> UnsupportedError:
    return UnsupportedError(
        message(
            "A Loop can't go through TorchScript (torch.jit.trace and TensorBoard's add_graph, torch.jit.script, "
            "torch.onnx.export with dynamo=False).",
            expected="torch.export.export(model, args), whose programs carry their loops",
            fix="torch.export.save(torch.export.export(model, args), path); to run it without Python's model, "
            'torch._inductor.aoti_compile_and_package. Or sl.Loop(step, backend="reference"), of which torch.jit.trace '
            "records the plain loop, for the T and B of the example alone",
        )
    )


def refuse_proxy(value: Any) -> None:
    """UnsupportedError for what torch.fx.symbolic_trace gives in the place of a tensor."""
    if isinstance(value, torch.fx.Proxy):
        raise UnsupportedError(
            message(
                "A loop was called under torch.fx.symbolic_trace, which gives it proxies in place of tensors.",
                expected="torch.export.export, which takes a loop as one operation",
                fix="or a tracer of your own whose is_leaf_module is true for sl.Loop",
            )
        )


def asks() -> bool:
    """Whether torch.jit is looking at a module's attributes, one after the other."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_JIT):
            return True
        frame = frame.f_back
    return False
