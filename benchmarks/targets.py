"""The targets: what is compared, the limit, and whether it is met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .data import DEEP, FIRST_SEARCHES, MATRIX
from .measure import paired_ratio

Results = list[dict[str, Any]]
MODE_TITLES = {
    "forward": "forward",
    "training": "training",
    "training_x": "training, with the gradient of the input",
}


@dataclass(frozen=True)
class Target:
    """A value from results, and its limit: at most, or at least where `least`."""

    text: str
    limit: float
    value: Callable[[Results], float | None]
    least: bool = False
    unit: str = "x"

    def judge(self, results: Results) -> dict[str, Any]:
        """Text, value (None: not measured), limit, and met: True, False or None."""
        value = self.value(results)
        met = None if value is None else (value >= self.limit if self.least else value <= self.limit)
        sign = ">=" if self.least else "<="
        return {
            "text": self.text, "value": value, "limit": self.limit, "sign": sign, "unit": self.unit,
            "met": met,
        }  # fmt: skip


def pick(results: Results, **fields: Any) -> Results:
    """Results with these fields that have a value."""
    return [r for r in results if "blank" not in r and all(r.get(k) == v for k, v in fields.items())]


def ratio(results: Results, case: str, mode: str, ours: str, theirs: str) -> float | None:
    """Paired ratio of two peers of one job, or None where one is blank."""
    found = pick(results, case=case, mode=mode)
    times = {r["peer"]: r["times"] for r in found}
    return paired_ratio(times[ours], times[theirs]) if ours in times and theirs in times else None


def _ratio(case: str, mode: str, theirs: str, ours: str = "steploop") -> Callable[[Results], float | None]:
    return lambda results: ratio(results, case, mode, ours, theirs)


def grid_points(results: Results, theirs: str = "torch.nn") -> list[tuple[dict[str, Any], str, float]]:
    """(work, mode, steploop's time over the other's) of every measured point of the grid."""
    points = []
    for ours in pick(results, case="grid", peer="steploop"):
        for other in pick(results, case="grid", peer=theirs, work=ours["work"], mode=ours["mode"]):
            points.append((ours["work"], ours["mode"], paired_ratio(ours["times"], other["times"])))
    return points


def _worst_on_grid(least_hidden: int) -> Callable[[Results], float | None]:
    def value(results: Results) -> float | None:
        return max((r for work, _, r in grid_points(results) if work["H"] >= least_hidden), default=None)

    return value


def share(results: Results, case: str, mode: str, peer: str = "steploop") -> float | None:
    """Roofline time over the peer's, in percent."""
    found = ratio(results, case, mode, "gemm", peer)
    return None if found is None else 100 * found


def _share(mode: str) -> Callable[[Results], float | None]:
    return lambda results: share(results, "lstm", mode)


def _least_share_on_grid(mode: str) -> Callable[[Results], float | None]:
    def value(results: Results) -> float | None:
        points = [p for p in grid_points(results, "gemm") if p[1] == mode]
        return min((100 / r for work, _, r in points if work["H"] >= 126 and work["B"] >= 64), default=None)

    return value


def _first(cache: str, kind: str = "") -> Callable[[Results], float | None]:
    """Seconds of the first call of a model of several layers, or the most among single steps."""

    def value(results: Results) -> float | None:
        found = pick(results, case="first", peer="steploop", cache=cache)
        known = (*DEEP, "decoder", *FIRST_SEARCHES)
        found = [r for r in found if (r["work"]["kind"] if r["work"]["kind"] in known else "") == kind]
        return max((r["first"] for r in found), default=None)

    return value


def _growth_with_time(results: Results) -> float | None:
    """First call less a usual call, longest T over shortest: the largest over steps and caches."""
    extras: dict[tuple[str, str], dict[int, float]] = {}
    for r in pick(results, case="first", peer="steploop"):
        extras.setdefault((r["work"]["kind"], r["cache"]), {})[r["work"]["T"]] = r["first"] - r["steady"]
    grown = [e[max(e)] / e[min(e)] for e in extras.values() if len(e) > 1]
    return max(grown, default=None)


