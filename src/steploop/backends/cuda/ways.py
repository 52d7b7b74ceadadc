"""How a loop is launched: by blocks, each with rows of its own, or as a grid, all blocks together.

A step's time is what must happen one after the other: barriers, then the larger of arithmetic and bytes, as in
`benchmarks/gpu/cost_model.py` and docs/gpu.md. The constants are an NVIDIA H200's, measured without these kernels. The
ways themselves have not been timed.

    blocks  a block has ROWS rows or fewer; it reads all weights at every step, from its own memory where they fit
    grid    every block has columns of the products, and keeps their weights in its own memory where they fit; two
            barriers of the whole grid for each group of products
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

ROWS = 16  # of a block
GAP = 16  # bytes between the columns of a weight in a block's memory (kernels/product.h)
GRID_BARRIER = 1.16e-6  # seconds
BLOCK_BARRIER = 0.05e-6
PROCESSORS = 132  # that what follows is of
L2 = 7.1e12  # bytes a second to all
# Operations a second of all: float32 without tensor cores, and half precision on them. Of what cuBLAS reaches a half.
RATE, HALVES = 20e12, 300e12


@dataclass(frozen=True)
class Work:
    """What a step does. weights: (k, n, bytes of a number) of each.  groups: of products that run side by side."""

    weights: tuple[tuple[int, int, int], ...]
    groups: int

    @property
    def seconds(self) -> float:
        """That all processors together compute for one row."""
        return sum(2 * k * n / (HALVES if size == 2 else RATE) for k, n, size in self.weights)

    @property
    def bytes(self) -> int:
        return sum(k * n * size for k, n, size in self.weights)

    def near(self, blocks: int) -> int:
        """Bytes of a block's share of all weights, where `blocks` share them."""
        return sum(-(-(-(-n // blocks) * (k * size + GAP)) // 16) * 16 for k, n, size in self.weights)


@dataclass(frozen=True)
class Way:
    """together: as a grid.  rows: of a tile.  blocks: that are launched.  near: bytes that each keeps of the weights.
    seconds: of a step, predicted."""

    together: bool
    rows: int
    blocks: int
    near: int
    seconds: float

    @property
    def teams(self) -> int:
        """How many work at once, each with temporaries of its own."""
        return 1 if self.together else self.blocks


@functools.lru_cache(maxsize=256)  # every call asks twice
def best(work: Work, batch: int, processors: int, near: int) -> Way:
    """The way that takes least. near: bytes of its own memory that a block may have."""
    found = by_blocks(work, batch, processors, near), as_grid(work, batch, processors, near)
    return min(found, key=lambda way: way.seconds)


def by_blocks(work: Work, batch: int, processors: int, near: int) -> Way:
    rows = max(1, min(ROWS, -(-batch // processors)))
    tiles = -(-batch // rows)
    blocks = min(tiles, processors)
    kept = work.near(1)
    kept = kept if kept <= near else 0
    share = processors / PROCESSORS
    reading = 0.0 if kept else blocks * work.bytes / (L2 * share)
    computing = rows * work.seconds * PROCESSORS
    step = 2 * max(work.groups, 1) * BLOCK_BARRIER + max(reading, computing)
    return Way(False, rows, blocks, kept, step * -(-tiles // blocks))


def as_grid(work: Work, batch: int, processors: int, near: int) -> Way:
    kept = work.near(processors)
    kept = kept if kept <= near else 0
    share = processors / PROCESSORS
    reading = 0.0 if kept else work.bytes / (L2 * share)
    computing = batch * work.seconds / share
    return Way(True, batch, processors, kept, 2 * max(work.groups, 1) * GRID_BARRIER + max(reading, computing))

