"""The fake tensors that a step is traced with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

# Operations of torch for which it has no rule that tells the result's shape: that of the first argument.
_LIKE_THE_FIRST = (torch.ops.aten._standard_gamma_grad.default, torch.ops.aten._dirichlet_grad.default)


class Fakes(FakeTensorMode):
    """torch's own, but for two things.

    Some operations get a rule for the shape of their result.

    The shapes of what takes an object of TorchScript are not looked up.
    torch keeps the shapes that it has found by the arguments of the call, in a table of the process. The packed weights
    of a quantised layer are such an argument. They have a hash and no equality, so the second trace of a step would end
    with an error in that table, and the first would keep the weights alive for good.
    """

    def _cached_dispatch_impl(
        self, func: Any, types: Sequence[type], args: Sequence[object], kwargs: Mapping[str, object]
    ) -> Any:
        if func in _LIKE_THE_FIRST:
            with self:
                return torch.empty_like(cast(Tensor, args[0]))
        if any(isinstance(value, torch.ScriptObject) for value in (*args, *kwargs.values())):
            return self._dispatch_impl(func, types, args, kwargs)
        return super()._cached_dispatch_impl(func, types, args, kwargs)
