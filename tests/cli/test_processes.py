"""Several processes train one model (`--devices`, torchrun): together they do what one does with the joint batch."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from cli_program import TINY
from g2p_dictionary import TINY as TINY_G2P
from g2p_dictionary import dictionary

from steploop.recipes import processes
from steploop.recipes.charlm import Checkpoint as CharCheckpoint
from steploop.recipes.g2p import Checkpoint as G2PCheckpoint
from steploop.recipes.g2p import Shape
from steploop.recipes.g2p_scores import Scores
from steploop.recipes.g2p_training import G2PTraining, Settings
from steploop.recipes.lexicon import Lexicon, Symbols

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("gloo is needed", allow_module_level=True)

STEPS = 6
RUN = ("--max-steps", str(STEPS), "--backend", "reference", "--dropout", "0", "--overwrite")
STEPLOOP = ("-m", "steploop")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *STEPLOOP)
DIES = """
import os, signal, sys
from steploop.cli import main
from steploop.recipes.charlm_training import CharTraining
step = CharTraining.training_step

def dies(self, window, index):
    if self.global_step == 3 and self.global_rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, window, index)

CharTraining.training_step = dies
main(sys.argv[1:])
"""


def started(*arguments: object, program: tuple[str, ...] = STEPLOOP) -> subprocess.Popen:
    """`steploop` in a process of its own: others are started by the same command line."""
    command = [sys.executable, *program, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def ended(run: subprocess.Popen, seconds: float = 240) -> tuple[int, str, str]:
    try:
        out, err = run.communicate(timeout=seconds)
    finally:
        with_all_others(run, signal.SIGKILL)
    return run.returncode, out, err


def with_all_others(run: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(run.pid, number)
    except ProcessLookupError:
        pass


@pytest.fixture(scope="module")
def recipes(text, tmp_path_factory):
    """The command of each recipe, without --out, and what reads its checkpoints."""
    words = tmp_path_factory.mktemp("words") / "words.dict"
    words.write_text(dictionary())
    return {
        "charlm": (("train", "charlm", "--data", text, *TINY, *RUN), CharCheckpoint),
        "g2p": (("train", "g2p", "--data", words, *TINY_G2P, *RUN), G2PCheckpoint),
    }


@pytest.fixture(scope="module")
def alone(recipes, tmp_path_factory):
    """What each recipe comes to in one process."""
    from steploop.cli import main

    found = {}
    for name, (command, kind) in recipes.items():
        out = tmp_path_factory.mktemp("alone") / name
        with pytest.raises(SystemExit) as end:
            main([*map(str, command), "--out", str(out)])
        assert not end.value.code
        found[name] = kind.read(out / "last.ckpt")
    return found


def equal_numbers(found, expected, tolerance=2e-4) -> None:
    assert len(found.history) == len(expected.history)
    for one, other in zip(found.history, expected.history):
        assert one["step"] == other["step"]
        for name in ("train_nats", "val_nats", "dev_per", "dev_wer"):
            if name in other:
                assert one[name] == pytest.approx(other[name], rel=tolerance), name
    for name, value in expected.weights.items():
        torch.testing.assert_close(found.weights[name], value, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("name, program, devices", [
    ("charlm", STEPLOOP, ("--devices", "2")),
    ("g2p", STEPLOOP, ("--devices", "2")),
    ("charlm", TORCHRUN, ()),
])  # fmt: skip
def test_two_processes_train_as_one(recipes, alone, tmp_path, name, program, devices):
    command, kind = recipes[name]
    code, out, err = ended(started(*command, "--out", tmp_path / "run", *devices, program=program))
    assert code == 0, err
    assert out.count("Try it:") == 1 and out.count(f"step {STEPS:6d}") == 1, out  # one of them speaks
    found = kind.read(tmp_path / "run" / "last.ckpt")
    equal_numbers(found, alone[name])
    assert (tmp_path / "run" / "model.safetensors").exists() and not list(tmp_path.rglob("*.unfinished"))
    if name == "charlm":  # the states of all streams, in their order
        states, expected = (one.content["charlm"]["state"] for one in (found, alone[name]))
        assert states.keys() == expected.keys()
        for state, value in expected.items():
            torch.testing.assert_close(states[state], value, rtol=0, atol=1e-4)


def test_a_run_of_two_that_is_killed_goes_on(recipes, alone, tmp_path):
    """In as many processes, or in another number of them. That the other process ends too is why `ended` returns."""
    (command, kind), out, program = recipes["charlm"], tmp_path / "run", tmp_path / "dies.py"
    program.write_text(DIES)
    code, _, err = ended(started(*command, "--out", out, "--devices", "2", program=(str(program),)))
    assert code == -signal.SIGKILL, err
    assert kind.read(out / "last.ckpt").history[-1]["step"] == 3
    resumed = [part if part != "--overwrite" else "--resume" for part in command]
    for devices in (1, 2):
        copy = shutil.copytree(out, tmp_path / f"in {devices}")
        code, _, err = ended(started(*resumed, "--out", copy, "--devices", devices))
        assert code == 0, err
        equal_numbers(kind.read(copy / "last.ckpt"), alone["charlm"])


def test_a_budget_of_minutes_ends_all_at_the_same_step(recipes, tmp_path):
    """Each has a clock of its own: had they gone by those, one would wait for the other for ever."""
    command, kind = recipes["charlm"]
    command = tuple(part for part in command if part not in ("--max-steps", str(STEPS)))
    code, out, err = ended(started(*command, "--out", tmp_path / "run", "--devices", "2", "--minutes", "0.05"))
    assert code == 0, err
    history = kind.read(tmp_path / "run" / "last.ckpt").history
    assert history and history[-1]["seconds"] >= 3  # how many validations a slow machine comes to is not known


def test_what_goes_wrong_in_all_is_told_once(recipes, tmp_path):
    command, _ = recipes["charlm"]
    run = started(*command, "--out", tmp_path / "run", "--devices", "2", "--learning-rate", "1e38")
    code, out, err = ended(run)
    assert code == 2 and (out + err).count("Training diverged") == 1 and "Traceback" not in err, err


@pytest.mark.parametrize("devices, by_torchrun, told", [
    (3, None, "--streams 4 can't be shared by 3 processes"),
    (2, "4", "leave --devices out"),
    (0, None, "greater than or equal to 1"),
])  # fmt: skip
def test_numbers_of_processes_that_do_not_fit(steploop, recipes, tmp_path, monkeypatch, devices, by_torchrun, told):
    if by_torchrun:
        for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, by_torchrun)
    ran = steploop(*recipes["charlm"][0], "--out", tmp_path / "run", "--devices", devices)
    assert ran.code == 2 and told in ran.err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def as_process(monkeypatch):
    """as_process(rank, count): what this process then believes to be."""

    def pretend(rank: int, count: int) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: count)

    return pretend


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 12])
def test_shares_are_joined_to_what_they_were_taken_from(as_process, rows, count):
    whole, shares = torch.arange(2.0 * rows).reshape(rows, 2), []
    for rank in range(count):
        as_process(rank, count)
        shares.append(processes.share(whole))
    assert torch.equal(processes.joined(shares), whole)


@pytest.mark.parametrize("count", [2, 3, 16])
def test_every_pair_is_read_once_in_a_pass_and_counts_alike(as_process, tmp_path, count):
    """Whatever the last batch has: the gradients of the shares have the joint batch's as their mean."""
    path = tmp_path / "words.dict"
    path.write_text(dictionary())
    lexicon = Lexicon.read(path)
    torch.manual_seed(0)
    symbols = Symbols.of(lexicon)
    as_process(1, count)
    module = G2PTraining(Shape("gru", 1, 4, 4, 0.0), lexicon, symbols, Settings(batch=16, max_steps=9))
    module.batches.module = type("Trained", (), {"global_step": 0})
    module.log = lambda *_: None
    module.__dict__["check_loss"] = lambda loss: loss

    def of_a_pass(rank: int, of: int) -> list:
        as_process(rank, of)
        return [batch for batch, _ in zip(module.batches, range(module.batches.batches))]

    def gradients(batch) -> list[torch.Tensor]:
        module.zero_grad()
        module.training_step(batch, 0).backward()
        return [parameter.grad.clone() for parameter in module.model.parameters()]

    whole, shares = of_a_pass(0, 1), [of_a_pass(rank, count) for rank in range(count)]

    def pairs(batches) -> list:
        return sorted(
            (tuple(x[:n].tolist()), tuple(y[:m].tolist()))
            for letters, said, scale in batches
            if scale
            for x, n, y, m in zip(letters.values.T, letters.lengths, said.values.T, said.lengths)
        )

    assert pairs(whole) == pairs(batch for share in shares for batch in share)
    assert pairs(whole) == sorted((tuple(x.tolist()), tuple(y.tolist())) for x, y in module.batches.pairs)
    for number in (0, len(whole) - 1):
        found = [gradients(share[number]) for share in shares]
        for name, expected, *parts in zip(dict(module.model.named_parameters()), gradients(whole[number]), *found):
            torch.testing.assert_close(torch.stack(parts).mean(0), expected, rtol=1e-4, atol=1e-6, msg=name)


def test_scores_of_parts_are_scores_of_all():
    words = [("ab", ("A", "B"), [("A", "B")]), ("b", ("A",), [("B",), ("B", "B")]), ("ba", ("B",), [("B", "A")])]
    whole, parts = Scores(), [Scores(), Scores(), Scores()]
    for number, word in enumerate(words):
        whole.add(*word)
        parts[number % 2].add(*word)
    assert Scores.joined(parts) == whole
