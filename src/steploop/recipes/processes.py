"""Several processes that train one model together (DistributedDataParallel): each takes a share of every batch.

While a training runs, torch.distributed tells which process this is and how many there are; before and after it, what
started them does. A joint batch is what one process alone would have taken: process r of n takes its rows r, r + n, ...
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, distributed

from ..errors import DataError

T = TypeVar("T")
R = TypeVar("R", list[Any], Tensor)


@dataclass(frozen=True)
class Processes:
    """How many processes a run has, on every machine, and on how many machines."""

    here: int = 1
    machines: int = 1

    @property
    def count(self) -> int:
        return self.here * self.machines


def asked(devices: int | None) -> Processes:
    """What torchrun has started, or else `devices` (None: 1). DataError where both are told and they differ."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Processes(devices or 1)
    count, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if devices is not None and devices != here:
        raise DataError(
            f"--devices is {devices}, and torchrun has started {here} processes on this machine.\n"
            "  fix:      leave --devices out, or start without torchrun"
        )
    return Processes(here, count // here)


def leads() -> bool:
    """Whether this is the process that writes files and speaks."""
    # (Lightning sets it when it is imported, from what has started this process.)
    return cast(int, rank_zero_only.rank) == 0  # type: ignore[attr-defined]


def together() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    return distributed.get_rank() if together() else 0


def count() -> int:
    return distributed.get_world_size() if together() else 1


def sums(numbers: list[float], device: torch.device) -> list[float]:
    """Each of these numbers, summed over all processes. device: where this process trains."""
    if count() == 1:
        return numbers
    found = torch.tensor(numbers, dtype=torch.float64, device=device)
    distributed.all_reduce(found)
    return cast("list[float]", found.tolist())


def of_each(value: T) -> list[T]:
    """What every process gave, in the order of their ranks."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    distributed.all_gather_object(found, value)
    return found


def share(rows: R) -> R:
    """This process's part of what has rows."""
    return rows[rank() :: count()]


def joined(shares: list[Tensor]) -> Tensor:
    """Rows (B, ...) out of every process's share of them."""
    rows = shares[0].new_empty((sum(map(len, shares)), *shares[0].shape[1:]))
    for place, share in enumerate(shares):
        rows[place :: len(shares)] = share
    return rows


def run(train: Callable[[], None], kept: str) -> None:
    """Train, in every process. kept: what the message says of where to go on.

    What went wrong is told once: by the process that it happened in, or where it happened in all of them, by the first.
    """
    known = together()
    try:
        train()
    except DataError:
        if leads():
            raise
        raise SystemExit(0) from None  # (another code would have Lightning kill the first before it has spoken)
    except RuntimeError as error:
        if count() == 1 or "gloo" not in str(error):
            raise
        if not leads():
            raise SystemExit(1) from None
        raise DataError(f"Another process of this training has ended before its time.\n  fix:      {kept}") from error
    finally:
        if together() and not known:  # the next training of this program may be of one process
            distributed.destroy_process_group()
