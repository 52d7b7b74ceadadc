"""The operators of torch that stand for a Loop call in somebody else's trace, and inside our own.

    steploop::loop(tensors, program, steps, batch)        program: the loop itself, as text (`exported.py`)
    steploop::inner_loop(tensors, handle, steps, batch)   handle: the number of an Invocation of this process
and for each its gradient. The first is what torch.export, make_fx and the like record: it holds wherever the graph is
taken, in a process too where the step was never seen. The second stands only in graphs that this compiler keeps,
beside the Invocation: a number costs less than a text, and such graphs never leave the process.

They are registered when steploop is imported, so that a program saved elsewhere can be loaded; what they do is imported
when one runs, for that brings in torch's tracing machinery.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from ..errors import NO_SECOND_DERIVATIVE, UnsupportedError

_TENSORS = "Tensor[] tensors, {key}, SymInt steps, SymInt batch"
_KEYS = {"loop": "str program", "inner_loop": "int handle"}
# Inside our own graphs a call is what its step is; to others it may draw random numbers, and two are never one.
_TAGS = {"loop": (torch.Tag.nondeterministic_seeded,), "inner_loop": ()}

_library = torch.library.Library("steploop", "DEF")


def _invocation(key: int | str) -> Any:
    from . import loop_operator, traced_calls  # noqa: F401 (the second reads texts)

    return loop_operator.invocation_of(key)


def _run(tensors: list[Tensor], key: Any, steps: int, batch: int) -> list[Tensor]:
    return _invocation(key).run_operator(tensors, steps, batch)


def _run_backward(
    cotangents: list[Tensor], tensors: list[Tensor], results: list[Tensor], key: Any, steps: int, batch: int,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    return _invocation(key).run_backward(cotangents, tensors, results, steps, batch, needs)


def _fake(tensors: list[Tensor], key: Any, steps: Any, batch: Any) -> list[Tensor]:
    return _invocation(key).fake_results(tensors, steps, batch)


def _fake_backward(
    cotangents: list[Tensor], tensors: list[Tensor], results: list[Tensor], key: Any, steps: Any, batch: Any,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, n in zip(tensors, needs) if n]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    from . import loop_operator

    tensors, key, steps, batch = inputs
    loop_operator.set_up(ctx, _invocation(key), tensors, steps, batch, output)


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    from . import loop_operator

    return loop_operator.backward(ctx, gradients), None, None, None


def _no_second_derivative(*_: Any) -> None:
    raise UnsupportedError(NO_SECOND_DERIVATIVE)


def _under_transform(name: str) -> Any:
    """A traced call that is run under torch.func later: torch would drop its tangents without a word."""

    def refuse(tensors: list[Tensor], key: Any, steps: int, batch: int) -> list[Tensor]:
        if any(is_functorch_wrapped_tensor(t) or t.requires_grad for t in tensors):
            raise UnsupportedError(
                "a traced Loop was called under a torch.func transform (vmap, grad, jvp, ...). Trace it with "
                'sl.Loop(step, backend="reference"), which any transform takes; for gradients use torch.autograd.grad.'
            )
        with torch._C._DisableFuncTorch():
            return getattr(torch.ops.steploop, name)(tensors, key, steps, batch)

    return refuse


for _name, _key in _KEYS.items():
    _given, _back = _TENSORS.format(key=_key), f"{_name}_backward"
    _library.define(f"{_name}({_given}) -> Tensor[]", tags=_TAGS[_name])
    _library.define(
        f"{_back}(Tensor[] cotangents, {_given.replace(_key, f'Tensor[] results, {_key}')}, bool[] needs) -> Tensor[]"
    )
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    _library.impl(_back, _run_backward, "CompositeExplicitAutograd")
    _library.impl(_name, _under_transform(_name), "FuncTorchDynamicLayerFrontMode")
    torch.library.register_fake(f"steploop::{_name}", _fake, lib=_library)
    torch.library.register_fake(f"steploop::{_back}", _fake_backward, lib=_library)
    torch.library.register_autograd(f"steploop::{_name}", _backward, setup_context=_setup, lib=_library)
    torch.library.register_autograd(
        f"steploop::{_back}", _no_second_derivative, setup_context=lambda *a, **k: None, lib=_library
    )
