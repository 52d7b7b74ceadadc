"""Plots of a run: time over the best peer's, share of the roofline, the grid. None without matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import targets

Results = list[dict[str, Any]]
CASES = ("lstm", "gru", "stranger", "lnlstm", "decoder")
SHORT = {"forward": "forward", "training": "training", "training_x": "training + dx"}
COLOURS = {"forward": "#4c78a8", "training": "#f58518", "training_x": "#b279a2"}


def draw(results: Results, folder: Path) -> list[tuple[str, Path]]:
    """Writes the plots for which there are results; (title, path) of each."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, title, plot in (
        ("ratio", "steploop's time over the best peer's", _ratios),
        ("roofline", "Share of the measured GEMM roofline", _roofline),
        ("grid", "LSTM: steploop's time over torch.nn's", _grid),
    ):
        figure = plot(results, pyplot)
        if figure is not None:
            figure.suptitle(title)
            path = folder / f"benchmarks-{name}.png"
            figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
            pyplot.close(figure)
            drawn.append((title, path))
    return drawn


def _bars(axes: Any, groups: dict[str, dict[str, float]]) -> None:
    """Grouped bars: {group: {series: value}}."""
    series = [name for name in SHORT if any(name in values for values in groups.values())]
    width = 0.8 / max(1, len(series))
    for index, name in enumerate(series):
        at = [
            (x + (index - (len(series) - 1) / 2) * width, v[name])
            for x, v in enumerate(groups.values())
            if name in v
        ]
        bars = axes.bar([x for x, _ in at], [y for _, y in at], width, label=SHORT[name], color=COLOURS[name])
        axes.bar_label(bars, fmt="%.2g", fontsize=7)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.legend(fontsize=8)


def _ratios(results: Results, pyplot: Any) -> Any:
    from .report import best_peer, title_of

    groups: dict[str, dict[str, float]] = {}
    for case in CASES:
        found, best_names = {}, []
        for mode in SHORT:
            best = best_peer(results, case, mode)
            value = targets.ratio(results, case, mode, "steploop", best) if best else None
            if value is not None:
                found[mode] = value
                best_names.append(title_of(best))
        if found:
            groups[case + "\nbest: " + "\n".join(dict.fromkeys(best_names))] = found
    if not groups:
        return None
    figure, axes = pyplot.subplots(figsize=(2.2 * len(groups) + 2, 4))
    _bars(axes, groups)
    axes.axhline(1.0, color="grey", linewidth=1)
    axes.set_ylabel("time / best peer's (lower is better)")
    axes.tick_params(axis="x", labelsize=7)
    return figure


def _roofline(results: Results, pyplot: Any) -> Any:
    from .report import title_of

    groups: dict[str, dict[str, float]] = {}
    for case in ("lstm", "gru"):
        for peer in ("steploop", "torch.nn", "jax", "keras", "eager"):
            shares = {mode: targets.share(results, case, mode, peer) for mode in SHORT}
            found = {mode: value for mode, value in shares.items() if value is not None}
            if found:
                groups[f"{case}\n{title_of(peer)}"] = found
    if not groups:
        return None
    figure, axes = pyplot.subplots(figsize=(1.1 * len(groups) + 2, 4))
    _bars(axes, groups)
    axes.set_ylim(0, 105)
    axes.set_ylabel("% of the roofline (higher is better)")
    axes.tick_params(axis="x", labelsize=7)
    return figure


def _grid(results: Results, pyplot: Any) -> Any:
    points = targets.grid_points(results)
    if not points:
        return None
    modes = list(dict.fromkeys(mode for _, mode, _ in points))
    sizes = {axis: sorted({work[axis] for work, _, _ in points}) for axis in "BTH"}
    shape = len(modes), len(sizes["H"])
    figure, panels = pyplot.subplots(*shape, figsize=(2.6 * shape[1] + 1, 2.8 * shape[0]), squeeze=False)
    for row, mode in enumerate(modes):
        for column, hidden in enumerate(sizes["H"]):
            here = {(w["B"], w["T"]): r for w, m, r in points if m == mode and w["H"] == hidden}
            _heat(panels[row][column], here, sizes["B"], sizes["T"])
            panels[row][column].set_title(f"{mode}, H={hidden}", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.95))  # below the title
    return figure


def _heat(axes: Any, values: dict[tuple[int, int], float], batches: list[int], times: list[int]) -> None:
    table = [[values.get((batch, time), float("nan")) for time in times] for batch in batches]
    axes.imshow(table, cmap="RdYlGn_r", vmin=0.2, vmax=1.8, aspect="auto")
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.2f}" if value == value else "—", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(times)), times, fontsize=8)
    axes.set_yticks(range(len(batches)), batches, fontsize=8)
    axes.set_xlabel("T", fontsize=8)
    axes.set_ylabel("B", fontsize=8)
