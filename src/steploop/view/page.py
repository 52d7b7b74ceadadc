"""A plan as one HTML page."""

from __future__ import annotations

from html import escape
from typing import Any

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; color: #1a1a1a; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
section { border-left: 4px solid #b8c4d0; padding: 0 0 0 1rem; margin: 1rem 0; }
section.loop { border-color: #d9822b; background: #fff8f0; }
table { border-collapse: collapse; width: 100%; }
td { padding: .15rem .8rem .15rem 0; vertical-align: top; font-family: ui-monospace, monospace; font-size: 12.5px; }
td.why { color: #555; } .note { color: #555; }
"""


def render(plan: dict[str, Any]) -> str:
    """The page of a plan given as `Plan.to_dict()`."""
    parts = [_plan(plan, "Forward")]
    if plan["backward"] is not None:
        parts.append(_plan(plan["backward"], "Backward"))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(plan['title'])}</title>"
        f"<style>{_STYLE}</style><h1>{escape(plan['title'])}</h1>{''.join(parts)}</html>"
    )


def _plan(plan: dict[str, Any], heading: str) -> str:
    parts = [f"<h2>{heading}</h2>", _section("Before the loops", "outside", plan["before"], "")]
    for loop in plan["loops"]:
        states = ", ".join(loop["states"]) or "none"
        note = f"runs on {loop['backend']}; states: {states}. " + " ".join(loop["reasons"])
        parts.append(_section(f"Loop {loop['index']}", "loop", loop["ops"], note))
    parts.append(_section("After the loops", "outside", plan["after"], ""))
    parts += [f"<p class=note>{escape(note)}</p>" for note in plan["notes"]]
    return "".join(parts)


def _section(title: str, kind: str, ops: list[dict[str, Any]], note: str) -> str:
    rows = "".join(
        f"<tr><td>{escape(o['name'])}<td>{escape(o['line'])}<td>{escape(o['shape'])}<td class=why>{escape(o['why'])}"
        for o in ops
    )
    body = f"<table>{rows}</table>" if rows else "<p class=note>nothing</p>"
    remark = f"<p class=note>{escape(note)}</p>" if note else ""
    return f"<section class={kind}><h3>{escape(title)}</h3>{remark}{body}</section>"
