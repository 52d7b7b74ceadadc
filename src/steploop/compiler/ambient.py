"""Settings of torch, outside the step, that change what it computes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.utils._device import DeviceContext


def ambient() -> Hashable:
    """Settings of torch that change what a step computes."""
    device = "cuda" if torch.cuda.is_initialized() else "cpu"
    return (
        torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled(device), torch.get_autocast_dtype(device),
        torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(), function_modes(),
    )  # fmt: skip


def function_modes() -> tuple[Any, ...]:
    """The modes that change what torch's functions do, as torch.set_default_device is one; without the tracer's own."""
    count = torch._C._len_torch_function_stack()
    if not count:
        return ()
    modes = [torch._C._get_function_stack_at(i) for i in range(count)]
    devices = [m.device if isinstance(m, DeviceContext) else m for m in modes]
    return tuple(m for m in devices if not getattr(m, "belongs_to_a_trace", False))
