"""`steploop train g2p`, `g2p`, `evaluate g2p`: the model against the plain loop, resuming, words that do not fit."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from g2p_dictionary import TINY, dictionary

import steploop as sl
from steploop.recipes import g2p_training
from steploop.recipes.g2p import Checkpoint, Model, Pronouncer, Shape
from steploop.recipes.lexicon import Lexicon, Symbols

EAGER = ("--backend", "eager")  # nothing to compile
COMMAND = ("train", "g2p", "--max-steps", "6", "--dropout", "0.3", *TINY)


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.dict"
    path.write_text(dictionary())
    return path


@pytest.fixture(scope="session")
def pronounces(words, tmp_path_factory) -> Path:
    """The folder of a model that was trained for some steps. Tests must not change it."""
    from steploop.cli import main

    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.raises(SystemExit) as end:
        main([*COMMAND, "--data", str(words), "--out", str(folder)])
    assert not end.value.code
    return folder


@pytest.fixture(scope="session")
def checkpoint(pronounces) -> Checkpoint:
    return Checkpoint.read(pronounces / "model.safetensors")


@pytest.fixture(scope="session")
def loaded(checkpoint) -> Model:
    return checkpoint.model("eager")


@pytest.fixture
def one_model(loaded, monkeypatch):
    """The commands use one model object, whose loops need to be captured once."""
    monkeypatch.setattr(Checkpoint, "model", lambda self, backend: loaded)


def test_the_model_is_the_plain_loop():
    torch.manual_seed(0)
    symbols = Symbols("abcde", ("A", "B", "C", "D", "E"))
    models = [Model(6, 6, Shape("lstm", 2, 6, 3, 0.0), backend) for backend in ("eager", "reference")]
    models[1].load_state_dict(models[0].state_dict())
    pad = sl.seq2seq.buckets.pad_to_longest
    # Sizes one after the other: padding, a single letter, no padding.
    for words in (["abc", "de", "eeeeeda"], ["a"], ["ab", "cd"]):
        (x, lengths), (y, label_lengths) = pad([(symbols.spell(w), symbols.say(tuple(w.upper()))) for w in words])
        found = []
        for model in models:
            scores = model(x, lengths, y, label_lengths)
            model.zero_grad()
            scores.sin().sum().backward()
            found.append([scores, *(p.grad for p in model.parameters())])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_a_word_is_said_alike_in_any_company(loaded, checkpoint):
    say = Pronouncer(loaded, checkpoint.symbols, beam=2, n_best=2).say
    words = ["abc", "e", "dabba", "ce"]
    together = say(words)
    for first in (0, 2):
        for one, other in zip(together[first : first + 2], say(words[first : first + 2]), strict=True):
            assert [p.phonemes for p in one] == [p.phonemes for p in other]
            assert [p.score for p in one] == pytest.approx([p.score for p in other], abs=1e-4)


def test_scores_are_the_trained_models(loaded, checkpoint):
    """What a search says of a pronunciation is what training says of it."""
    symbols = checkpoint.symbols
    for word, found in zip(("abc", "dabba"), Pronouncer(loaded, symbols, 2, 2).say(["abc", "dabba"]), strict=True):
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
        for one in found:
            labels = symbols.say(one.phonemes)[: len(one.phonemes) + one.finished, None]
            scores = loaded(
                symbols.spell(word)[:, None], torch.tensor([len(word)]), labels, torch.tensor([len(labels)])
            )
            log_probs = scores.log_softmax(-1)[:, 0].gather(1, labels)
            assert log_probs.sum().item() == pytest.approx(one.score, abs=1e-3)


def test_what_a_run_leaves_behind(pronounces):
    for name in ("curve.png", "plan.txt", "plan.html", "last.ckpt", "best.ckpt", "model.safetensors"):
        assert (pronounces / name).stat().st_size > 0, name
    assert "decoder.py:" in (pronounces / "plan.txt").read_text()
    assert list((pronounces / "tensorboard").rglob("events.out.tfevents.*"))
    history = Checkpoint.read(pronounces / "last.ckpt").history
    assert history[-1]["step"] == 6 and history[-1]["words"] == 6 * 16
    best, exported = (Checkpoint.read(pronounces / name) for name in ("best.ckpt", "model.safetensors"))
    assert best.history[-1]["dev_per"] == min(entry["dev_per"] for entry in history)
    assert (exported.shape, exported.symbols) == (best.shape, best.symbols)
    for name, value in best.weights.items():
        assert torch.equal(exported.weights[name], value), name


def test_a_run_that_is_killed_and_resumed_ends_like_one_that_was_not(steploop, words, pronounces, tmp_path):
    program = (
        "import os, signal, sys\n"
        "from steploop.cli import main\n"
        "from steploop.recipes.g2p_training import G2PTraining as T\n"
        "real = T.training_step\n"
        "def dies(self, batch, index):\n"
        "    if self.global_step == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, batch, index)\n"
        "T.training_step = dies\n"
        "main(sys.argv[1:])\n"
    )
    arguments = [*COMMAND, "--data", str(words), "--out", str(tmp_path / "parts")]
    killed = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert Checkpoint.read(tmp_path / "parts" / "last.ckpt").history[-1]["step"] == 3
    ran = steploop(*arguments, "--resume")
    assert ran.code == 0, ran.err
    whole, resumed = (Checkpoint.read(folder / "last.ckpt") for folder in (pronounces, tmp_path / "parts"))
    for name, value in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name], value, atol=1e-6, rtol=0)
    for one, other in zip(whole.history, resumed.history, strict=True):
        assert other["train_nats"] == pytest.approx(one["train_nats"], abs=1e-5)
        assert other["dev_per"] == one["dev_per"]


def test_dev_per_halves_the_learning_rate_and_ends_training(words):
    lexicon = Lexicon.read(words)
    module = g2p_training.G2PTraining(
        Shape("gru", 1, 4, 4), lexicon, Symbols.of(lexicon), g2p_training.Settings(max_steps=100)
    )
    module.history = [{"dev_per": per, **module.budget()} for per in (0.5, 0.4, 0.4, 0.41)]
    assert (module.without_gain(), module.halvings(), module.ended_early()) == (2, 1, False)
    module.history += [{"dev_per": per, **module.budget()} for per in (0.39, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4)]
    assert (module.without_gain(), module.halvings(), module.ended_early()) == (6, 4, True)
    module.settings = g2p_training.Settings(max_steps=200)  # a run with a larger budget waits as long again
    assert not module.ended_early()


@pytest.mark.parametrize("options, told", [
    (("--resume", "--overwrite"), "give one of them"),
    (("--units", "7"), "--units is an even number"),
    (("--minutes", "0"), "--minutes is above 0"),
    (("--data", "none.dict"), "No such file"),
    (("--learning-rate", "nan"), "finite"),
])  # fmt: skip
def test_settings_that_mean_nothing(steploop, tmp_path, options, told):
    ran = steploop("train", "g2p", "--out", tmp_path / "run", *options)
    assert ran.code == 2 and told in ran.err and "Traceback" not in ran.err
    assert not (tmp_path / "run").exists()


def test_a_dictionary_without_dev_words(steploop, tmp_path):
    (tmp_path / "few.dict").write_text("a AH\nb B\n")
    ran = steploop("train", "g2p", "--data", tmp_path / "few.dict", "--out", tmp_path / "run")
    assert ran.code == 2 and "too small: none of its 2 words falls into the dev part" in ran.err


def test_another_model_is_in_the_way(steploop, words, pronounces, tmp_path):
    copy = shutil.copytree(pronounces, tmp_path / "run")
    ran = steploop("train", "g2p", "--data", words, "--out", copy, *TINY)
    assert ran.code == 2 and "--resume to train it further, --overwrite to replace it" in ran.err
    ran = steploop("train", "g2p", "--data", words, "--out", copy, "--resume", "--max-steps", "99", "--units", "16")
    assert ran.code == 2 and "asked for:  1 x 16 GRU" in ran.err
    ran = steploop("train", "g2p", "--data", words, "--out", copy, "--resume", "--max-steps", "99", "--stress")
    assert ran.code == 2 and "other letters or phonemes" in ran.err
    ran = steploop("train", "g2p", "--data", words, "--out", copy, "--resume", "--max-steps", "6")
    assert ran.code == 2 and "has been trained for 6 steps already" in ran.err


def test_words_are_said(steploop, pronounces, one_model):
    ran = steploop("g2p", "--model", pronounces / "model.safetensors", "abc", "Bad", "--n-best", "2", "--beam", "2")
    assert ran.code == 0, ran.err
    lines = [line.split("\t") for line in ran.out.splitlines()]
    assert [line[0] for line in lines] == ["abc"] * 2 + ["Bad"] * 2
    for _, phonemes, score, *note in lines:
        assert set(phonemes.split()) <= {"AH", "B", "K", "D", "IY", "AY"} and float(score) < 0
        assert note in ([], ["proved"], ["cut"])
    # The checkpoint is the same model, and the input may have the words; what cannot be read is told.
    text = "abc naïve\n\nBad\n"
    again = steploop("g2p", "--model", pronounces / "best.ckpt", "--n-best", "2", "--beam", "2", input=text)
    assert again.code == 1 and again.out == ran.out
    assert "'naïve' has the characters 'n', 'v', 'ï', which the model has never seen" in again.err


def test_no_word_that_can_be_read(steploop, pronounces):
    ran = steploop("g2p", *EAGER, "--model", pronounces / "model.safetensors", "abcx", "")
    assert ran.code == 1 and ran.out == ""
    assert "'x'" in ran.err and "An empty word" in ran.err and "Traceback" not in ran.err


def test_the_attention_as_a_picture(steploop, pronounces, one_model, loaded, checkpoint, tmp_path):
    model = ("--model", pronounces / "model.safetensors", "--beam", "1")
    ((found,),) = Pronouncer(loaded, checkpoint.symbols).say(["abcd"], weights=True)
    assert found.weights.shape == (len(found.phonemes) + found.finished, 4)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(len(found.weights)))
    ran = steploop("g2p", *model, "abcd", "--alignment", tmp_path / "look.png")
    assert ran.code == 0, ran.err
    assert (tmp_path / "look.png").read_bytes().startswith(b"\x89PNG")
    ran = steploop("g2p", *model, "ab", "cd", "--alignment", tmp_path / "look.png")
    assert ran.code == 2 and "draws the attention of one word; got 2" in ran.err


@pytest.mark.parametrize("name, content, told", [
    ("none.ckpt", None, "steploop train g2p makes one"),
    ("none.safetensors", None, "steploop train g2p makes one"),
    ("bad.safetensors", b"\x00" * 40, "is not a safetensors file"),
    ("bad.ckpt", b"", "it is empty"),
])  # fmt: skip
def test_models_that_are_none(steploop, tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ran = steploop("g2p", "a", "--model", tmp_path / name)
    assert ran.code == 2 and told in ran.err and "Traceback" not in ran.err


def test_a_run_that_has_not_ended(steploop, tmp_path):
    """Its weights stand in no file of their own yet."""
    (tmp_path / "best.ckpt").write_bytes(b"any")
    ran = steploop("g2p", "a", "--model", tmp_path / "model.safetensors")
    assert ran.code == 2 and "best.ckpt, the best so far of a run that has not ended" in " ".join(ran.err.split())


def test_the_model_of_another_recipe(steploop, trained, tmp_path):
    ran = steploop("g2p", "a", "--model", trained / "best.ckpt")
    assert ran.code == 2 and "a checkpoint of another model" in ran.err
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    ran = steploop("g2p", "a", "--model", tmp_path / "other.safetensors")
    assert ran.code == 2 and "weights of another model" in ran.err


def test_evaluate(steploop, words, pronounces, one_model, tmp_path):
    model = ("--model", pronounces / "model.safetensors", "--data", words)
    ran = steploop("evaluate", "g2p", *model, "--part", "dev", "--beam", "2", "--out", tmp_path)
    assert ran.code == 0, ran.err
    assert "greedy" in ran.out and "beam 2" in ran.out and "confusions" in ran.out
    numbers = json.loads((tmp_path / "dev-scores.json").read_text())
    best = Checkpoint.read(pronounces / "model.safetensors").history[-1]
    assert numbers["greedy"]["per"] == pytest.approx(best["dev_per"])
    assert numbers["greedy"]["wer"] == pytest.approx(best["dev_wer"])
    assert (tmp_path / "dev-by-length.png").read_bytes().startswith(b"\x89PNG")
    ran = steploop("evaluate", "g2p", *model, "--part", "all")
    assert ran.code == 2 and "--part is one of train, dev, test" in ran.err


def test_stress_from_training_to_a_word(steploop, words, tmp_path):
    """The digits are phonemes of their own then, in training, in what is said and in what is judged."""
    out, model = tmp_path / "stressed", ("--model", tmp_path / "stressed" / "model.safetensors")
    ran = steploop("train", "g2p", "--data", words, "--stress", "--out", out, *TINY, "--max-steps", "6")
    assert ran.code == 0, ran.err
    symbols = Checkpoint.read(out / "model.safetensors").symbols
    assert symbols.stress and {"AH1", "IY0"} <= set(symbols.phonemes)
    ran = steploop("g2p", *model, "abcd", "--beam", "1")
    assert ran.code == 0 and set(ran.out.split("\t")[1].split()) <= set(symbols.phonemes), ran.out + ran.err
    ran = steploop("evaluate", "g2p", *model, "--data", words, "--part", "dev", "--beam", "1", "--out", tmp_path)
    assert ran.code == 0 and "greedy" in ran.out, ran.err
