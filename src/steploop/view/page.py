"""A plan as one HTML page: three lanes, before, loops and after, and the user's source beside them.

The page is whole without its script, which only lights up what belongs together. Every text of the user's goes through
`escape`; there is nothing else that could become markup.
"""

from __future__ import annotations

import io
import keyword
import re
import tokenize
from collections.abc import Iterable
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .plan_table import Group, computing, grouped, milliseconds, plural, share

_HERE = Path(__file__).parent
_LANES = ("before", "inloop", "after")
_COLOURS = {"before": "var(--before)", "inloop": "var(--loop)", "after": "var(--after)"}


def render(plan: dict[str, Any]) -> str:
    """The page of a plan given as `Plan.to_dict()`."""
    plans = [("forward", plan)] + ([("backward", plan["backward"])] if plan["backward"] else [])
    title = plan["title"].removesuffix(" forward")
    whole = sum(p["profile"]["seconds"] for _, p in plans) if plan["profile"] else 0.0
    tabs = "".join(
        f"<button role=tab data-shows={name} aria-selected={'true' if i == 0 else 'false'}>{name}</button>"
        for i, (name, _) in enumerate(plans)
    )
    bodies = "".join(_plan(name, p, whole, hidden=i > 0) for i, (name, p) in enumerate(plans))
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{escape(title)}: plan</title><style>{_file('page.css')}</style><main>"
        f"<header><h1>{escape(title)}</h1><span class=say>{_summary(plan)}</span>"
        f"<div class=tabs role=tablist>{tabs}</div><button class=theme title='light or dark'>&#9680;</button></header>"
        f"{_times(plans, whole)}{bodies}</main><script>{_file('page.js')}</script></html>"
    )


def in_a_frame(plan: dict[str, Any]) -> str:
    """The page inside another one, a notebook's."""
    return (
        f'<iframe srcdoc="{escape(render(plan))}" style="width:100%;height:36rem;border:0;border-radius:12px" '
        'sandbox="allow-scripts"></iframe>'
    )


def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _summary(plan: dict[str, Any]) -> str:
    inside = sum(computing(_ops(loop["ops"])) for loop in plan["loops"])
    outside = computing(_ops([*plan["before"], *plan["after"]]))
    per_step = f"{plural(inside, 'operation')} at every step" if plan["loops"] else "no loop"
    return f"{per_step}, {outside} for all steps at once"


def _ops(ops: Iterable[dict[str, Any]]) -> list[Any]:
    return [SimpleNamespace(**op) for op in ops]


def _plan(name: str, plan: dict[str, Any], whole: float, hidden: bool) -> str:
    spent = plan["profile"]["pieces"] if plan["profile"] else {}
    before, after = grouped(_ops(plan["before"])), grouped(_ops(plan["after"]))
    loops = [(loop, grouped(_ops(loop["ops"]))) for loop in plan["loops"]]
    went: dict[tuple[int, int], set[str]] = {}
    for lane, groups in (("before", before), ("inloop", [g for _, gs in loops for g in gs]), ("after", after)):
        for place in (tuple(p) for group in groups for op in group.ops for p in op.places):
            went.setdefault(place, set()).add(lane)
    text = _Text(plan["sources"], spent, whole)
    states = "carries" if name == "forward" else "carries the gradient of"
    lanes = (
        _lane("before", "Before", text, "".join(text.card(g, "before") for g in before)),
        _lane("inloop", "Loops", text, "".join(text.loop(loop, groups, states) for loop, groups in loops)),
        _lane("after", "After", text, "".join(text.card(g, "after") for g in after)),
    )
    notes = "".join(f"<p class=note>{escape(note)}</p>" for note in plan["notes"])
    own = [source for source in plan["sources"] if not source["library"]]
    order = sorted(range(len(plan["sources"])), key=lambda i: plan["sources"][i]["library"])
    sources = "".join(_source(i, plan["sources"][i], went, folded=bool(own)) for i in order)
    return (
        f"<section class=plan id={name}{' hidden' if hidden else ''}><div class=sources>{sources}</div>"
        f"<div><div class=lanes>{''.join(lanes)}</div>{notes}</div></section>"
    )


