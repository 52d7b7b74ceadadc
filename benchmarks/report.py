"""Results as JSON and Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import cases, plots, targets
from .data import HEADS, Workload
from .g2p import BATCHES as G2P_BATCHES
from .measure import paired_ratio
from .peers import PEERS

REMARKS = Path(__file__).with_name("remarks.md")
Results = list[dict[str, Any]]
Run = dict[str, Any]  # {"meta": ..., "results": [...]}
TABLES = ("lstm", "gru", "stranger", "lnlstm", "decoder", "seq2seq", "seq2seq_two_projections", "ragged")
HEADINGS = {
    "lstm": "LSTM",
    "gru": "GRU",
    "stranger": "A step that nobody wrote as a layer",
    "lnlstm": "User-written layer-norm LSTM with resets",
    "decoder": "Attention decoder with input feeding",
    "seq2seq": "EmbeddingAttentionSeq2Seq",
    "seq2seq_two_projections": "EmbeddingAttentionSeq2Seq without an output_projection",
    "ragged": "Ragged batches",
}


def write_json(run: Run, path: Path) -> None:
    """The whole run, targets included. Replaces the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({**run, "targets": targets.judge(run["results"])}, indent=1) + "\n")
    part.replace(path)


def merge(paths: list[Path]) -> Run:
    """Runs in one; a later file's jobs replace an earlier one's."""
    runs = [json.loads(path.read_text()) for path in paths]
    kept: dict[str, Results] = {}
    for run in runs:
        new: dict[str, Results] = {}
        about = {name: run["meta"].get(name) for name in ("date", "cpu", "threads", "commit")}
        for result in run["results"]:
            result.setdefault("run", about)
            new.setdefault(_job_of(result), []).append(result)
        kept |= new
    meta = dict(runs[-1]["meta"])
    dates = [run["meta"]["date"] for run in runs]
    if len(runs) > 1:
        meta["date"] = f"{min(dates)} to {max(dates)}, {len(runs)} runs"
    return {"meta": meta, "results": [result for results in kept.values() for result in results]}


def _job_of(result: dict[str, Any]) -> str:
    alone = result["peer"] if result["action"] in ("memory", "first_call") else ""
    return json.dumps([result["case"], result["work"], result["mode"], result.get("cache"), alone])


def write(run: Run, page: Path, images: Path) -> None:
    """The Markdown page and its plots."""
    page.parent.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(run["results"], images)
    page.write_text(markdown(run, [(title, _relative(path, page.parent)) for title, path in drawn]))


def _relative(path: Path, folder: Path) -> str:
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return path.name


def markdown(run: Run, images: list[tuple[str, str]]) -> str:
    """The page docs/benchmarks.md."""
    meta, results = run["meta"], run["results"]
    parts = [_head(meta), _target_table(results)]
    parts += [f"![{title}]({path})" for title, path in images]
    remarks = _remarks()
    for names, text in _sections(results):
        if text:
            parts.append("\n".join([text, *_origin([r for r in results if r["case"] in names], meta)]))
            heading = text.partition("\n")[0]
            parts += [remarks[heading]] if heading in remarks else []
    return "\n\n".join(parts) + "\n"


def _sections(results: Results) -> list[tuple[tuple[str, ...], str]]:
    """(the cases of a section, its text, "" where nothing was measured)."""
    actor = "A GRU with layer norm and two heads, with resets"
    return [
        *(((case,), _case_table(results, case)) for case in TABLES),
        (("stream",), _stream(results, "stream", "LSTM", "torch.nn", "torch.nn.LSTMCell")),
        (("actor",), _stream(results, "actor", actor, "eager", "the loop by hand")),
        (("search", "search_one_row"), _search(results)), (("search_memory",), _search_memory(results)),
        (("g2p",), _g2p(results)), (("kalman",), _kalman(results)), (("guards",), _guards(results)),
        (("matrix", "matrix_memory"), _matrix(results)),
        (("memory",), _memory(results)), (("first",), _first(results)), (("unrolled",), _unrolled(results)),
        (("grid",), _grid(results)),
    ]  # fmt: skip


