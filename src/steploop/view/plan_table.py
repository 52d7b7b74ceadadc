"""A plan as text: what runs where, one row per source line; and what it took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

_WIDEST = (26, 46, 40)  # columns: line, operations, why; the sizes end a row
_SIZES = 48  # characters of sizes


@dataclass
class Group:
    """Calls that one line of the user's leads to, in one place of the plan: products first, without views.

    names: "mm, add x2".  sizes: the factors of its products, else the shape of its last result.  why: in one hop.
    """

    line: str
    where: str
    piece: str
    ops: list[Any] = field(default_factory=list)

    @property
    def names(self) -> str:
        return counted(op.name for op in sorted(self.ops, key=lambda op: not op.product))

    @property
    def sizes(self) -> str:
        products = counted(op.product for op in self.ops if op.product)
        shapes = [op.shape for op in self.ops if op.shape.strip("()")]
        return products or (shapes[-1].partition(" (")[0] if shapes else "")

    @property
    def absorbed(self) -> bool:
        """Whether a loop's kernel does them, although they stand outside of it."""
        return not self.where.startswith("loop") and self.piece.startswith("loop")

    @property
    def why(self) -> str:
        hops = [op.hop for op in self.ops if op.hop]
        own = [hop for hop in hops if hop.partition(" ->")[0] == hop.rpartition("-> ")[2]]  # h -> ... -> h
        return (own or hops or [""])[0]


def grouped(ops: Iterable[Any]) -> list[Group]:
    """One Group per source line and place, in the order in which they run."""
    groups: dict[tuple[str, str, str], Group] = {}
    for op in ops:
        if not op.view:
            key = (op.caller, op.where, op.piece)
            groups.setdefault(key, Group(*key)).ops.append(op)
    return list(groups.values())


def counted(names: Iterable[str]) -> str:
    """ "add x2, mul" """
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(n if c == 1 else f"{n} x{c}" for n, c in counts.items())


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def computing(ops: Iterable[Any]) -> int:
    """How many calls compute something."""
    return sum(not op.view for op in ops)


def summary(plan: Any) -> str:
    """ "Tagger forward: 1 loop with 3 operations per step, 4 operations outside" """
    inside = sum(computing(loop.ops) for loop in plan.loops)
    outside = computing([*plan.before, *plan.after])
    loops = f"{plural(len(plan.loops), 'loop')} with {plural(inside, 'operation')} per step"
    return f"{plan.title}: {loops if plan.loops else 'no loop'}, {plural(outside, 'operation')} outside"


def text(plan: Any, full: bool = False) -> str:
    """The whole table, the backward plan and the times included. full: a row per call, with the whole reason."""
    plans = [p for p in (plan, plan.backward) if p is not None]
    parts = ["\n".join(_table(p, full, word)) for p, word in zip(plans, ("states", "gradients of"))]
    if plan.profile is not None:
        parts.append("\n".join(_times(plans)))
    return "\n\n".join(parts)


def _table(plan: Any, full: bool, word: str) -> list[str]:
    parts: list[tuple[str, Sequence[Any]]] = [("before", plan.before)]
    parts += [(_heading(loop, word), loop.ops) for loop in plan.loops]
    parts.append(("after", plan.after))
    rows = [(title, _every_call(ops) if full else _lines(ops)) for title, ops in parts]
    columns = zip(*(row for _, part in rows for row in part))
    widths = [min(most, max(map(len, column))) for most, column in zip(_WIDEST, columns)]
    lines = [summary(plan)]
    for title, part in rows:
        lines.append(title if part else f"{title}: nothing")
        for *cells, last in part:
            lines.append(("  " + "  ".join(f"{c:<{w}}" for c, w in zip(cells, widths)) + "  " + last).rstrip())
    for loop in plan.loops:
        lines.extend(f"loop {loop.index} not faster: {reason}" for reason in loop.reasons)
    return [*lines, *plan.notes]


def _heading(loop: Any, word: str) -> str:
    states = f"{word}: {', '.join(loop.states)}" if loop.states else "no state"
    kind = "".join(f"  ({text})" for text in (loop.kind, loop.launched) if text)
    return f"loop {loop.index}  [{loop.backend or 'not chosen'}]  {states}{kind}"


def _lines(ops: Iterable[Any]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for group in grouped(ops):
        inside = f", in {group.piece}'s kernel" if group.absorbed else ""
        names, sizes = shortened(group.names, _WIDEST[1]), shortened(group.sizes, _SIZES, "), ")
        found.append((group.line, names, group.why + inside, sizes))
    return found


def shortened(listed: str, width: int, between: str = ", ") -> str:
    """ "mm, add, ... 3 more" where a list is wider than a column."""
    if len(listed) <= width:
        return listed
    parts = listed.split(between)
    kept = 1
    while kept < len(parts) and len(between.join(parts[: kept + 1])) <= width - len(", ... 9 more"):
        kept += 1
    shown = between.join(parts[:kept]) + (between[:-2] if kept < len(parts) else "")
    return shown + (f", ... {len(parts) - kept} more" if kept < len(parts) else "")


def _every_call(ops: Iterable[Any]) -> list[tuple[str, ...]]:
    return [(op.line, op.name, op.product or op.shape, op.why) for op in ops]


def _times(plans: Sequence[Any]) -> list[str]:
    """What each piece took, and its share of forward and backward together."""
    whole = sum(plan.profile.seconds for plan in plans)
    lines = [f"time: {milliseconds(whole)} in all, the middle one of {plural(plans[0].profile.runs, 'run')}"]
    for plan in plans:
        profile = plan.profile
        names = names_of_pieces(plan)
        around = profile.seconds - sum(profile.pieces.values())
        lines.append(f"  {plan.title:<26}  {milliseconds(profile.seconds):>10}  {share(profile.seconds, whole):>4}")
        for piece, seconds in [*profile.pieces.items(), ("around", max(around, 0.0))]:
            words = "checks, packing, autograd" if piece == "around" else names.get(piece, "views")
            row = f"    {piece:<24}  {milliseconds(seconds):>10}  {share(seconds, whole):>4}  {words}"
            lines.append(row.rstrip())
    return lines


def names_of_pieces(plan: Any) -> dict[str, str]:
    """The operations that each piece runs."""
    found: dict[str, list[str]] = {}
    for op in [*plan.before, *(op for loop in plan.loops for op in loop.ops), *plan.after]:
        if not op.view:
            found.setdefault(op.piece, []).append(op.name)
    return {piece: counted(names) for piece, names in found.items()}


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole > 0 else ""