def _lane(lane: str, title: str, text: _Text, cards: str) -> str:
    says = "step by step" if lane == "inloop" else "once, for all steps together"
    took = text.took(*(piece for piece in text.spent if _lane_of(piece) == lane))
    inside = cards or "<p class=nothing>nothing</p>"
    return (
        f"<section class='lane {lane}'><h2>{title}{took}<small>{says}</small></h2>"
        f"<div class=cards>{inside}</div></section>"
    )


class _Text:
    """Cards and loops of one plan, with its sources and times at hand."""

    def __init__(self, sources: list[dict[str, Any]], spent: dict[str, float], whole: float):
        self.sources, self.spent, self.whole = sources, spent, whole

    def card(self, group: Group, lane: str) -> str:
        """The calls that one source line makes at one place."""
        places = [p for op in group.ops for p in op.places]
        places.sort(key=lambda place: self.sources[place[0]]["library"])  # the user's own line first
        at = " ".join(dict.fromkeys(f"{source}:{line}" for source, line in places))
        why = group.why
        where = f"in the kernel of {escape(group.piece)}, many steps at a time"
        also = f"<div class=why>{where}</div>" if group.absorbed else ""
        words = "why hop" if lane == "inloop" else "why"
        more = "".join(
            f"<li><b>{escape(op.name)}</b> {escape(op.product or op.shape)} <i>{escape(op.line)}</i>"
            f"{_whole_way(op.why)}"
            for op in group.ops
        )
        line = escape(group.line) or "sums of gradients"
        return (
            f'<div class="card {lane}" role=button tabindex=0 aria-pressed=false data-at="{at}">'
            f"<div class=at>{line}</div><div class=ops>{_times_of(group.names)}</div>"
            f"<div class=sz>{_sizes(group.sizes)}</div><div class='{words}'>{_arrows(why)}</div>{also}"
            f"<ul class=more>{more}</ul></div>"
        )

    def loop(self, loop: dict[str, Any], groups: list[Group], carries: str) -> str:
        states = ", ".join(f"<code>{escape(s)}</code>" for s in loop["states"]) or "no state"
        kind = "".join(f" &middot; {escape(text)}" for text in (loop["kind"], loop["launched"]) if text)
        reasons = "".join(f"<p class=note>not faster: {escape(reason)}</p>" for reason in loop["reasons"])
        took = self.took(f"loop {loop['index']}")
        runs = escape(loop["backend"]) + kind + (f" &middot; {took}" if took else "")
        return (
            f"<section class='loop inloop'><h3>&#8635; loop {loop['index']}<span>{runs}</span></h3>"
            f"<div class=states>{carries} {states}</div>"
            f"<div class=cards>{''.join(self.card(g, 'inloop') for g in groups)}</div>{reasons}"
            f"{_kernel(loop['kernel'])}</section>"
        )

    def took(self, *pieces: str) -> str:
        if not any(piece in self.spent for piece in pieces):
            return ""
        seconds = sum(self.spent.get(piece, 0.0) for piece in pieces)
        return f"<span class=spent>{milliseconds(seconds)}, {share(seconds, self.whole)}</span>"


def _whole_way(why: str) -> str:
    if "<-" not in why:
        return ""
    return f"<details><summary>the whole way</summary>{escape(why).replace('&lt;-', '&larr;')}</details>"


def _kernel(text: str) -> str:
    if not text:
        return ""
    lines = plural(text.count("\n"), "line")
    return f"<details class=kernel><summary>source of its kernel, {lines}</summary><pre>{escape(text)}</pre></details>"


def _arrows(text: str) -> str:
    return escape(text).replace("-&gt;", "&rarr;")


def _sizes(text: str) -> str:
    return _times_of(text).replace("*", "&middot;").replace("), (", "),<br>(").replace("</span>, (", "</span>,<br>(")


def _times_of(text: str) -> str:
    """With "x2" as a sign."""
    return re.sub(r" x(\d+)\b", r" <span class=n>&times;\1</span>", escape(text))


# -- times -----------------------------------------------------------------------------------------------------