def _remarks() -> dict[str, str]:
    """What people have to say about sections, by their headings."""
    parts = ("\n" + REMARKS.read_text()).split("\n## ")[1:]
    split = (part.partition("\n") for part in parts)
    return {f"## {heading}": text.strip() for heading, _, text in split}


def _origin(results: Results, meta: dict[str, Any]) -> list[str]:
    """Where and when a section was measured, if by another run than the page's."""
    runs = [r["run"] for r in results if "run" in r]
    others = [run for run in runs if any(run.get(name) != meta.get(name) for name in ("cpu", "threads", "commit"))]
    lines = dict.fromkeys(
        f"- measured {run['date']} on {run.get('cpu')}, {run.get('threads')} threads, commit {run.get('commit')}"
        for run in others
    )
    return ["", *lines] if lines else []


def _head(meta: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {v or 'not installed'}" for name, v in meta["versions"].items())
    lines = [
        "# Benchmarks",
        "",
        "Generated by `scripts/bench`; do not edit. Every number comes from runs on one machine in which the",
        "peers take turns (A B, B A, ...): a table gives medians, a ratio is the median of the ratios of the",
        "rounds, so that what else the machine does meets all alike. The peers of a table have the same",
        "weights and data, and their outputs and gradients were compared once before any was timed.",
        "`training` is a forward pass and the gradients of all parameters. A peer that is missing, or that",
        "refuses, is a blank with its reason.",
        "",
        "| | |",
        "|---|---|",
        f"| date | {meta['date']} |",
        f"| CPU | {meta['cpu']}; {meta['cores']} cores, {meta['threads']} threads used |",
        f"| memory | {meta['memory_gb']} GB |",
        f"| system | {meta['system']} |",
        f"| versions | Python {meta['python']}, {versions} |",
        f"| compiler | {meta['compiler'] or 'none'} |",
        f"| commit | {meta['commit'] or 'unknown'} |",
        f"| scale | {meta.get('scale', '')} |",
        f"| load average, start and end | {meta.get('load_start')}, {meta.get('load_end')} |",
    ]
    return "\n".join(lines)


def _target_table(results: Results) -> str:
    lines = ["## Targets", "", "| | value | target | met |", "|---|---:|---:|---|"]
    for row in targets.judge(results):
        met = {True: "yes", False: "**no**", None: "not measured"}[row["met"]]
        value = "" if row["value"] is None else f"{_number(row['value'])}{row['unit']}"
        lines.append(
            f"| {row['text']} | {value} | {row['sign']} {_number(row['limit'])}{row['unit']} | {met} |"
        )
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) and value >= 10 else f"{value:.3g}"


def best_peer(results: Results, case: str, mode: str, work: dict[str, Any] | None = None) -> str | None:
    """The fastest that is neither steploop nor a roofline."""
    fields = {"case": case, "mode": mode, **({} if work is None else {"work": work})}
    others = [r for r in targets.pick(results, **fields) if _is_peer(r["peer"])]
    return min(others, key=lambda r: r["median"])["peer"] if others else None


def _is_peer(name: str) -> bool:
    return name != "gemm" and not (name in PEERS and PEERS[name].ours)


def title_of(peer: str) -> str:
    return PEERS[peer].title if peer in PEERS else peer


def _case_table(results: Results, case: str) -> str:
    """Rows are peers, columns modes: median seconds, and the ratio to the best peer."""
    rows = [r for r in results if r["case"] == case]
    if not rows:
        return ""
    modes = [mode for mode in targets.MODE_TITLES if any(r["mode"] == mode for r in rows)]
    peers = list(dict.fromkeys(r["peer"] for r in rows))
    about = (cases.CASES[case].__doc__ or "").strip().splitlines()[0]
    lines = [f"## {HEADINGS[case]}", "", f"{about} {Workload(**rows[0]['work'])}, float32.", ""]
    lines.append(
        "| seconds (ratio to the best peer) | " + " | ".join(targets.MODE_TITLES[m] for m in modes) + " |"
    )
    lines.append("|---|" + "---:|" * len(modes))
    for peer in peers:
        cells = [_cell(results, case, mode, peer) for mode in modes]
        lines.append(f"| {_row_title(case, peer)} | " + " | ".join(cells) + " |")
    return "\n".join(lines + _footnotes(rows) + _notes(rows))


