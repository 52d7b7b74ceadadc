"""Where a decoder looked: the weights of an attention as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from ..errors import InputError, describe, message

_INCHES = 0.34  # per label
_MOST = 60  # labels along an axis that are all written; of more, some are


def alignment(
    weights: Any,
    source: Sequence[Any] | None = None,
    target: Sequence[Any] | None = None,
    *,
    row: int | None = None,
    source_length: int | None = None,
    target_length: int | None = None,
    title: str = "",
    path: str | PathLike[str] | None = None,
    axes: Any = None,
) -> Any:
    """A picture of the weights of an attention: one line per target step, one column per entry of the memory.

        (scores, weights), _ = decoder(labels, memory=memory, memory_lengths=lengths)      # weights (T, B, S)
        sl.view.alignment(weights, source=words, target=translation, row=0, path="alignment.png")

    weights: (T, S); (T, heads, S): one picture per head; or, with row=, (T, B, S) or (T, B, heads, S), as a loop
             gives them. A tensor or an array.
    source:  S labels, or fewer: the columns after the last label are padding, and left out. Anything that str() shows.
    target:  T labels, or fewer, in the same way.
    source_length, target_length: how many columns and lines, without labels.
    title:   over the picture.  path: where to save it; the ending says in which format (png, pdf, svg, ...).
    axes:    a matplotlib Axes to draw on, for one picture.

    Returns the matplotlib Figure. Needs matplotlib (`pip install matplotlib`).
    Raises InputError for weights of another shape, and for more labels than there are weights.
    """
    heads = _cut(_as_array(weights, row), source, target, source_length, target_length)
    if axes is not None and len(heads) > 1:
        raise InputError(
            message(
                "alignment: one Axes holds one head.",
                expected="weights of one head: weights[:, :, head]",
                found=f"{len(heads)} heads",
            )
        )
    figure, places = (axes.figure, [axes]) if axes is not None else _figure(heads, title)
    for number, (place, head) in enumerate(zip(places, heads, strict=True)):
        image = place.imshow(head, cmap="Greys", vmin=0.0, vmax=max(1.0, float(head.max(initial=0.0))), aspect="auto")
        _label(place.xaxis, source, head.shape[1], rotation=90 if source is not None else 0)
        _label(place.yaxis, target, head.shape[0])
        place.set_xlabel("source" if source is None else "")
        place.set_ylabel("target" if target is None and number == 0 else "")
        place.set_title(f"head {number}" if len(heads) > 1 else title if axes is not None else "", fontsize=10)
    if axes is None:
        figure.colorbar(image, ax=places, shrink=0.8, pad=0.02, label="weight")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _as_array(weights: Any, row: int | None) -> Any:
    """(T, heads, S) as NumPy floats."""
    import numpy as np

    found = weights
    if hasattr(weights, "detach"):
        found = weights.detach().cpu().float()
    found = np.asarray(found, dtype=np.float64)
    if row is not None and found.ndim in (3, 4):
        if not -found.shape[1] <= row < found.shape[1]:
            raise InputError(message(f"alignment: there is no row {row}.", found=f"{found.shape[1]} rows"))
        found = found[:, row]
    elif row is not None:
        found = found[None, None, None, None]  # the message below
    if found.ndim == 2:
        found = found[:, None]
    if found.ndim != 3:
        raise InputError(
            message(
                "alignment: the weights are those of one sequence.",
                expected="(T, S) or (T, heads, S); with row=, (T, B, S) or (T, B, heads, S)",
                found=describe(weights) + ("" if row is None else f", row={row}"),
                fix="alignment(weights, row=0)" if row is None else "leave out row=",
            )
        )
    return found


def _cut(weights: Any, source: Any, target: Any, source_length: int | None, target_length: int | None) -> list[Any]:
    """One (T', S') per head, without padding."""
    sizes = []
    for name, labels, length, size in (
        ("target", target, target_length, weights.shape[0]),
        ("source", source, source_length, weights.shape[2]),
    ):
        wanted = int(length) if length is not None else len(labels) if labels is not None else size
        if wanted > size or (labels is not None and len(labels) > size):
            raise InputError(
                message(
                    f"alignment: more {name} labels than weights.",
                    expected=f"at most {size}",
                    found=f"{max(wanted, len(labels or ()))}",
                )
            )
        sizes.append(wanted)
    return [weights[: sizes[0], head, : sizes[1]] for head in range(weights.shape[1])]


def _figure(heads: list[Any], title: str) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            message(
                "sl.view.alignment draws with matplotlib, which is not installed.",
                fix="pip install matplotlib",
            )
        ) from None
    lines, columns = heads[0].shape
    width = min(max(2.2, _INCHES * columns + 1.0), 12.0) * len(heads) + 1.0
    height = min(max(2.2, _INCHES * lines + 1.4), 12.0)
    figure = Figure(figsize=(min(width, 24.0), height), layout="constrained")
    places = figure.subplots(1, len(heads), squeeze=False)[0]
    if title:
        figure.suptitle(title)
    return figure, list(places)


def _label(axis: Any, labels: Sequence[Any] | None, size: int, rotation: float = 0) -> None:
    step = -(-size // _MOST) if size else 1
    if labels is None:
        axis.get_major_locator().set_params(integer=True)
        return
    places = range(0, min(len(labels), size), step)
    axis.set_ticks(list(places), [str(labels[place]) for place in places], rotation=rotation)
