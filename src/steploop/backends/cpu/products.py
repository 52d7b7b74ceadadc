"""The libraries of products (kernels/products.cpp), one for each dtype, which all kernels share."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compiler import blocks
from ..native.emit_expressions import CTYPES
from . import threads
from .build import begin, build
from .headers import KERNELS

FILES = ("vector.h", "tiles.h", "product.h", "products.cpp")


class LongProduct:
    """a @ w + bias for many rows: a (N, K), w (K, n), bias (n,) or None, all float32.

    Gives None where it does not apply; torch's product is as good there.
    """

    def __init__(self, kernel: Any):
        kernel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        kernel.restype = None
        self._kernel = kernel

    def __call__(self, a: Tensor, w: Tensor, bias: Tensor | None) -> Tensor | None:
        rows, depth = a.shape
        columns = w.shape[1]
        if rows < 256 or depth < 16 or columns < 64 or a.stride(1) != 1:
            return None
        given = (a, w) if bias is None else (a, w, bias)
        if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in given):
            return None
        if bias is not None and (bias.dim() != 1 or not bias.is_contiguous()):
            return None
        out = blocks.empty((rows, columns), torch.float32)
        pointers = [a.data_ptr(), w.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr()]
        numbers = [rows, depth, columns, a.stride(0), w.stride(0), w.stride(1), torch.get_num_threads()]
        self._kernel((ctypes.c_void_p * 4)(*pointers), (ctypes.c_int64 * 7)(*numbers), threads.entry())
        return out


@dataclass(frozen=True)
class Library:
    """table: the address that kernels are given.  long: for products outside loops, None where torch's are as good."""

    table: int
    long: LongProduct | None


def library(dtype: torch.dtype) -> Library:
    """Built where it is not there yet, else BuildError."""
    found = build(text(dtype))
    table = ctypes.addressof(ctypes.c_char.in_dll(found, "steploop_products"))
    known = hasattr(found, "steploop_product") and dtype == torch.float32
    return Library(table, LongProduct(found.steploop_product) if known else None)


def text(dtype: torch.dtype) -> str:
    parts = [(KERNELS / name).read_text() for name in FILES]
    return "\n".join([*parts[:-1], f"#define NUMBER {CTYPES[dtype]}", parts[-1]])


def under_way(dtype: torch.dtype) -> None:
    """Sees to it that a library is being built, if it is not there. Errors come when it is used."""
    begin(text(dtype))