def _times(plans: list[tuple[str, dict[str, Any]]], whole: float) -> str:
    """A bar for each pass, as long as its share of both."""
    rows = []
    for name, plan in plans if whole else ():
        profile = plan["profile"]
        around = max(0.0, profile["seconds"] - sum(profile["pieces"].values()))
        parts = [*profile["pieces"].items(), ("around", around)]
        bar = "".join(
            f'<i class={_lane_of(piece)} style="width:{100 * seconds / whole:.3f}%" '
            f'title="{escape(piece)}: {milliseconds(seconds)}, {share(seconds, whole)}"></i>'
            for piece, seconds in parts
        )
        took = f"<b>{milliseconds(profile['seconds'])}</b> {share(profile['seconds'], whole)}"
        rows.append(f"<span>{name}</span><span>{took}</span><div class=bar>{bar}</div>")
    key = "<i class=before></i> before <i class=inloop></i> loops <i class=after></i> after <i class=around></i> around"
    return f"<div class=time>{''.join(rows)}<span></span><span></span><div class=key>{key}</div></div>" if rows else ""


def _lane_of(piece: str) -> str:
    if piece.startswith("loop"):
        return "inloop"
    return "after" if piece.startswith("after") else "around" if piece == "around" else "before"


# -- the user's source -----------------------------------------------------------------------------------------


def _source(number: int, source: dict[str, Any], went: dict[tuple[int, int], set[str]], folded: bool) -> str:
    marks = _marked(source["lines"])
    rows = []
    for i, text in enumerate(marks):
        line = source["first"] + i
        if text is None:
            continue
        lanes = [lane for lane in _LANES if lane in went.get((number, line), ())]
        slots = "".join(f"<i class='{lane}{' on' if lane in lanes else ''}'></i>" for lane in _LANES)
        colours, extra = "", ""
        if lanes:
            colours = f' style="--c1:{_COLOURS[lanes[0]]};--c2:{_COLOURS[lanes[-1]]}"'
            extra = f' data-at="{number}:{line}" role=button tabindex=0 aria-pressed=false'
        rows.append(
            f"<div class=ln{extra}{colours}><span class=no>{line}</span><span class=slots>{slots}</span>"
            f"<span class=tx>{text}</span></div>"
        )
    shown = "" if folded and source["library"] else " open"
    name = f"<b>{escape(source['name'])}</b> " if source["name"] else ""
    return (
        f"<details class=source{shown}><summary>{name}{escape(source['file'])}</summary>"
        f"<div class=code>{''.join(rows)}</div></details>"
    )


def _marked(lines: list[str]) -> list[str | None]:
    """Escaped lines without their common indentation, with keywords, strings and comments marked.

    None for all but the first line of a text over several lines: a docstring.
    """
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    plain = [line[indent:] for line in lines]
    spans: dict[int, list[tuple[int, int, str]]] = {}
    inside: set[int] = set()
    try:
        for token in tokenize.generate_tokens(io.StringIO("\n".join(plain) + "\n").readline):
            kind = {tokenize.COMMENT: "w", tokenize.STRING: "s"}.get(token.type, "")
            if token.type == tokenize.NAME and keyword.iskeyword(token.string):
                kind = "k"
            if kind == "s":
                inside.update(range(token.start[0] + 1, token.end[0] + 1))
            for row in range(token.start[0], token.end[0] + 1) if kind else ():
                begin = token.start[1] if row == token.start[0] else 0
                end = token.end[1] if row == token.end[0] else len(plain[row - 1])
                spans.setdefault(row, []).append((begin, end, kind))
    except (tokenize.TokenError, IndentationError, SyntaxError):
        spans, inside = {}, set()
    return [None if i in inside else _with_spans(line, spans.get(i, [])) for i, line in enumerate(plain, 1)]


def _with_spans(line: str, spans: list[tuple[int, int, str]]) -> str:
    parts, at = [], 0
    for begin, end, kind in spans:
        parts.append(f"{escape(line[at:begin])}<span class={kind}>{escape(line[begin:end])}</span>")
        at = end
    return "".join(parts) + escape(line[at:])
