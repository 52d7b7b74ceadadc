"""What is measured. A case is a function from a scale to jobs; a job is a dict of plain values (see jobs.py).

Scales: "full" (the sizes of the tables), "quick" (minutes: to see that all works), "tiny" (the tests).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .data import DEEP, FIRST_SEARCHES, HEADS, MATRIX, SEARCHES, Workload

Job = dict[str, Any]
OURS = ("steploop", "steploop-cpu", "steploop-eager")
THEIRS = ("torch.nn", "eager", "eager-hoisted", "compile-cell", "scan", "jax", "keras")
NO_LAYER = tuple(name for name in THEIRS if name != "torch.nn")


@dataclass(frozen=True)
class Scale:
    """How large a run is. T of None: the sizes of the tables. budget: seconds of rounds for a column."""

    name: str
    T: int | None
    B: int
    width: int | None
    budget: float
    least: int
    most: int
    timeout: float
    grid: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    first: tuple[int, ...]
    unrolled: tuple[int, ...]
    unrolled_limit: float
    calls: int
    modes: tuple[str, ...] = ("forward", "training", "training_x")
    kinds: tuple[str, ...] = ("lstm", "lnlstm", *DEEP, "decoder", *FIRST_SEARCHES)  # of first calls

    def sized(self, work: Workload) -> Workload:
        """A workload of the tables at this scale."""
        if self.T is None:
            return work
        narrow = {} if self.width is None else {"I": self.width + 1, "H": self.width, "V": min(work.V, 11)}
        if work.kind in MATRIX and narrow:
            narrow["H"] = HEADS * self.width
        return replace(work, T=min(work.T, self.T), B=min(work.B, self.B), S=min(work.S, self.T), **narrow)


FULL_GRID = ((1, 16, 64, 128), (64, 512, 2048), (64, 256, 512))
QUICK_GRID = ((1, 16), (16, 64), (64, 128))
SCALES = {
    "full": Scale("full", None, 64, None, 90.0, 5, 21, 900.0, FULL_GRID, (64, 4096), (4, 8, 16, 32), 200.0, 2000),
    "quick": Scale("quick", 50, 16, None, 3.0, 3, 5, 300.0, QUICK_GRID, (16, 256), (4,), 90.0, 100),
    "tiny": Scale(
        "tiny",
        5,
        3,
        6,
        0.05,
        1,
        2,
        120.0,
        ((2,), (3,), (4,)),
        (6,),
        (3,),
        60.0,
        5,
        ("training_x",),
        ("lstm", DEEP[0], "greedy search"),
    ),
}

LSTM = Workload("lstm", 1000, 64, 256, 126)
GRU = replace(LSTM, kind="gru")
STRANGER = replace(LSTM, kind="stranger")
LN_LSTM = replace(LSTM, kind="lnlstm", resets=True)
DECODER = Workload("decoder", 50, 64, 256, 256, S=50)
SEARCH = Workload("decoder", 50, 64, 256, 256, S=50, V=1000)
LONG_SEARCH = replace(SEARCH, S=500)
SEQ2SEQ = Workload("seq2seq", 50, 64, 256, 256, S=50, V=10_000)
RAGGED = replace(LSTM, ragged=True)
G2P = Workload("g2p", 15, 64, 64, 256, S=14, V=40)
STREAM = Workload("lstm", 64, 1, 128, 128)
ACTOR = Workload("actor", 64, 16, 64, 128, resets=True)
MATRICES = [
    Workload(kind, 1000, batch, 64, 4 * size) for kind in MATRIX for size, batch in ((32, 4), (64, 4), (64, 16))
]
KALMAN = Workload("kalman", 1000, 1, 2, 4)
FIRST_CALL = Workload("lstm", 64, 16, 128, 128)


def compare(case: str, scale: Scale, work: Workload, modes: tuple[str, ...], peers: tuple[str, ...]) -> Job:
    """A job in which these peers run side by side."""
    return {
        "action": "compare", "case": case, "work": scale.sized(work).as_dict(), "modes": modes,
        "peers": peers, "budget": scale.budget, "least": scale.least, "most": scale.most,
        "timeout": scale.timeout,
    }  # fmt: skip


def by_mode(case: str, scale: Scale, work: Workload, peers: tuple[str, ...]) -> list[Job]:
    """One such job for each mode, so that what is done is kept when a long run ends early."""
    return [compare(case, scale, work, (mode,), peers) for mode in scale.modes]


def lstm(scale: Scale) -> list[Job]:
    """LSTM as torch.nn has it, and the share of the GEMM roofline."""
    return by_mode("lstm", scale, LSTM, (*OURS, *THEIRS, "gemm"))


def gru(scale: Scale) -> list[Job]:
    """GRU as torch.nn has it."""
    return by_mode("gru", scale, GRU, (*OURS, *THEIRS, "gemm"))


def stranger(scale: Scale) -> list[Job]:
    """An LSTM with peepholes, permuted gates, GELU for tanh and a third state; next to it, our own LSTM."""
    return by_mode("stranger", scale, STRANGER, (*OURS, "steploop-lstm", *NO_LAYER))


def lnlstm(scale: Scale) -> list[Job]:
    """A user-written layer-norm LSTM with resets."""
    return by_mode("lnlstm", scale, LN_LSTM, (*OURS, *NO_LAYER))


def decoder(scale: Scale) -> list[Job]:
    """An attention decoder with input feeding; training_x includes the gradient of the memory."""
    return by_mode("decoder", scale, DECODER, (*OURS, *NO_LAYER))


def seq2seq(scale: Scale) -> list[Job]:
    """TF1's embedding_attention_seq2seq with an output_projection, an LSTM, and the loss over all words."""
    return by_mode("seq2seq", scale, SEQ2SEQ, (*OURS, "eager", "eager-hoisted", "jax"))[:2]


