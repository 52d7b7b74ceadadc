"""Which character model is better, and do more layers help?  A sweep, each model with the same budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib import pyplot
from rich.console import Console
from rich.table import Table

from .charlm import Shape, bits
from .charlm_training import CharTraining, Settings, fit

# Two runs that differ in nothing but their seed differ by about this much (nats per character).
NOISE = 0.01


@dataclass(frozen=True)
class Outcome:
    """What one model of the sweep reached."""

    shape: Shape
    parameters: int
    history: list[dict[str, float]]

    @property
    def nats(self) -> float:
        """The lowest validation loss of the run, nats per character."""
        return min(entry["val_nats"] for entry in self.history)

    @property
    def speed(self) -> float:
        """Characters per second of training."""
        return self.history[-1]["characters"] / self.history[-1]["training_seconds"]

    @property
    def name(self) -> str:
        return f"{self.shape.layers} x {self.shape.units}"


def compare(
    text: str,
    base: Shape,
    layers: Sequence[int],
    units: Sequence[int],
    settings: Settings,
    folder: Path,
    *,
    overwrite: bool,
    console: Console,
) -> list[Outcome]:
    """Train each combination into a folder of its own, then print the table and draw compare.png."""
    outcomes = []
    for shape in [replace(base, layers=n, units=h) for h in units for n in layers]:
        console.rule(str(shape), align="left")
        module = fit(text, shape, settings, folder / name(shape), overwrite=overwrite, console=console)
        outcomes.append(outcome(module))
    console.print(table(outcomes))
    console.print(verdict(outcomes), soft_wrap=True, highlight=False)
    draw(outcomes, folder / "compare.png")
    return outcomes


def name(shape: Shape) -> str:
    """The folder of one model: '2x256-gru'."""
    return f"{shape.layers}x{shape.units}-{shape.cell}"


def outcome(module: CharTraining) -> Outcome:
    return Outcome(module.shape, sum(p.numel() for p in module.parameters()), module.history)


def table(outcomes: Sequence[Outcome]) -> Table:
    """One row per model, the best first."""
    rows = Table("layers x units", title=f"{outcomes[0].shape.cell.upper()}, by validation loss")
    for column in ("parameters", "nats/char", "bits/char", "chars/s", "characters read"):
        rows.add_column(column, justify="right")
    for one in sorted(outcomes, key=lambda one: one.nats):
        rows.add_row(
            one.name,
            f"{one.parameters:,}",
            f"{one.nats:.4f}",
            f"{bits(one.nats):.4f}",
            f"{one.speed:,.0f}",
            f"{one.history[-1]['characters']:,}",
        )
    return rows


def verdict(outcomes: Sequence[Outcome]) -> str:
    """In one sentence: which model is better, and whether more layers helped."""
    best = min(outcomes, key=lambda one: one.nats)
    return (
        f"{best.name} is the best with {best.nats:.3f} nats per character; {did_layers_help(outcomes, best)}."
    )


def did_layers_help(outcomes: Sequence[Outcome], best: Outcome) -> str:
    """Judged at the best model's number of units: the shallowest model against the best deeper one."""
    same = sorted(
        (one for one in outcomes if one.shape.units == best.shape.units), key=lambda one: one.shape.layers
    )
    if len(same) < 2:
        return "one depth says nothing about whether more layers help"
    shallow, deep = same[0], min(same[1:], key=lambda one: one.nats)
    gain = shallow.nats - deep.nats
    seen = (
        f"at {best.shape.units} units {count(shallow)} reach{'es' if shallow.shape.layers == 1 else ''} "
        f"{shallow.nats:.3f} and {count(deep)} {deep.nats:.3f}"
    )
    if abs(gain) < NOISE:
        return f"more layers made no difference that this budget can show ({seen})"
    return f"more layers {'helped' if gain > 0 else 'did not help within this budget'} ({seen})"


def count(one: Outcome) -> str:
    return f"{one.shape.layers} layer{'s' if one.shape.layers > 1 else ''}"


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Left: each model's validation loss while it reads. Right: where it ended, over the number of layers."""
    figure, (curves, ends) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for one in outcomes:
        curves.plot(
            [entry["characters"] / 1e6 for entry in one.history],
            [entry["val_nats"] for entry in one.history],
            "o-",
            markersize=3,
            label=one.name,
        )
    curves.set_xlabel("characters read (millions)")
    curves.set_ylabel("validation loss (nats per character)")
    curves.legend(title="layers x units")
    for units in sorted({one.shape.units for one in outcomes}):
        same = sorted((one for one in outcomes if one.shape.units == units), key=lambda one: one.shape.layers)
        ends.plot(
            [one.shape.layers for one in same], [one.nats for one in same], "o-", label=f"{units} units"
        )
    ends.set_xticks(sorted({one.shape.layers for one in outcomes}))
    ends.set_xlabel("layers")
    ends.set_ylabel("lowest validation loss (nats per character)")
    ends.legend()
    for axes in (curves, ends):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
