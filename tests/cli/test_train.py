"""`steploop train charlm`: what it leaves behind, resuming, and every way in which it refuses."""

import csv
import math
import shutil

import pytest
import safetensors.torch
import torch
from cli_program import TINY

from steploop.recipes import charlm_training
from steploop.recipes.charlm import Checkpoint


def contents(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("last.ckpt", "best.ckpt")}


@pytest.fixture
def copy(trained, tmp_path):
    """A trained model's folder that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


def test_what_a_run_leaves_behind(trained):
    assert (trained / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "charlm.py:" in (trained / "plan.txt").read_text()
    assert "charlm.py:" in (trained / "plan.html").read_text()
    assert list((trained / "tensorboard").rglob("events.out.tfevents.*"))
    rows = list(csv.DictReader((trained / "logs" / "version_0" / "metrics.csv").open()))
    last = [row for row in rows if row["val_nats"]][-1]
    history = Checkpoint.read(trained / "last.ckpt").history
    assert float(last["val_nats"]) == pytest.approx(history[-1]["val_nats"], rel=1e-4)
    assert history[-1]["val_bits_per_character"] == pytest.approx(history[-1]["val_nats"] / math.log(2))
    assert history[-1]["step"] == 20
    assert history[-1]["characters"] == 20 * 4 * 8
    assert not list(trained.glob("*.unfinished"))


def test_the_best_checkpoint_is_the_best_one(trained):
    history = Checkpoint.read(trained / "last.ckpt").history
    best = Checkpoint.read(trained / "best.ckpt").history[-1]
    assert best["val_nats"] == min(entry["val_nats"] for entry in history)


def test_the_weights_of_the_best_model_are_there_as_safetensors(trained):
    best = Checkpoint.read(trained / "best.ckpt")
    weights = safetensors.torch.load_file(trained / "model.safetensors")
    expected = best.model("reference").state_dict()
    assert set(weights) == set(expected)
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def test_a_budget_of_minutes_ends_a_run(steploop, text, tmp_path):
    ran = steploop("train", "charlm", "--data", text, "--out", tmp_path / "run", "--minutes", "0.02", *TINY)
    assert ran.code == 0, ran.err
    assert "bits per character" in ran.out
    assert Checkpoint.read(tmp_path / "run" / "last.ckpt").history[-1]["seconds"] > 1.2


def test_an_interrupted_run_that_is_resumed_ends_like_one_that_was_not(steploop, text, tmp_path, monkeypatch):
    command = (
        "train",
        "charlm",
        "--data",
        text,
        "--max-steps",
        "9",
        "--dropout",
        "0",
        "--cell",
        "lstm",
        *TINY,
    )
    assert steploop(*command, "--out", tmp_path / "whole").code == 0

    real = charlm_training.CharTraining.training_step

    def dies(self, window, index):
        if self.global_step == 5:
            raise RuntimeError("the power went off")
        return real(self, window, index)

    with monkeypatch.context() as patch:
        patch.setattr(charlm_training.CharTraining, "training_step", dies)
        with pytest.raises(RuntimeError, match="the power went off"):
            charlm_training_run(command, tmp_path / "parts")
    assert Checkpoint.read(tmp_path / "parts" / "last.ckpt").history[-1]["step"] == 5
    # The shape need not be typed again: it is the checkpoint's.
    ran = steploop(*command[:6], *TINY[:4], "--out", tmp_path / "parts", "--resume")
    assert ran.code == 0, ran.err
    whole, parts = (Checkpoint.read(tmp_path / name / "last.ckpt") for name in ("whole", "parts"))
    for name, value in whole.content["state_dict"].items():
        assert torch.allclose(parts.content["state_dict"][name], value, atol=1e-6), name
    assert [entry["step"] for entry in parts.history] == [entry["step"] for entry in whole.history]


def charlm_training_run(command, out):
    from steploop.cli import main

    main([str(argument) for argument in (*command, "--out", out)])


def test_an_earlier_model_is_not_replaced_silently(steploop, text, copy):
    before = contents(copy)
    ran = steploop("train", "charlm", "--data", text, "--out", copy, "--max-steps", "2", *TINY)
    assert ran.code == 2
    assert "last.ckpt is there already, and a new run would replace it" in ran.err
    assert "--resume" in ran.err and "--overwrite" in ran.err
    assert "Traceback" not in ran.err
    assert contents(copy) == before


def test_overwrite_replaces_it(steploop, text, copy):
    before = contents(copy)
    ran = steploop("train", "charlm", "--data", text, "--out", copy, "--max-steps", "2", "--overwrite", *TINY)
    assert ran.code == 0, ran.err
    assert Checkpoint.read(copy / "last.ckpt").history[-1]["step"] == 2
    assert contents(copy)["best.ckpt"] != before["best.ckpt"]


def test_a_run_that_dies_while_saving_leaves_the_previous_checkpoint(text, copy, monkeypatch, capsys):
    before = contents(copy)

    def disk_full(self, path, *_, **__):
        path.write_bytes(b"half a checkp")
        raise OSError("No space left on device")

    monkeypatch.setattr(charlm_training.L.Trainer, "save_checkpoint", disk_full)
    with pytest.raises(SystemExit) as end:
        charlm_training_run(
            ("train", "charlm", "--data", text, "--max-steps", "2", "--overwrite", *TINY), copy
        )
    assert end.value.code == 2 and "No space left" in capsys.readouterr().err
    assert contents(copy) == before
    assert not list(copy.glob("*.unfinished"))


def test_a_run_that_diverges_leaves_the_previous_checkpoint(steploop, text, copy, monkeypatch):
    before = contents(copy)
    monkeypatch.setattr(
        charlm_training, "cross_entropy", lambda logits, targets, **_: logits.sum() * math.nan
    )
    ran = steploop(
        "train", "charlm", "--data", text, "--out", copy, "--max-steps", "30", "--resume", *TINY[:4]
    )
    assert ran.code == 2
    assert "Training diverged: the loss of step 20 is nan" in ran.err
    assert "a lower --learning-rate" in ran.err
    assert contents(copy) == before


def test_a_checkpoint_of_another_model(steploop, text, copy):
    before = contents(copy)
    ran = steploop(
        "train", "charlm", "--data", text, "--out", copy, "--max-steps", "30", "--resume", "--layers", "3"
    )
    assert ran.code == 2
    assert "holds another model" in ran.err
    assert "checkpoint: 1 x 8 GRU, embedding 4" in ran.err
    assert "asked for:  3 x 8 GRU, embedding 4" in ran.err
    assert contents(copy) == before


def test_a_checkpoint_of_another_vocabulary(steploop, text, copy, tmp_path):
    before = contents(copy)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("c", "k"))
    ran = steploop(
        "train", "charlm", "--data", other, "--out", copy, "--max-steps", "30", "--resume", *TINY[:4]
    )
    assert ran.code == 2
    assert "was trained on a text with other characters" in ran.err
    assert "acd" in ran.err and "adehk" in ran.err  # both alphabets
    assert contents(copy) == before


def test_nothing_to_resume(steploop, text, tmp_path):
    ran = steploop("train", "charlm", "--data", text, "--out", tmp_path / "none", "--resume", *TINY)
    assert ran.code == 2
    assert f"No such checkpoint: {tmp_path / 'none' / 'last.ckpt'}" in ran.err


@pytest.mark.parametrize(
    "content, told",
    [
        (b"not a checkpoint", "is not a checkpoint"),
        (None, "is a checkpoint of another model"),
    ],
)
def test_not_a_checkpoint_of_this_recipe(steploop, text, tmp_path, content, told):
    path = tmp_path / "last.ckpt"
    if content is None:
        torch.save({"state_dict": {"weight": torch.zeros(1)}}, path)
    else:
        path.write_bytes(content)
    ran = steploop("train", "charlm", "--data", text, "--out", tmp_path, "--resume", *TINY)
    assert ran.code == 2
    assert told in ran.err


def test_a_budget_that_is_spent(steploop, text, copy):
    ran = steploop(
        "train", "charlm", "--data", text, "--out", copy, "--max-steps", "20", "--resume", *TINY[:4]
    )
    assert ran.code == 2
    assert "has been trained for 20 steps already" in ran.err


def test_a_run_that_was_killed_at_its_very_end_leaves_the_rest_when_it_is_resumed(steploop, text, copy):
    """It was killed after its last checkpoint: between that and the best one, or before the weights and the curve."""
    weights = (copy / "model.safetensors").read_bytes()
    last_is_best = Checkpoint.read(copy / "last.ckpt").history == Checkpoint.read(copy / "best.ckpt").history
    for name in ("model.safetensors", "curve.png", *(["best.ckpt"] if last_is_best else [])):
        (copy / name).unlink()
    ran = steploop("train", "charlm", "--data", text, "--out", copy, "--resume", "--max-steps", "20", *TINY)
    assert ran.code == 2 and "has been trained for 20 steps already" in ran.err
    assert (copy / "model.safetensors").read_bytes() == weights
    assert (copy / "curve.png").read_bytes().startswith(b"\x89PNG") and (copy / "best.ckpt").exists()


@pytest.mark.parametrize(
    "content, told",
    [
        ("", "is empty: there is nothing to learn from"),
        ("too short", "The text is too short: 9 characters (8 to train on, the rest for validation) cannot be cut"),
        ("x", "The text is too short: 1 character (0 to train on, the rest for validation) cannot be cut into 4"),
    ],
)
def test_texts_that_cannot_be_learned_from(steploop, copy, tmp_path, content, told):
    before = contents(copy)
    path = tmp_path / "text.txt"
    path.write_text(content)
    ran = steploop("train", "charlm", "--data", path, "--out", copy, "--max-steps", "2", "--overwrite", *TINY)
    assert ran.code == 2
    assert told in ran.err
    assert contents(copy) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there(steploop, text, tmp_path):
    ran = steploop("train", "charlm", "--data", text, "--out", tmp_path / "run", "--device", "cuda")
    assert ran.code == 2
    assert "torch finds no CUDA device" in ran.err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_a_run_on_a_gpu_goes_on(steploop, text, tmp_path):
    for more in (("--max-steps", "3"), ("--max-steps", "5", "--resume")):
        ran = steploop("train", "charlm", "--data", text, "--out", tmp_path, "--device", "cuda", *more, *TINY)
        assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("--minutes", "0"), "--minutes is above 0, got 0"),
        (("--max-steps", "-1"), "--max-steps is above 0, got -1"),
        (("--learning-rate", "0"), "--learning-rate is above 0, got 0"),
        (("--resume", "--overwrite"), "give one of them"),
    ],
)
def test_settings_that_mean_nothing(steploop, text, tmp_path, arguments, told):
    ran = steploop("train", "charlm", "--data", text, "--out", tmp_path / "run", *arguments)
    assert ran.code == 2
    assert told in ran.err
