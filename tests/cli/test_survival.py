"""Training that is killed: whatever the moment, a resumed run ends with the numbers of one that was never broken."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from cli_program import TINY

from steploop.recipes import charlm_training
from steploop.recipes.charlm import Checkpoint

KILLS = 20

if not hasattr(os, "fork"):
    pytest.skip("a child of this process is needed: os.fork", allow_module_level=True)


def lives(log: Path, arguments: list[str], seconds: float | None = None) -> tuple[int, float]:
    """`steploop` in a child of this process: (exit code, seconds of CPU time).

    seconds: of CPU time, after which the system ends it, wherever it is; the exit code is then negative.
    """
    child = os.fork()
    if not child:
        code = 3
        try:
            torch.set_num_threads(1)
            sys.stdout = sys.stderr = log.open("w")
            signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends a process at once, as SIGKILL does
            if seconds is not None:
                signal.setitimer(signal.ITIMER_PROF, seconds)
            from steploop.cli import main

            main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def test_a_run_that_is_killed_at_any_moment_ends_like_an_unbroken_one(text, tmp_path):
    """In a process of its own: one that has threads, as this may have by now, must not be forked."""
    where = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    script = f"import test_survival as t; t.kill_and_resume({str(text)!r}, t.Path({str(tmp_path)!r}))"
    ran = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": where}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def kill_and_resume(text, tmp_path):
    charlm_training.draw = lambda *_: None
    # With dropout: the random numbers have to go on where they were.
    command = ["train", "charlm", "--data", text, "--max-steps", "6", "--dropout", "0.3", "--backend", "reference"]
    command += [*TINY, "--out"]
    log = tmp_path / "log"
    code, whole_seconds = lives(log, [*command, str(tmp_path / "whole")])
    assert code == 0, log.read_text()
    whole = {name: Checkpoint.read(tmp_path / "whole" / name) for name in ("last.ckpt", "best.ckpt")}
    moments, kills, run = random.Random(0), 0, 0
    while kills < KILLS:
        run += 1
        out, code = tmp_path / f"run{run}", -1
        while code < 0:
            how = "--resume" if (out / "last.ckpt").exists() else "--overwrite"
            # The last run is let go on to its end.
            limit = moments.uniform(0.05, 0.9) * whole_seconds if kills < KILLS else None
            code, _ = lives(log, [*command, str(out), how], limit)
            kills += code < 0
            if code < 0 and _is_trained(out):  # it had only to say goodbye: nothing is left to resume
                shutil.rmtree(out)
        assert code == 0, log.read_text()
        for name, expected in whole.items():
            found = Checkpoint.read(out / name)
            assert [entry["val_nats"] for entry in found.history] == [e["val_nats"] for e in expected.history], name
            for weight, value in expected.content["state_dict"].items():
                assert torch.equal(found.content["state_dict"][weight], value), f"{name}, {weight}"
        assert not list(out.glob("*.unfinished"))


def _is_trained(out: Path) -> bool:
    last = out / "last.ckpt"
    return last.exists() and Checkpoint.read(last).history[-1]["step"] == 6


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(steploop, text, copy_of_trained):
    copy_of_trained.chmod(0o500)
    try:
        before = {path.name: path.read_bytes() for path in copy_of_trained.glob("*.ckpt")}
        ran = steploop("train", "charlm", "--data", text, "--out", copy_of_trained, "--resume", "--max-steps", "30",
                       *TINY)  # fmt: skip
        assert ran.code == 2 and "Permission denied" in ran.err and "fix:" in ran.err
        assert {path.name: path.read_bytes() for path in copy_of_trained.glob("*.ckpt")} == before
    finally:
        copy_of_trained.chmod(0o700)


@pytest.fixture
def copy_of_trained(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")
