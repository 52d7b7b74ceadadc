"""Work that another tracer (torch.export) must not record: a capture changes the grad mode and runs under modes of its
own, while the operator that comes of it is all that belongs in the traced program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx.experimental.proxy_tensor import PreDispatchTorchFunctionMode
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode


@contextmanager
def hidden() -> Iterator[None]:
    """Takes the mode by which torch.export records changes of the grad mode from the stack."""
    modes = list(_get_current_function_mode_stack())
    if not any(isinstance(mode, PreDispatchTorchFunctionMode) for mode in modes):
        yield
        return
    _replace([mode for mode in modes if not isinstance(mode, PreDispatchTorchFunctionMode)])
    try:
        yield
    finally:
        _replace(modes)


def _replace(modes: list[Any]) -> None:
    for _ in _get_current_function_mode_stack():
        _pop_mode()
    for mode in modes:
        _push_mode(mode)
