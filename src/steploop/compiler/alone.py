"""A trace sees nothing of what it is made in: no modes, no hooks, no caches, no checks of what runs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch.utils._python_dispatch import _disable_current_modes

from . import forward_mode
from .distributions import without_checks
from .sizes_by_value import sizes_by_value
from .symbolic_len import symbolic_len


@contextmanager
def alone() -> Iterator[None]:
    """As if nothing were around the trace. torch.func stays as it is: a step may use it inside itself."""
    with ExitStack() as stack:
        for surrounding in (
            _disable_current_modes, _quiet, _no_autocast_cache, _no_saved_tensors_hooks, without_checks, _no_anomalies,
            _nothing_compiled, _nothing_checkpointed, forward_mode.switched_off, sizes_by_value, symbolic_len,
        ):  # fmt: skip
            stack.enter_context(surrounding())
        yield


# What torch's tracer logs an error in, before it is raised.
_LOGS = [logging.getLogger(f"torch.{name}") for name in ("_subclasses.fake_tensor", "fx.experimental.symbolic_shapes")]


@contextmanager
def _quiet() -> Iterator[None]:
    """An error in a step is raised; torch's tracer need not log it as well, least of all where it is only tried."""
    levels = [log.level for log in _LOGS]
    for log in _LOGS:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in zip(_LOGS, levels):
            log.setLevel(level)


@contextmanager
def _no_saved_tensors_hooks() -> Iterator[None]:
    """What a trace saves for its own gradient is none of the hooks' business (activation checkpointing counts)."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


@contextmanager
def _no_anomalies() -> Iterator[None]:
    """Anomaly detection looks at the values of gradients. Those of the whole loop it sees all the same."""
    enabled, check_nan = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    torch.set_anomaly_enabled(False, False)
    try:
        yield
    finally:
        torch.set_anomaly_enabled(enabled, check_nan)


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """What a step has compiled with torch.compile runs as it was written: it is compiled with the rest of the step."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch._dynamo.config.patch(error_on_nested_fx_trace=False):
        yield


@contextmanager
def _nothing_checkpointed() -> Iterator[None]:
    """What a step checkpoints (in the reentrant way, which has a backward pass of its own) is run as it stands: what is
    kept for the backward is decided for the whole step."""
    function: Any = torch.utils.checkpoint.CheckpointFunction
    outer = vars(function).get("apply")  # that of a trace around this one
    function.apply = lambda run, _preserve, *args: run(*args)
    try:
        yield
    finally:
        if outer is None:
            del function.apply
        else:
            function.apply = outer


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Autocast keeps casts of weights: a trace may neither read real ones from there nor leave fake ones."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