def seq2seq_two_projections(scale: Scale) -> list[Job]:
    """The same without an output_projection: V logits within the decoder, and a second projection of them."""
    jobs = by_mode("seq2seq_two_projections", scale, replace(SEQ2SEQ, kind="seq2seq_two_projections"),
                   ("steploop", "eager", "eager-hoisted", "jax"))  # fmt: skip
    return [{**job, "least": 1} for job in jobs[1:2] or jobs]


def ragged(scale: Scale) -> list[Job]:
    """LSTM over lengths uniform in 1..T, against the padded batch and a PackedSequence."""
    peers = ("steploop", "steploop-padded", "torch.nn", "torch.nn-padded")
    return by_mode("ragged", scale, RAGGED, peers)[:2]


def grid(scale: Scale) -> list[Job]:
    """LSTM against torch.nn over B x T x H, with I = H."""
    jobs = []
    for batch in scale.grid[0]:
        for time in scale.grid[1]:
            for hidden in scale.grid[2]:
                work = Workload("lstm", time, batch, hidden, hidden)
                job = compare("grid", scale, work, ("forward", "training"), ("steploop", "torch.nn", "gemm"))
                limits = {"budget": min(scale.budget, 12.0), "timeout": min(scale.timeout, 420.0)}
                jobs.append({**job, "work": work.as_dict(), "least": min(scale.least, 3), **limits})
    return jobs


def unrolled(scale: Scale) -> list[Job]:
    """torch.compile of the whole layer-norm LSTM loop: first call (mostly compilation), in a cold cache."""
    jobs = []
    for time in scale.unrolled:
        work = replace(scale.sized(LN_LSTM), T=time)
        for peer in ("steploop", "compile"):
            job = _first_call("unrolled", scale, work, peer, "cold")
            jobs.append({**job, "timeout": scale.unrolled_limit, "needs_earlier": True, "vary": False})
    return jobs


def first(scale: Scale) -> list[Job]:
    """A process's first call, forward and backward, in a cold and a warm cache; then with another T and B."""
    jobs = []
    for kind in scale.kinds:
        base = replace(FIRST_CALL, kind=kind, B=min(FIRST_CALL.B, scale.B))
        if kind == "decoder":
            base = scale.sized(DECODER)
        if kind in SEARCHES:
            base = replace(scale.sized(SEARCH), kind=kind)
        for time in scale.first if kind in ("lstm", "lnlstm") else (base.T,):
            work = replace(base, T=time)
            peers = ("steploop", "jax") if kind == "lstm" else ("steploop",)
            for peer in peers:
                jobs += [_first_call("first", scale, work, peer, cache) for cache in ("cold", "warm")]
    return jobs


def _first_call(case: str, scale: Scale, work: Workload, peer: str, cache: str) -> Job:
    repeats = 3 if scale.name == "full" and case == "first" else 1
    return {
        "action": "first_call", "case": case, "work": work.as_dict(), "modes": ("training",),
        "peers": (peer,), "cache": cache, "imports": [], "vary": True, "repeats": repeats,
        "timeout": min(scale.timeout, 300.0),
    }  # fmt: skip


def stream(scale: Scale) -> list[Job]:
    """One streamed LSTM step, B=1 H=128."""
    job = compare("stream", scale, STREAM, ("forward",), (*OURS, "torch.nn", "jax"))
    limits = {"budget": min(scale.budget, 20.0), "timeout": min(scale.timeout, 300.0)}
    return [{**job, "action": "stream", "work": STREAM.as_dict(), "calls": scale.calls, **limits}]


