"""The kinds of tensors that a compiled loop takes: numbers side by side in memory, and torch's own operations on them.

The plain loop takes whatever torch takes. What is not one of these kinds is an error that says how to make it one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # not in torch's stubs

from .compiler.program import Call, Program
from .errors import InputError, UnsupportedError, describe, describe_type, message, without_memory

_PLAIN = (Tensor, nn.Parameter)
_own_function = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]  # a class method; the stubs say function
_own_dispatch = Tensor.__torch_dispatch__


def check(program: Program, call: Call) -> None:
    """InputError or UnsupportedError where a tensor of a call is of another kind."""
    for kind, tensors in (("x", call.xs), ("constant", call.constants), ("state", call.initial)):
        for i, tensor in enumerate(tensors):
            if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_nested:
                _refuse_subclass(tensor, _name(program, kind, i))
                refuse_layout(tensor, _name(program, kind, i))
            elif tensor.is_quantized:
                refuse_layout(tensor, _name(program, kind, i))
            elif tensor.is_cpu and not _has_memory(tensor):
                raise InputError(without_memory(tensor, f"`{_name(program, kind, i)}`"))
    marks = (call.lengths, call.mask, call.resets)
    if any(mark is not None and mark.is_meta for mark in marks):
        _refuse_unknown_marks(marks, (*call.xs, *call.constants, *call.initial))


def _has_memory(tensor: Tensor) -> bool:
    try:
        if torch._C._len_torch_function_stack():
            with torch._C.DisableTorchFunction():  # (a trace around this call would take it for a look at the numbers)
                return tensor.data_ptr() != 0 or tensor.numel() == 0
        return tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:  # one of a tracer's
        return True


def _name(program: Program, kind: str, index: int) -> str:
    names = {"x": program.x_names, "constant": program.constant_names, "state": program.state_names}[kind]
    return names[index] if index < len(names) else f"{kind} {index}"


def refuse_layout(tensor: Tensor, name: str) -> None:
    """InputError unless a tensor is dense."""
    if tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized:
        return
    if tensor.is_nested:
        found, fix = "a nested tensor", "nn.utils.rnn.pad_sequence(list(x.unbind())) and lengths="
    elif tensor.is_quantized:
        found, fix = f"a quantised tensor, {describe_type(tensor.shape, tensor.dtype)}", "x.dequantize()"
    else:
        found, fix = f"{describe_type(tensor.shape, tensor.dtype)}, {tensor.layout}", "x.to_dense()"
    raise InputError(
        message(
            f"`{name}` is not a dense tensor.",
            expected="a tensor with its numbers side by side (torch.strided)",
            found=found,
            fix=fix,
        )
    )


def is_plain(kind: type[Tensor]) -> bool:
    """Whether a class of tensors leaves torch's operations as they are, or is one of those of torch's tracers."""
    own = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    if kind.__module__.startswith("torch._subclasses"):
        return True
    plain_function = own is _own_function or own is torch._C._disabled_torch_function_impl
    return plain_function and kind.__torch_dispatch__ is _own_dispatch


def _refuse_subclass(tensor: Tensor, name: str) -> None:
    kind = type(tensor)
    if is_plain(kind):
        return
    raise UnsupportedError(
        message(
            f"`{name}` is a {kind.__name__}, which has operations of its own: a compiled loop would not call them.",
            expected="a torch.Tensor, or a subclass without __torch_function__ and __torch_dispatch__",
            found=f"{kind.__module__}.{kind.__qualname__}",
            fix=f"give its plain tensor ({name}.as_subclass(torch.Tensor), or what holds its numbers), or "
            'backend="reference"',
        )
    )


def _refuse_unknown_marks(marks: Sequence[Tensor | None], tensors: Iterable[Tensor]) -> None:
    real = next((t for t in tensors if not t.is_meta), None)
    if real is None:
        return
    names = ("lengths", "mask", "resets")
    name = next(n for n, mark in zip(names, marks, strict=True) if mark is not None and mark.is_meta)
    raise InputError(
        message(
            f"`{name}` is on the meta device and holds nothing, and the sequences are real.",
            expected=f"`{name}` on any device that holds numbers",
            found=describe(next(m for m in marks if m is not None and m.is_meta)),
            fix=f"make it with device={str(real.device)!r}",
        )
    )


def run_lazy(program: Program, call: Call) -> bool:
    """Whether the step has parameters that take their shape from the first step: then runs one, which is when the plain
    loop would make them."""
    root = program.root
    own = (*root.parameters(), *root.buffers()) if isinstance(root, nn.Module) else ()
    if not any(isinstance(tensor, UninitializedTensorMixin) for tensor in own):
        return False
    slices: list[Any] = [x[0] if x.shape[0] else x.new_zeros(x.shape[1:]) for x in call.xs]
    with torch.no_grad():
        program.run([s.clone() for s in slices], call.constants, [s.clone() for s in call.initial])
    return True