def _compiled_anew(results: Results) -> float | None:
    return max((r["new_files"] for r in pick(results, case="first", peer="steploop")), default=None)


def bytes_of(results: Results, peer: str) -> float | None:
    found = pick(results, case="memory", peer=peer)
    return found[0]["bytes"] if found else None


def _memory(ours: str, theirs: str) -> Callable[[Results], float | None]:
    def value(results: Results) -> float | None:
        a, b = bytes_of(results, ours), bytes_of(results, theirs)
        return a / b if a is not None and b else None

    return value


def _search_memory(results: Results) -> float | None:
    """Of steploop's beam search 8 wide, over one 1 wide."""
    found = {r["work"]["kind"]: r["bytes"] for r in pick(results, case="search_memory", peer="steploop")}
    wide, narrow = found.get("beam search"), found.get("beam search of 1")
    return wide / narrow if wide and narrow else None


def _guards(what: str) -> Callable[[Results], float | None]:
    def value(results: Results) -> float | None:
        found = [r["median"] for r in pick(results, case="guards", peer=what) if r["work"]["kind"] == "lstm"]
        return 1e6 * found[0] if found else None

    return value


def _kalman(rows: int) -> Callable[[Results], float | None]:
    def value(results: Results) -> float | None:
        ratios = []
        for ours in pick(results, case="kalman", peer="steploop", mode="training"):
            if (ours["work"]["B"] > 1) == (rows > 1):
                others = pick(results, case="kalman", peer="eager", mode="training", work=ours["work"])
                ratios += [paired_ratio(ours["times"], other["times"]) for other in others]
        return max(ratios, default=None)

    return value


def _matrix(kind: str, mode: str) -> Callable[[Results], float | None]:
    """Of all sizes the worst."""

    def value(results: Results) -> float | None:
        ratios = []
        for ours in pick(results, case="matrix", peer="steploop", mode=mode):
            if ours["work"]["kind"] == kind:
                others = pick(results, case="matrix", peer="eager", mode=mode, work=ours["work"])
                ratios += [paired_ratio(ours["times"], other["times"]) for other in others]
        return max(ratios, default=None)

    return value