def actor(scale: Scale) -> list[Job]:
    """One streamed step of an actor-critic with resets, B=16 H=128."""
    job = compare("actor", scale, ACTOR, ("forward",), (*OURS, "eager"))
    limits = {"budget": min(scale.budget, 20.0), "timeout": min(scale.timeout, 300.0)}
    return [{**job, "action": "stream", "work": ACTOR.as_dict(), "calls": scale.calls, **limits}]


def guards(scale: Scale) -> list[Job]:
    """The check that a kept capture still holds, for an LSTM and a layer-norm LSTM."""
    return [
        {
            "action": "guards", "case": "guards", "work": work.as_dict(), "modes": ("forward",),
            "peers": ("steploop",), "calls": scale.calls, "timeout": min(scale.timeout, 300.0),
        }
        for work in (STREAM, replace(STREAM, kind="lnlstm"))
    ]  # fmt: skip


def search(scale: Scale) -> list[Job]:
    """Greedy search, sampling and beam search (8) of a decoder with attention."""
    return _searches("search", scale, SEARCH)


def search_one_row(scale: Scale) -> list[Job]:
    """The same for one row."""
    return _searches("search_one_row", scale, replace(SEARCH, B=1))


def _searches(case: str, scale: Scale, work: Workload) -> list[Job]:
    modes = ("greedy", "sample", "beam")
    return [{**compare(case, scale, work, (mode,), ("eager", *OURS)), "action": "search"} for mode in modes]


def search_memory(scale: Scale) -> list[Job]:
    """Peak memory of a beam search over a long memory, 1 and 8 wide, each in its own process."""
    works = [replace(LONG_SEARCH, kind=kind) for kind in ("beam search of 1", "beam search")]
    peers = ("steploop", "eager")
    return [_peak("search_memory", scale, scale.sized(work), peer) for work in works for peer in peers]


def g2p(scale: Scale) -> list[Job]:
    """The grapheme-to-phoneme recipe's model: a training step, greedy search and beam search (8)."""
    modes = ("training", "greedy", "beam")
    return [{**compare("g2p", scale, G2P, (mode,), ("eager", *OURS)), "action": "g2p"} for mode in modes]


def kalman(scale: Scale) -> list[Job]:
    """The log-likelihood of a Kalman filter in float64: one signal, and 32 at once."""
    jobs = []
    for batch in (1, min(32, scale.B)):
        work = replace(KALMAN, B=batch, T=min(KALMAN.T, scale.T or KALMAN.T))
        for mode in ("forward", "training"):
            job = compare("kalman", scale, work, (mode,), ("eager", "steploop", "steploop-eager"))
            jobs.append({**job, "action": "kalman", "work": work.as_dict(), "budget": min(scale.budget, 20.0)})
    return jobs


def matrix(scale: Scale) -> list[Job]:
    """Steps whose state is a matrix for each of 4 heads (D = H / 4)."""
    peers = ("steploop", "steploop-eager", "eager", "eager-hoisted", "jax")
    jobs = []
    for work in dict.fromkeys(map(scale.sized, MATRICES)):
        found = [compare("matrix", scale, work, (mode,), peers) for mode in scale.modes[:2]]
        jobs += [{**job, "budget": min(scale.budget, 12.0)} for job in found]
    return jobs


def matrix_memory(scale: Scale) -> list[Job]:
    """Peak memory of a training step of those, each in its own process."""
    peers = ("steploop", "steploop-all", "eager")
    works = dict.fromkeys(map(scale.sized, MATRICES))
    return [_peak("matrix_memory", scale, work, peer) for work in works for peer in peers]


def _peak(case: str, scale: Scale, work: Workload, peer: str) -> Job:
    return {
        "action": "memory", "case": case, "work": work.as_dict(), "modes": ("training",), "peers": (peer,),
        "timeout": min(scale.timeout, 300.0),
    }  # fmt: skip


def memory(scale: Scale) -> list[Job]:
    """Peak memory of a training step of the layer-norm LSTM (torch.nn: its LSTM), each in its own process."""
    jobs = []
    for peer in ("steploop-states", "steploop-all", "steploop", "eager", "eager-hoisted", "torch.nn"):
        work = LSTM if peer == "torch.nn" else LN_LSTM
        jobs.append(_peak("memory", scale, scale.sized(replace(work, resets=False)), peer))
    return jobs


CASES: dict[str, Callable[[Scale], list[Job]]] = {
    f.__name__: f
    for f in (
        lstm, gru, stranger, lnlstm, decoder, seq2seq, seq2seq_two_projections, ragged, stream, actor, guards,
        search, search_one_row, search_memory, g2p, kalman, matrix, matrix_memory, memory, first, unrolled, grid,
    )  # fmt: skip
}
