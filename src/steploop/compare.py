"""Two results of the same computation, tensor by tensor: how far apart they are, and where."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# The largest difference allowed, relative to a tensor's largest entry: (values, gradients).
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-9),
    torch.complex128: (1e-9, 1e-9),
    torch.float32: (1e-5, 1e-4),
    torch.complex64: (1e-5, 1e-4),
    torch.float16: (1e-2, 2e-2),
    torch.bfloat16: (3e-2, 6e-2),
}


@dataclass
class Difference:
    """One tensor compared. error: the largest |a - b| over the reference's largest |a|.

    kind: "output", "state", "gradient" or "buffer".  axes: what the leading axes are ("step", "row").
    index: where the worst entry is.  reference, optimised: its two values.
    """

    name: str
    kind: str
    error: float
    tolerance: float
    index: tuple[int, ...] = ()
    axes: tuple[str, ...] = ()
    reference: object = None
    optimised: object = None
    shapes: str = ""

    @property
    def ok(self) -> bool:
        """Whether the two agree."""
        return self.error <= self.tolerance

    @property
    def badness(self) -> float:
        """The error in units of the tolerance."""
        return self.error / self.tolerance if self.tolerance else (float("inf") if self.error else 0.0)

    def where(self) -> str:
        """'step 3, row 1, [5]': where the worst entry stands."""
        named = [f"{axis} {i}" for axis, i in zip(self.axes, self.index, strict=False)]
        rest = list(self.index[len(named) :])
        return ", ".join([*named, *([f"entry {rest}"] if rest else [])])

    def __str__(self) -> str:
        if self.shapes:
            return f"{self.kind} {self.name}: {self.shapes}"
        return (
            f"{self.kind} {self.name} at {self.where() or 'its only entry'}: reference {self.reference}, "
            f"optimised {self.optimised} (relative error {self.error:.2e}, allowed {self.tolerance:.0e})"
        )


def tolerance(kind: str, dtype: torch.dtype, computed_of: Iterable[torch.dtype] = ()) -> float:
    """What is allowed for a tensor of a dtype: a float64 that was computed of float32 numbers has their precision."""
    own = TOLERANCES.get(dtype)
    if own is None:
        return 0.0
    return max(found[kind == "gradient"] for found in (own, *(TOLERANCES.get(d, own) for d in computed_of)))


def compare(
    name: str, kind: str, reference: Tensor, optimised: Tensor, axes: Iterable[str] = (),
    computed_of: Iterable[torch.dtype] = (),
) -> Difference:  # fmt: skip
    """Compare one tensor. NaN agrees with NaN, an infinity with the same infinity.

    Another shape or dtype is an infinite error.  computed_of: the dtypes of what it was computed of.
    """
    axes = tuple(axes)
    if reference.shape != optimised.shape or reference.dtype != optimised.dtype:
        shapes = f"reference {tuple(reference.shape)} {reference.dtype}, optimised "
        shapes += f"{tuple(optimised.shape)} {optimised.dtype}"
        return Difference(name, kind, float("inf"), 0.0, axes=axes, shapes=shapes)
    allowed = tolerance(kind, reference.dtype, computed_of)
    a, b = reference.detach(), optimised.detach()
    if a.numel() == 0:
        return Difference(name, kind, 0.0, allowed, axes=axes)
    distance = _distance(a, b)
    worst = int(distance.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst, device="cpu"), a.shape))
    error = float(distance.flatten()[worst])
    return Difference(name, kind, error, allowed, index, axes, a[index].item(), b[index].item())


def _distance(a: Tensor, b: Tensor) -> Tensor:
    if not (a.is_floating_point() or a.is_complex()):
        return (a != b).double()
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    finite = a.abs()[torch.isfinite(a)]
    scale = float(finite.max()) if finite.numel() else 0.0
    # a tensor that is zero throughout has no scale of its own: the difference counts as it is
    distance = (a - b).abs() / (scale or 1.0)
    distance = torch.where((a == b) | (torch.isnan(a) & torch.isnan(b)), 0.0, distance)
    return torch.where(torch.isfinite(distance), distance, torch.full_like(distance, float("inf")))