def _all() -> list[Target]:
    made = [Target("LSTM / torch.nn: forward", 0.9, _ratio("lstm", "forward", "torch.nn"))]
    for mode in ("training", "training_x"):
        made.append(Target(f"LSTM / torch.nn: {MODE_TITLES[mode]}", 0.65, _ratio("lstm", mode, "torch.nn")))
    for mode in MODE_TITLES:
        text = f"a stranger's LSTM / steploop's own: {MODE_TITLES[mode]}"
        made.append(Target(text, 1.3 if mode == "forward" else 1.05, _ratio("stranger", mode, "steploop-lstm")))
    for mode in MODE_TITLES:
        made.append(Target(f"GRU / torch.nn: {MODE_TITLES[mode]}", 0.5, _ratio("gru", mode, "torch.nn")))
    for mode, peer, limit in (
        ("forward", "eager", 0.45),
        ("forward", "jax", 0.45),
        ("training", "eager", 0.38),
        ("training", "jax", 0.3),
    ):
        title = "eager loop" if peer == "eager" else "JAX scan"
        text = f"layer-norm LSTM with resets / {title}: {mode}"
        made.append(Target(text, limit, _ratio("lnlstm", mode, peer)))
    text = "attention decoder / eager loop: training"
    made.append(Target(text, 0.4, _ratio("decoder", "training", "eager")))
    for peer, title, limit in (("eager", "eager loop", 0.5), ("jax", "JAX scan", 0.6)):
        text = f"EmbeddingAttentionSeq2Seq / {title}: training"
        made.append(Target(text, limit, _ratio("seq2seq", "training", peer)))
    for case, rows, limits in (("search", 64, (0.3, 0.35, 0.35)), ("search_one_row", 1, (0.25, 0.25, 0.25))):
        for mode, limit in zip(("greedy", "sample", "beam"), limits, strict=True):
            text = f"search, B={rows} / batched loop by hand: {mode}"
            made.append(Target(text, limit, _ratio(case, mode, "eager")))
    for mode, limit in (("training", 1 / 3), ("greedy", 0.25), ("beam", 1 / 3)):
        made.append(Target(f"grapheme to phoneme / eager loop, padded: {mode}", limit, _ratio("g2p", mode, "eager")))
    for rows in (1, 32):
        made.append(Target(f"Kalman filter / eager loop, {rows} signals: training", 0.1, _kalman(rows)))
    for kind in MATRIX:
        for mode in ("forward", "training"):
            text = f"matrix states, {kind} / eager loop, worst size: {mode}"
            made.append(Target(text, 0.12, _matrix(kind, mode)))
    made.append(Target("LSTM / torch.nn, worst point of the grid", 1.1, _worst_on_grid(0)))
    made.append(Target("LSTM / torch.nn, worst point of the grid with H >= 512", 1.0, _worst_on_grid(512)))
    for mode, limit in (("forward", 55.0), ("training", 50.0), ("training_x", 50.0)):
        text = f"LSTM, share of the GEMM roofline: {MODE_TITLES[mode]}"
        made.append(Target(text, limit, _share(mode), least=True, unit="%"))
    for mode, limit in (("forward", 55.0), ("training", 50.0)):
        text = f"the same, worst point of the grid with H >= 126, B >= 64: {mode}"
        made.append(Target(text, limit, _least_share_on_grid(mode), least=True, unit="%"))
    for mode in ("forward", "training"):
        text = f"ragged lengths / padded: {mode}"
        made.append(Target(text, 0.65 if mode == "forward" else 0.62, _ratio("ragged", mode, "steploop-padded")))
        text = f"ragged lengths / PackedSequence in torch.nn: {mode}"
        made.append(Target(text, 0.3, _ratio("ragged", mode, "torch.nn")))
    for cache, limit in (("cold", 2.0), ("warm", 0.5)):
        text = f"first call without imports, {cache} cache, worst of steps and T"
        made.append(Target(text, limit, _first(cache), unit=" s"))
    for kind, limits in zip(DEEP, ((3.0, 1.5), (4.0, 2.0), (4.0, 2.0)), strict=True):
        for cache, limit in zip(("cold", "warm"), limits, strict=True):
            made.append(Target(f"first call, {cache} cache: {kind}", limit, _first(cache, kind), unit=" s"))
    text = "first call, warm cache: attention decoder with input feeding"
    made.append(Target(text, 1.5, _first("warm", "decoder"), unit=" s"))
    for kind in FIRST_SEARCHES:
        made.append(Target(f"first call, cold cache: {kind}", 2.5, _first("cold", kind), unit=" s"))
    text = "first call beyond a usual one: longest T / shortest T, worst"
    made.append(Target(text, 1.25, _growth_with_time))
    made.append(Target("kernels compiled for a new T or B", 0, _compiled_anew, unit=""))
    made.append(Target("one streamed step / torch.nn.LSTMCell", 0.5, _ratio("stream", "forward", "torch.nn")))
    text = "one streamed step of an actor-critic with resets / loop by hand"
    made.append(Target(text, 0.4, _ratio("actor", "forward", "eager")))
    for what, limit in (("call", 15.0), ("streamed step", 3.0)):
        made.append(Target(f"guards of a {what}, LSTM", limit, _guards(what), unit=" us"))
    text = "peak memory, layer-norm LSTM training / torch.nn.LSTM's"
    made.append(Target(text, 1.0, _memory("steploop", "torch.nn")))
    text = 'peak memory, layer-norm LSTM training, save="states" / eager loop'
    made.append(Target(text, 1 / 3, _memory("steploop-states", "eager")))
    made.append(Target("peak memory of a search, beam 8 / beam 1", 2.0, _search_memory))
    return made


TARGETS: list[Target] = _all()


def judge(results: Results) -> list[dict[str, Any]]:
    """Every target with its value."""
    return [target.judge(results) for target in TARGETS]
