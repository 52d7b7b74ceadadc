"""Sizes in a trace are known by what they are, not by the operations that computed them.

torch's tracer makes a node of every sum and product of sizes, also of those that it computes for itself: the strides of
each value, the bytes it takes. That was up to a quarter of a trace's time. A step's graph names sizes by their
expressions (`ir.graph.Size`), so nothing reads those nodes. Here sizes are computed without nodes, and a size that an
operation is given gets one node, which has no inputs.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx.experimental import proxy_tensor, sym_node

_NAMES = ("get_proxy_mode", "_build_proxy_for_sym_expr", "_sym_register")  # none of them public


class _Here(threading.local):
    """Whether this thread traces a step. Other threads may trace something else meanwhile."""

    on = False


_here = _Here()


@contextmanager
def sizes_by_value() -> Iterator[None]:
    before, _here.on = _here.on, True
    try:
        yield
    finally:
        _here.on = before


def size(*_: Any) -> Any:
    """What the node of a size stands for. Nobody runs a traced graph before sizes have taken its place."""
    raise AssertionError("a traced size is never computed")


def _is_by_value(tracer: Any) -> bool:
    return getattr(tracer, "sizes_by_value", False)


def _install() -> None:
    get_mode: Callable[[], Any] = proxy_tensor.get_proxy_mode
    build: Callable[..., Any] = proxy_tensor._build_proxy_for_sym_expr
    operations_on_sizes = vars(sym_node)

    def get_proxy_mode() -> Any:
        mode = get_mode()
        if mode is None:
            return None
        if _here.on:
            mode.tracer.sizes_by_value = True  # autograd may go on with this trace in a thread of its own
        # (The operations on sizes ask whether to make a node; whoever else asks is told the truth.)
        by_value = _is_by_value(mode.tracer) and sys._getframe(1).f_globals is operations_on_sizes
        return None if by_value else mode

    def build_proxy(tracer: Any, expr: Any, out: Any = None) -> Any:
        if out is None or not _is_by_value(tracer):
            return build(tracer, expr, out)
        return proxy_tensor._sym_register(tracer, size, (), out)  # type: ignore[arg-type]

    proxy_tensor.get_proxy_mode = get_proxy_mode
    proxy_tensor._build_proxy_for_sym_expr = build_proxy


if all(hasattr(proxy_tensor, name) for name in _NAMES):
    _install()
