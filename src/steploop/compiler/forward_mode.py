"""Forward-mode differentiation: compiled loops have no tangents, so a tensor that carries one is refused.

Only what a loop reads counts. That is known once the step is captured; until then the trace runs with forward
mode off, as the tangents of what it meets would be traced along.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import UnsupportedError, message


def active() -> bool:
    """Whether tensors may have tangents now. One comparison: it is asked at every call and streamed step."""
    return forward_ad._current_level >= 0


def refuse_tangents(named: Iterable[tuple[str, Tensor]]) -> None:
    """UnsupportedError that names the first tensor with a tangent."""
    if not active():
        return
    for name, tensor in named:
        if _has_tangent(tensor):
            raise UnsupportedError(
                message(
                    "A loop was given a dual tensor: forward-mode differentiation is not supported.",
                    expected="tensors without a tangent, where a compiled loop reads them",
                    found=f"a tangent of {name}",
                    fix='sl.Loop(step, backend="reference") and sl.scan(..., backend="reference") support it; '
                    "for gradients use torch.autograd.grad",
                )
            )


def _has_tangent(tensor: Tensor) -> bool:
    if type(tensor).__module__.startswith("torch._subclasses"):
        return False  # of a trace, which runs with forward mode off
    with _disable_current_modes():  # a loop in a step asks while the step is traced: it asks of real tensors
        return forward_ad.unpack_dual(tensor).tangent is not None


@contextmanager
def switched_off() -> Iterator[None]:
    """Forward mode off where a level is active: operations give no tangents."""
    if not active():
        yield
        return
    with forward_ad._set_fwd_grad_enabled(False):
        yield
