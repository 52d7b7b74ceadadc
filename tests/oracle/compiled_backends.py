"""The backends that tests compare with the reference, and when a test of one may be skipped."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import steploop as sl
from steploop.backends import BACKENDS

# "auto" is one of the others; "cuda" is emulated (--emulated) where there is no such device.
_NOT_HERE = {"reference", "auto"} | ({"cuda"} if not torch.cuda.is_available() else set())
COMPILED = [name for name in BACKENDS if name not in _NOT_HERE]


@contextmanager
def may_decline(backend):
    """Skip the test where a native backend says that it cannot take this step. "eager" takes every step."""
    try:
        yield
    except sl.UnsupportedError as error:
        if backend in ("eager", "auto", "reference"):
            raise
        pytest.skip(str(error).splitlines()[0])
