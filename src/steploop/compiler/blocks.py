"""Memory that is used again: what a loop keeps for its backward is as large at the next training step.

The system gives large blocks page by page, at their first touch, and takes them back at once: that costs more than
computing what stands in them. So blocks that nobody refers to any more are kept here, KEPT bytes at most, for the next
call. A block is free when the count of references to its storage says that only this list has one. So nothing is ever
written that anyone still reads, through a view or a numpy array either.

STEPLOOP_KEEP_MB sets how much is kept (512; 0: nothing).
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

LEAST = 1 << 20  # bytes; smaller blocks the allocator keeps itself
KEPT = int(os.environ.get("STEPLOOP_KEEP_MB", "512")) << 20
_count: Any = getattr(torch._C, "_storage_Use_Count", None)  # not a public interface: without it nothing is kept


class Block:
    """Memory that was made for a tensor. `keeper` is a reference to it that counts as one."""

    def __init__(self, made: Tensor):
        storage = made.untyped_storage()
        self.size = storage.nbytes()
        self.address = storage._cdata
        self.keeper = torch.empty(0, dtype=made.dtype, device="cpu").set_(storage)

    def free(self) -> bool:
        """Whether nobody else refers to it, here or, as shared memory, in another process."""
        if _ALONE is None or self.references() != _ALONE or self.keeper.is_shared():
            return False
        return self.keeper.untyped_storage().nbytes() == self.size  # else somebody resized it

    def references(self) -> tuple[int, int]:
        """References to the memory, and to the Python object that stands for it, the keeper's and ours included."""
        storage = self.keeper.untyped_storage()
        return _count(self.address), sys.getrefcount(storage)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        # torch's stubs ask for the strides, which may be left out.
        return torch.empty(0, dtype=dtype, device="cpu").set_(self.keeper.untyped_storage(), 0, tuple(shape))  # type: ignore[call-overload]


@dataclass
class Blocks:
    """Blocks in the order of their last use. `limit`: bytes in all of those that are free."""

    limit: int
    blocks: list[Block] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, size: int) -> Block | None:
        """A free block of at least `size` bytes and not much more: the one used last, which caches may still hold."""
        for block in reversed(self.blocks):
            if size <= block.size <= size + size // 8 and block.free():
                self.blocks.remove(block)
                self.blocks.append(block)
                return block
        return None

    def add(self, block: Block) -> None:
        """Keeps a block that was made; the longest unused ones go where too many are free."""
        self.blocks.append(block)
        room, left = self.limit, []
        for kept in reversed(self.blocks):
            if kept.free():
                room -= kept.size
                if room < 0:
                    continue
            left.append(kept)
        self.blocks = left[::-1]


def _alone() -> tuple[int, int] | None:
    """What `references` says where nobody else has one; None where it can't tell."""
    if _count is None:
        return None
    made = torch.empty(1, device="cpu")
    block = Block(made)
    held = block.references()
    del made
    alone = block.references()
    storage = block.keeper.untyped_storage()
    named = block.references()
    del storage
    return alone if alone != held and alone != named and alone == block.references() else None


with _disable_current_modes():  # the first call of all may be one that a tracer of torch's records
    _ALONE = _alone()
_blocks = Blocks(KEPT)
os.register_at_fork(after_in_child=lambda: setattr(_blocks, "lock", threading.Lock()))


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """As torch.empty; large ones on the CPU are made where a free block is."""
    size = dtype.itemsize * math.prod(shape)
    on_cpu = device is None or device.type == "cpu"
    if size < LEAST or size > _blocks.limit or not on_cpu or _ALONE is None:
        return torch.empty(shape, dtype=dtype, device=device or "cpu")
    with _blocks.lock:
        block = _blocks.take(size)
        if block is not None:
            return block.tensor(shape, dtype)
        made = torch.empty(shape, dtype=dtype, device="cpu")
        _blocks.add(Block(made))
        return made


def release() -> None:
    """Gives all blocks back to the system as soon as nobody refers to them."""
    with _blocks.lock:
        _blocks.blocks = []
