"""The fake tensors that a step is traced with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


class Fakes(FakeTensorMode):
    """torch's own, but for one thing: the shapes of what takes an object of TorchScript are not looked up.

    torch keeps the shapes that it has found by the arguments of the call, in a table of the process. The packed weights
    of a quantised layer are such an argument. They have a hash and no equality, so the second trace of a step would end
    with an error in that table, and the first would keep the weights alive for good.
    """

    def _cached_dispatch_impl(
        self, func: Any, types: Sequence[type], args: Sequence[object], kwargs: Mapping[str, object]
    ) -> Any:
        if any(isinstance(value, torch.ScriptObject) for value in (*args, *kwargs.values())):
            return self._dispatch_impl(func, types, args, kwargs)
        return super()._cached_dispatch_impl(func, types, args, kwargs)