def _row_title(case: str, peer: str) -> str:
    if case == "ragged" and peer == "torch.nn":
        return "torch.nn, PackedSequence (packing and padding included)"
    return title_of(peer)


def _cell(results: Results, case: str, mode: str, peer: str) -> str:
    found = targets.pick(results, case=case, mode=mode, peer=peer)
    if not found:
        return "—"
    best = best_peer(results, case, mode)
    if best is None:
        return seconds(found[0]["median"])
    if case == "ragged":
        best = "torch.nn"
    compared = targets.ratio(results, case, mode, peer, best)
    return f"{seconds(found[0]['median'])} ({'—' if compared is None else f'{compared:.2f}'})"


def seconds(value: float) -> str:
    """Seconds with three digits, small ones in milli- or microseconds."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 0.1 or unit == "µs":
            return f"{value * factor:.3g} {unit}"
    return ""


def _footnotes(rows: Results) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        if "blank" in r:
            reasons.setdefault((r["peer"], r["blank"]), []).append(r["mode"])
    lines = [f"- {title_of(p)} ({', '.join(m)}): {_escaped(reason)}" for (p, reason), m in reasons.items()]
    return ["", "Blanks:", "", *lines] if lines else []


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _notes(rows: Results) -> list[str]:
    notes = list(dict.fromkeys((r["peer"], r["note"]) for r in rows if r.get("note")))
    return ["", *[f"- {title_of(peer)}: {_escaped(note)}" for peer, note in notes]] if notes else []


def _stream(results: Results, case: str, what: str, other: str, of_other: str) -> str:
    rows = [r for r in results if r["case"] == case]
    if not rows:
        return ""
    work = Workload(**rows[0]["work"])
    lines = ["## One streamed step" + (" of an actor-critic" if case == "actor" else ""), ""]
    lines += [f"{what}, {work}, without gradients.", ""]
    lines += [f"| | one step | ratio to {of_other} |", "|---|---:|---:|"]
    for r in (r for r in rows if "blank" not in r):
        title = of_other if r["peer"] == other else title_of(r["peer"])
        compared = targets.ratio(results, case, "forward", r["peer"], other)
        shown = "" if compared is None else f"{compared:.2f}"
        lines.append(f"| {title} | {seconds(r['median'])} | {shown} |")
    return "\n".join(lines + _footnotes(rows))


def _guards(results: Results) -> str:
    rows = [r for r in results if r["case"] == "guards" and "blank" not in r]
    if not rows:
        return ""
    lines = ["## Guards", "", "The check that a kept capture still holds, part of every call and streamed step.", ""]
    lines += ["| | call | streamed step |", "|---|---:|---:|"]
    for kind in dict.fromkeys(r["work"]["kind"] for r in rows):
        found = {r["peer"]: seconds(r["median"]) for r in rows if r["work"]["kind"] == kind}
        title = {"lstm": "LSTM", "lnlstm": "layer-norm LSTM"}.get(kind, kind)
        lines.append(f"| {title} | {found.get('call', '')} | {found.get('streamed step', '')} |")
    return "\n".join(lines)


def _search(results: Results) -> str:
    rows = [r for r in results if r["case"] in ("search", "search_one_row")]
    if not rows:
        return ""
    lines = ["## Searches", "", "Decoder with attention; the beam is 8 wide. Seconds of a whole search.", ""]
    lines += ["| | B | search | seconds | ratio to a batched loop by hand |", "|---|---:|---|---:|---:|"]
    for r in (r for r in rows if "blank" not in r):
        compared = targets.ratio(results, r["case"], r["mode"], r["peer"], "eager")
        shown = "" if compared is None else f"{compared:.2f}"
        title = "batched loop by hand" if r["peer"] == "eager" else title_of(r["peer"])
        lines.append(f"| {title} | {r['work']['B']} | {r['mode']} | {seconds(r['median'])} | {shown} |")
    return "\n".join(lines + _footnotes(rows))


def _search_memory(results: Results) -> str:
    rows = [r for r in results if r["case"] == "search_memory"]
    if not rows:
        return ""
    how = next((r["how"] for r in rows if "how" in r), "")
    lines = ["## Peak memory of a search", "", f"The same decoder, {Workload(**rows[0]['work'])}, each in a process"]
    lines += [f"of its own. What one search adds to the memory and weights: {how}.", "", "| | | MB |", "|---|---|---:|"]
    for r in (r for r in rows if "blank" not in r):
        title = "batched loop by hand" if r["peer"] == "eager" else title_of(r["peer"])
        lines.append(f"| {title} | {r['work']['kind']} | {r['bytes'] / 1e6:.0f} |")
    return "\n".join(lines + _footnotes(rows))


def _g2p(results: Results) -> str:
    rows = [r for r in results if r["case"] == "g2p"]
    if not rows:
        return ""
    lines = ["## Grapheme to phoneme", "", "The recipe's model on batches of words of like lengths: a bidirectional"]
    lines += [f"LSTM and an attention decoder with input feeding, {Workload(**rows[0]['work'])}; S and T are the"]
    lines += ["longest word's. The eager loop has nn.LSTMCell and padded batches.", ""]
    lines += ["| | | words/s | ratio to the eager loop |", "|---|---|---:|---:|"]
    for r in (r for r in rows if "blank" not in r):
        compared = targets.ratio(results, "g2p", r["mode"], r["peer"], "eager")
        shown = "" if compared is None else f"{compared:.2f}"
        words = G2P_BATCHES * r["work"]["B"] / r["median"]
        lines.append(f"| {title_of(r['peer'])} | {r['mode']} | {words:,.0f} | {shown} |")
    return "\n".join(lines + _footnotes(rows))


def _kalman(results: Results) -> str:
    rows = [r for r in results if r["case"] == "kalman"]
    if not rows:
        return ""
    lines = ["## Kalman filter", "", (cases.CASES["kalman"].__doc__ or "").strip()]
    work = Workload(**rows[0]["work"])
    about = f"{work.H} numbers of state, {work.I} measured, {work.T} steps"
    lines += [f"{about}, against a Python loop over the same step.", ""]
    lines += ["| | signals | | seconds | ratio to the loop by hand |", "|---|---:|---|---:|---:|"]
    for r in (r for r in rows if "blank" not in r):
        by_hand = targets.pick(rows, peer="eager", mode=r["mode"], work=r["work"])
        shown = f"{paired_ratio(r['times'], by_hand[0]['times']):.3f}" if by_hand else ""
        title = "the loop by hand" if r["peer"] == "eager" else title_of(r["peer"])
        lines.append(f"| {title} | {r['work']['B']} | {r['mode']} | {seconds(r['median'])} | {shown} |")
    return "\n".join(lines + _footnotes(rows))


def _matrix(results: Results) -> str:
    """A row for each step and size: seconds, ratios to the peers, and the memory that training adds."""
    rows = [r for r in results if r["case"] == "matrix"]
    if not rows:
        return ""
    lines = ["## Matrix states", "", (cases.CASES["matrix"].__doc__ or "").strip(), ""]
    lines += ["The last columns: megabytes that a training step adds; steploop, with save=\"all\", eager loop.", ""]
    lines.append("| | D | B | | steploop | / eager loop | / loop, products before | / JAX scan | MB | all | loop |")
    lines.append("|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|")
    for work, mode in dict.fromkeys((Workload(**r["work"]), r["mode"]) for r in rows):
        found = {r["peer"]: r for r in targets.pick(rows, work=work.as_dict(), mode=mode)}
        if "steploop" not in found:
            continue
        shown = [_paired(found, "steploop", other, "{:.3f}", 1) for other in ("eager", "eager-hoisted", "jax")]
        peak = {r["peer"]: r for r in targets.pick(results, case="matrix_memory", work=work.as_dict())}
        for name in ("steploop", "steploop-all", "eager"):
            shown.append(f"{peak[name]['bytes'] / 1e6:.0f}" if mode != "forward" and name in peak else "")
        cells = [work.kind, work.H // HEADS, work.B, mode, seconds(found["steploop"]["median"]), *shown]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines + _footnotes(rows))


def _memory(results: Results) -> str:
    rows = [r for r in results if r["case"] == "memory"]
    if not rows:
        return ""
    how = next((r["how"] for r in rows if "how" in r), "")
    lines = ["## Peak memory of a training step", ""]
    lines.append(
        f"Layer-norm LSTM (torch.nn: its LSTM), {Workload(**rows[0]['work'])}, each in a process of its own."
    )
    lines += [f"What one step adds to the inputs and weights: {how}.", "", "| | MB |", "|---|---:|"]
    done = [r for r in rows if "blank" not in r]
    lines += [f"| {title_of(r['peer'])} | {r['bytes'] / 1e6:.0f} |" for r in done]
    return "\n".join(lines + _footnotes(rows))


def _first(results: Results) -> str:
    rows = [r for r in results if r["case"] == "first"]
    if not rows:
        return ""
    lines = [
        "## First call",
        "",
        "Forward and backward in a new process, seconds; imports are counted only where it",
    ]
    lines += ["says so. `extra`: beyond a usual call.", ""]
    lines.append(
        "| | T | cache | first call | extra | with imports | new T, extra | new B, extra | new kernels |"
    )
    lines.append("|---|---:|---|---:|---:|---:|---:|---:|---:|")
    for r in (r for r in rows if "blank" not in r):
        values = [r["first"], r["first"] - r["steady"], r["with_imports"]]
        values += [r["new_T"] - r["usual_T"], r["new_B"] - r["usual_B"]]
        shown = " | ".join(f"{value:.2f}" for value in values)
        kind, time = r["work"]["kind"], r["work"]["T"]
        lines.append(
            f"| {title_of(r['peer'])}, {kind} | {time} | {r['cache']} | {shown} | {r['new_files']} |"
        )
    return "\n".join(lines + _footnotes(rows))


def _unrolled(results: Results) -> str:
    rows = [r for r in results if r["case"] == "unrolled"]
    if not rows:
        return ""
    lines = [
        "## torch.compile of the whole loop",
        "",
        "Layer-norm LSTM: it unrolls the steps. First forward and",
    ]
    lines += [
        "backward in a new process with a cold cache, without imports.",
        "",
        "| T | | first call |",
        "|---:|---|---:|",
    ]
    for r in rows:
        shown = f"{r['first']:.1f} s" if "blank" not in r else _escaped(r["blank"])
        lines.append(f"| {r['work']['T']} | {title_of(r['peer'])} | {shown} |")
    return "\n".join(lines)


def _grid(results: Results) -> str:
    rows = [r for r in results if r["case"] == "grid"]
    if not rows:
        return ""
    lines = [
        "## Grid",
        "",
        "LSTM with I = H: steploop's time over torch.nn's, and steploop's share of the roofline.",
        "",
    ]
    lines += ["| B | T | H | forward | share | training | share |", "|---:|---:|---:|---:|---:|---:|---:|"]
    for work in _unique([r["work"] for r in rows]):
        cells = []
        for mode in ("forward", "training"):
            by = {r["peer"]: r for r in targets.pick(rows, work=work, mode=mode)}
            cells.append(_paired(by, "steploop", "torch.nn", "{:.2f}", 1))
            cells.append(_paired(by, "gemm", "steploop", "{:.0f} %", 100))
        lines.append(f"| {work['B']} | {work['T']} | {work['H']} | " + " | ".join(cells) + " |")
    skipped = _unique([{"work": str(Workload(**r["work"])), "why": r["blank"]} for r in rows if "blank" in r])
    if skipped:
        lines += ["", "Blanks:", "", *[f"- {s['work']}: {_escaped(s['why'])}" for s in skipped]]
    return "\n".join(lines)


def _paired(by: dict[str, Any], a: str, b: str, form: str, factor: float) -> str:
    if a not in by or b not in by:
        return "—"
    return form.format(factor * paired_ratio(by[a]["times"], by[b]["times"]))


def _unique(items: list[Any]) -> list[Any]:
    return [item for index, item in enumerate(items) if item not in items[:index]]
