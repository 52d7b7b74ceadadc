"""The benchmarks' program: every case at tiny sizes, blanks, wrong results, limits, and the report."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import jobs, machine, measure, peers, report, session, targets  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.cases import CASES, SCALES  # noqa: E402
from benchmarks.data import MATRIX, Workload, make_data  # noqa: E402
from benchmarks.models import MODELS  # noqa: E402

TINY = SCALES["tiny"]
LONG = pytest.mark.long
FAST = ["steploop-eager", "torch.nn", "eager", "gemm"]  # compile nothing
# Cases where only "steploop" stands for us.
NEED_OURS = (
    "ragged", "grid", "stream", "actor", "guards", "matrix_memory", "memory", "first", "seq2seq_two_projections",
)  # fmt: skip
SMALL = {
    "lstm": Workload("lstm", 4, 2, 3, 5),
    "gru": Workload("gru", 4, 2, 3, 5),
    "stranger": Workload("stranger", 4, 2, 3, 5),
    "lnlstm": Workload("lnlstm", 4, 2, 3, 5, resets=True),
    "decoder": Workload("decoder", 4, 2, 3, 5, S=3),
    **{kind: Workload(kind, 4, 2, 3, 8) for kind in MATRIX},
}


def in_this_process(job, timeout, environment=None):
    """What session.run_cases starts instead of a process."""
    before = {name: os.environ.get(name) for name in environment or {}}
    threads = torch.get_num_threads()
    os.environ.update(environment or {})
    results = []
    try:
        job = json.loads(json.dumps(job))
        jobs.run_job(job, lambda result: results.append({"case": job["case"], **result}))
    finally:
        torch.set_num_threads(threads)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return {"results": results, "error": None}


def run(names, only=None):
    return session.run_cases(names, TINY, 1, only, lambda _: None, lambda _: None, in_this_process)


def job_of(case, names):
    (job,) = session.jobs_of(case, TINY, 1, names)
    return json.loads(json.dumps(job))


@pytest.mark.parametrize("case", [name for name in CASES if name != "unrolled"])
def test_every_case_measures_every_fast_peer(case):
    results = run([case], [*FAST, "steploop"] if case in NEED_OURS else FAST)
    assert results
    for result in results:
        assert result["case"] == case
        assert "blank" not in result, result
        assert "bytes" in result or result.get("median", result.get("first")) > 0


@pytest.mark.parametrize("mode", ["forward", "training", "training_x"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_loops_by_hand_and_steploop_agree(kind, mode):
    work = SMALL[kind]
    data = make_data(work)
    names = ["eager", "eager-hoisted", "steploop-eager"] + (["torch.nn"] if kind in ("lstm", "gru") else [])
    arrays = []
    for name in names:
        runner = peers.make_runner(name, work, data, mode)
        arrays.append(runner.arrays(runner.run()))
    for found in arrays[1:]:
        assert set(found) == set(arrays[0])
        worst, where = jobs.difference(found, arrays[0])
        assert where == "" and worst < 1e-4


SEQ2SEQ = ["seq2seq", "seq2seq_two_projections"]


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_sequence_to_sequence_models_agree(kind, mode):
    work = Workload(kind, 4, 2, 3, 5, S=6, V=7)
    data = make_data(work)
    names = ["eager", "eager-hoisted", "steploop-eager", *(["jax"] if machine.version("jax") else [])]
    arrays = [(runner := peers.make_runner(name, work, data, mode)).arrays(runner.run()) for name in names]
    for found in arrays[1:]:
        assert set(found) == set(arrays[0]) and found["y"].shape == (4, 2)
        worst, where = jobs.difference(found, arrays[0])
        assert where == "" and worst < 1e-4
    with pytest.raises(peers.Blank, match="not written for this model"):
        peers.make_runner("torch.nn", work, data, mode)


@pytest.mark.parametrize(
    "kind", ["lnlstm", pytest.param("lstm", marks=LONG), pytest.param("gru", marks=LONG)]
)
def test_jax_and_keras_agree_with_the_loop_by_hand(kind):
    wanted = [name for name in ("jax", "keras") if machine.version(name)]
    if not wanted:
        pytest.skip("neither JAX nor Keras is installed")
    job = {**job_of(kind, ["eager", *wanted]), "modes": ["training_x"]}
    answer = measure.in_process(job, 120)
    assert answer["error"] is None
    assert {r["peer"] for r in answer["results"]} == {"eager", *wanted}
    assert all("blank" not in r for r in answer["results"]), answer["results"]


def test_a_missing_peer_is_a_blank(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    results = run(["lnlstm", "stream"], ["eager", "jax", "keras", "torch.nn"])
    blanks = {(r["case"], r["peer"]): r["blank"] for r in results if "blank" in r}
    assert "jax is not installed" in blanks["lnlstm", "jax"]
    assert "jax is not installed" in blanks["lnlstm", "keras"]
    assert "jax is not installed" in blanks["stream", "jax"]
    assert any(r["peer"] == "eager" and r["median"] > 0 for r in results if "blank" not in r)


class Broken(peers.Peer):
    """A peer whose gradients are wrong, or which fails when it runs."""

    def __init__(self, fail):
        self.fail = fail

    def make(self, work, data, mode):
        right = peers.PEERS["eager"].make(work, data, mode)
        if self.fail:
            return peers.Runner(lambda: 1 / 0)
        arrays = lambda result: {k: v + 0.1 * np.abs(v).max() for k, v in right.arrays(result).items()}
        return peers.Runner(right.run, arrays)


@pytest.mark.parametrize(("fail", "reason"), [(True, "ZeroDivisionError"), (False, "wrong result: ")])
def test_a_peer_that_fails_or_is_wrong_is_a_blank(monkeypatch, fail, reason):
    monkeypatch.setitem(peers.PEERS, "broken", Broken(fail))
    found = in_this_process({**job_of("lstm", ["eager"]), "peers": ["broken", "eager"]}, 1)["results"]
    blanks = [r for r in found if r["peer"] == "broken"]
    assert len(blanks) == 1 and all(r["blank"].startswith(reason) for r in blanks)
    assert all(r["median"] > 0 for r in found if r["peer"] == "eager")


def test_differences_see_nan_and_shapes():
    ones = {"y": np.ones(3)}
    assert jobs.difference({"y": np.full(3, np.nan)}, ones)[1] == "y"
    assert jobs.difference({"y": np.ones(4)}, ones)[1] == "y"
    assert jobs.difference({"y": np.ones(3)}, ones) == (0.0, "")


def test_rounds_are_interleaved_and_fit_the_budget():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = measure.interleaved(runs, budget=4.0, expected=dict.fromkeys("abc", 0.5), least=1, most=9)
    assert order == ["a", "b", "c", "c", "b", "a"]
    assert all(len(seconds) == 2 for seconds in times.values())
    assert measure.paired_ratio([1.0, 4.0, 9.0], [2.0, 2.0, 3.0]) == 2.0
    assert measure.paired_ratio([1.0, 4.0, 9.0], [2.0]) == 2.0
    assert jobs.too_slow({"a": 1.0, "b": 1.2, "scan": 15.0}, 4.0) == {"scan"}
    assert jobs.too_slow({"a": 4.0, "b": 5.0, "c": 6.0}, 4.0) == set()


def test_a_time_limit_ends_python_code():
    with pytest.raises(measure.TimeLimit, match="longer than 0.05 s"), measure.time_limit(0.05):
        while True:
            pass


def test_a_process_that_takes_too_long_or_crashes_leaves_blanks():
    job = {**session.jobs_of("lstm", TINY, 1, ["eager"])[0], "timeout": 0.05}
    results = list(session._run(job, [], measure.in_process, {}))
    assert len(results) == 1
    assert all(r["blank"] == "took longer than 0.05 s" for r in results)
    crash = measure.in_process({**job, "action": "no such action"}, 60)
    assert "KeyError" in crash["error"] and crash["results"] == []


def test_peak_memory_sees_a_temporary():
    # The allocator may keep what is freed here, and give it to the run below: the run takes it all the same.
    torch.ones(8_000_000)
    kept = [torch.ones(250_000) for _ in range(48)]
    del kept
    size, how = measure.peak_memory(lambda: torch.ones(8_000_000).sum().item())
    assert how
    if how.startswith("VmHWM"):
        assert 25e6 < size < 80e6


def test_grid_points_too_large_for_the_limits_are_skipped_with_a_reason(monkeypatch):
    job = session.jobs_of("grid", SCALES["full"], 2, None)[-1]
    assert "the limit is 1 s" in session._skip({**job, "timeout": 1.0}, [])
    monkeypatch.setattr(session, "available_memory", lambda: 1e9)
    assert "GB of memory" in session._skip({**job, "timeout": 1e9}, [])


def test_after_a_timeout_longer_unrolled_loops_are_not_tried():
    job = session.jobs_of("unrolled", SCALES["full"], 2, ["compile"])[-1]
    failed = {"case": "unrolled", "peer": "compile", "work": {"T": 8}, "blank": "took longer than 200 s"}
    assert session._skip(job, [failed]) == "8 steps: took longer than 200 s"
    assert session._skip(job, []) == ""


def timing(case, peer, mode, times, **work):
    made = {"case": case, "action": "compare", "work": work, "mode": mode, "peer": peer}
    return {**made, "times": times, "median": sorted(times)[len(times) // 2], "note": ""}


def test_targets_are_judged_by_paired_ratios():
    size = {"kind": "lstm", "T": 1000, "B": 64, "I": 256, "H": 126}
    results = [
        timing("lstm", "steploop", "forward", [0.5, 2.0, 0.9], **size),
        timing("lstm", "torch.nn", "forward", [1.0, 4.0, 1.0], **size),
        timing("lstm", "gemm", "forward", [0.3, 1.0, 0.5], **size),
    ]
    rows = {row["text"]: row for row in targets.judge(results)}
    lstm = rows["LSTM / torch.nn: forward"]
    assert lstm["value"] == 0.5 and lstm["met"] is True
    roofline = rows["LSTM, share of the GEMM roofline: forward"]
    assert round(roofline["value"], 1) == 55.6 and roofline["met"] is True
    assert rows["GRU / torch.nn: forward"]["met"] is None


def test_the_page_and_its_plots(tmp_path):
    size = {"kind": "lstm", "T": 4, "B": 2, "I": 3, "H": 5}
    results = [
        timing(case, peer, mode, [index + 1.0, index + 1.1], **size)
        for case in ("lstm", "ragged", "grid")
        for mode in ("forward", "training")
        for index, peer in enumerate(("gemm", "steploop", "torch.nn", "steploop-padded"))
    ]
    results.append({**timing("lstm", "keras", "forward", [1.0], **size), "blank": "refuses | this"})
    results += [timing("g2p", peer, "greedy", times, **size) for peer, times in (("steploop", [2.0]), ("eager", [8.0]))]
    meta = {**machine.describe(1), "scale": "tiny", "load_start": 0.0, "load_end": 0.0}
    path, page = tmp_path / "runs" / "one.json", tmp_path / "docs" / "benchmarks.md"
    report.write_json({"meta": meta, "results": results}, path)
    kept = json.loads(path.read_text())
    assert len(kept["targets"]) == len(targets.TARGETS)
    report.write(report.merge([path, path]), page, page.parent / "img")
    text = page.read_text()
    for expected in ("# Benchmarks", "## Targets", "## LSTM", "## Ragged batches", "## Grid", "| torch.nn |"):
        assert expected in text
    assert "| steploop | greedy | 4 | 0.25 |" in text  # 4 batches of 2 words in 2 s
    assert "Keras (JAX) (forward): refuses \\| this" in text
    assert f"torch {machine.version('torch')}" in text and meta["date"][:10] in text
    if machine.version("matplotlib"):
        for name in ("ratio", "roofline", "grid"):
            assert (page.parent / "img" / f"benchmarks-{name}.png").stat().st_size > 2000
            assert f"(img/benchmarks-{name}.png)" in text


def test_a_later_run_replaces_the_tables_it_measured(tmp_path):
    size = {"kind": "lstm", "T": 4, "B": 2, "I": 3, "H": 5}
    paths = []
    for index, results in enumerate(
        (
            [
                timing("lstm", "eager", "forward", [1.0], **size),
                timing("gru", "eager", "forward", [3.0], **size),
            ],
            [timing("lstm", "eager", "forward", [2.0], **size)],
        )
    ):
        paths.append(tmp_path / f"{index}.json")
        report.write_json({"meta": {"date": f"2030-01-0{index + 1}"}, "results": results}, paths[-1])
    merged = report.merge(paths)
    assert {r["case"]: r["median"] for r in merged["results"]} == {"lstm": 2.0, "gru": 3.0}
    assert merged["meta"]["date"] == "2030-01-01 to 2030-01-02, 2 runs"


def test_a_section_says_where_it_was_measured_and_what_there_is_to_say_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "REMARKS", tmp_path / "remarks.md")
    report.REMARKS.write_text("About this file.\n\n## LSTM\n\nThe first remark.\n\n## Nothing of this name\n\nNo.\n")
    size = {"kind": "lstm", "T": 4, "B": 2, "I": 3, "H": 5}
    paths = []
    for case, cpu in (("gru", "a slow one"), ("lstm", "a fast one")):
        about = {**machine.describe(1), "cpu": cpu, "date": "2030-01-02"}
        paths.append(tmp_path / f"{case}.json")
        results = [timing(case, peer, "forward", [1.0], **size) for peer in ("eager", "steploop")]
        report.write_json({"meta": about, "results": results}, paths[-1])
    text = report.markdown(report.merge(paths), [])
    lstm, gru = text.split("## GRU")
    assert "The first remark." in lstm and "measured" not in lstm.split("## LSTM")[1]
    assert "- measured 2030-01-02 on a slow one, 1 threads" in gru and "No." not in text


def test_reasons_name_no_folder():
    error = RuntimeError("cannot\n  read /home/someone/project/file.py:12")
    assert peers.short(error) == "RuntimeError: cannot read file.py:12"


def test_the_program(tmp_path, capsys):
    assert (
        main(["--tiny", "--case", "stream", "--peers", "torch.nn", "--out", str(tmp_path), "--threads", "1"])
        == 0
    )
    assert len(list(tmp_path.glob("*.json"))) == 1
    (page,) = tmp_path.glob("*.md")
    assert "torch.nn.LSTMCell" in page.read_text()
    assert "The page:" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--case", "no-such-case"])
    assert "no-such-case" in capsys.readouterr().err
