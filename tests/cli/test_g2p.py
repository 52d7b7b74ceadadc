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

TINY_SHAPE = Shape("gru", 1, 8, 4, 0.0)


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
        main(["train", "g2p", "--data", str(words), "--out", str(folder), "--max-steps", "60", *TINY])
    assert not end.value.code
    return folder


def batch(symbols: Symbols, words: list[str]):
    """(letters, lengths, labels, lengths) of words that are said letter by letter."""
    pad = sl.seq2seq.buckets.pad_to_longest
    spelled = pad([symbols.spell(word) for word in words])
    said = pad([symbols.say(tuple(word.upper())) for word in words])
    return spelled.values, spelled.lengths, said.values, said.lengths


SYMBOLS = Symbols("abcde", ("A", "B", "C", "D", "E"))


@pytest.mark.parametrize("shape", [TINY_SHAPE, Shape("lstm", 2, 6, 3, 0.0)], ids=str)
def test_the_model_is_the_plain_loop(shape):
    torch.manual_seed(0)
    models = [Model(6, 6, shape, backend) for backend in ("auto", "reference")]
    models[1].load_state_dict(models[0].state_dict())
    # Sizes one after the other: padding, none, a single word, a single letter.
    for words in (["abc", "de", "eeeeeda"], ["ab", "cd"], ["abcd"], ["a"], ["dd", "abcab", "c", "e"]):
        found = []
        for model in models:
            scores = model(*batch(SYMBOLS, words))
            model.zero_grad()
            scores.sin().sum().backward()
            found.append([scores, *(p.grad for p in model.parameters())])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(3)
    return Model(6, 6, TINY_SHAPE).eval()


@pytest.mark.parametrize("beam", [1, 4])
def test_a_word_is_said_alone_as_among_others(model, beam):
    words = ["abc", "e", "dabba", "ce"]
    together = Pronouncer(model, SYMBOLS, beam, beam).say(words)
    for word, found in zip(words, together, strict=True):
        (alone,) = Pronouncer(model, SYMBOLS, beam, beam).say([word])
        assert [one.phonemes for one in alone] == [one.phonemes for one in found]
        assert [one.score for one in alone] == pytest.approx([one.score for one in found], abs=1e-4)


def test_scores_are_the_trained_models(model):
    """What a search says of a pronunciation is what training says of it."""
    for word, found in zip(("abc", "dabba"), Pronouncer(model, SYMBOLS, 3, 3).say(["abc", "dabba"]), strict=True):
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
        for one in found:
            labels = [SYMBOLS.phonemes.index(p) + 1 for p in one.phonemes] + [0] * one.finished
            spelled = SYMBOLS.spell(word)[:, None]
            given = torch.tensor(labels)[:, None]
            scores = model(spelled, torch.tensor([len(word)]), given, torch.tensor([len(labels)]))
            log_probs = scores.log_softmax(-1)[:, 0].gather(1, given)
            assert log_probs.sum().item() == pytest.approx(one.score, abs=1e-3)


def test_where_it_looked(model):
    (found,) = Pronouncer(model, SYMBOLS, 2, 2).say(["abca"], weights=True)
    for one in found:
        assert one.weights.shape == (len(one.phonemes) + one.finished, 4)
        torch.testing.assert_close(one.weights.sum(1), torch.ones(len(one.weights)))
    # It says the same when nobody wants to know.
    assert [one.phonemes for one in Pronouncer(model, SYMBOLS, 2, 2).say(["abca"])[0]] == [
        one.phonemes for one in found
    ]


def test_what_a_run_leaves_behind(pronounces):
    for name in ("curve.png", "plan.txt", "plan.html", "last.ckpt", "best.ckpt", "model.safetensors"):
        assert (pronounces / name).stat().st_size > 0, name
    assert "decoder.py:" in (pronounces / "plan.txt").read_text()
    assert list((pronounces / "tensorboard").rglob("events.out.tfevents.*"))
    history = Checkpoint.read(pronounces / "last.ckpt").history
    assert history[-1]["step"] == 60 and history[-1]["words"] == 60 * 16
    assert history[-1]["train_nats"] < history[0]["train_nats"]
    best, exported = (Checkpoint.read(pronounces / name) for name in ("best.ckpt", "model.safetensors"))
    assert best.history[-1]["dev_per"] == min(entry["dev_per"] for entry in history)
    assert (exported.shape, exported.symbols) == (best.shape, best.symbols)
    for name, value in best.weights.items():
        assert torch.equal(exported.weights[name], value), name


def test_a_run_that_is_killed_and_resumed_ends_like_one_that_was_not(steploop, words, tmp_path):
    command = ["train", "g2p", "--data", str(words), "--max-steps", "9", "--dropout", "0.3", *TINY]
    assert steploop(*command, "--out", tmp_path / "whole").code == 0
    program = (
        "import os, signal, sys\n"
        "from steploop.cli import main\n"
        "from steploop.recipes.g2p_training import G2PTraining as T\n"
        "real = T.training_step\n"
        "def dies(self, batch, index):\n"
        "    if self.global_step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, batch, index)\n"
        "T.training_step = dies\n"
        "main(sys.argv[1:])\n"
    )
    parts = tmp_path / "parts"
    killed = subprocess.run([sys.executable, "-c", program, *command, "--out", str(parts)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert Checkpoint.read(parts / "last.ckpt").history[-1]["step"] == 5
    # The shape need not be typed again: it is the checkpoint's. Dropout has no weights, but is a part of it.
    ran = steploop(*command[:6], *TINY[6:], "--out", parts, "--resume")
    assert ran.code == 0, ran.err
    whole, resumed = (Checkpoint.read(folder / "last.ckpt") for folder in (tmp_path / "whole", parts))
    for name, value in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name], value, atol=1e-6, rtol=0), name
    for one, other in zip(whole.history, resumed.history, strict=True):
        assert other["train_nats"] == pytest.approx(one["train_nats"], abs=1e-5)
        assert other["dev_per"] == one["dev_per"]


def test_dev_per_halves_the_learning_rate_and_ends_training(words):
    lexicon = Lexicon.read(words)
    module = g2p_training.G2PTraining(TINY_SHAPE, lexicon, Symbols.of(lexicon), g2p_training.Settings(max_steps=100))
    module.validated_before = 0
    module.history = [{"dev_per": per} for per in (0.5, 0.4, 0.4, 0.41)]
    assert (module.without_gain(), module.halvings(), module.ended_early()) == (2, 1, False)
    module.history += [{"dev_per": per} for per in (0.39, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4)]
    assert (module.without_gain(), module.halvings(), module.ended_early()) == (6, 4, True)
    module.validated_before = 8  # a resumed run waits as long again
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
    ran = steploop("train", "g2p", "--data", words, "--out", copy, "--resume", "--max-steps", "60")
    assert ran.code == 2 and "has been trained for 60 steps already" in ran.err


def test_words_are_said(steploop, pronounces):
    ran = steploop("g2p", "--model", pronounces / "model.safetensors", "abc", "Bad", "--n-best", "3")
    assert ran.code == 0, ran.err
    lines = [line.split("\t") for line in ran.out.splitlines()]
    assert [line[0] for line in lines] == ["abc"] * 3 + ["Bad"] * 3
    for _, phonemes, score, *note in lines:
        assert set(phonemes.split()) <= {"AH", "B", "K", "D", "IY", "AY"} and float(score) < 0
        assert note in ([], ["proved"], ["cut"])
    scores = [float(line[2]) for line in lines]
    assert scores[:3] == sorted(scores[:3], reverse=True)
    # The checkpoint is the same model, and so is what comes through the input.
    again = steploop("g2p", "--model", pronounces / "best.ckpt", "--n-best", "3", input="abc\n\nBad\n")
    assert again.out == ran.out


def test_unknown_characters_are_named_and_the_other_words_said(steploop, pronounces):
    ran = steploop("g2p", "--model", pronounces / "model.safetensors", "ab", "naïve", "", "ba", "--beam", "1")
    assert ran.code == 1
    assert [line.split("\t")[0] for line in ran.out.splitlines()] == ["ab", "ba"]
    assert "'naïve' has the characters 'n', 'v', 'ï', which the model has never seen" in ran.err
    assert "An empty word" in ran.err and "Traceback" not in ran.err


def test_the_attention_as_a_picture(steploop, pronounces, tmp_path):
    model = ("--model", pronounces / "model.safetensors")
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


def test_the_model_of_another_recipe(steploop, trained, tmp_path):
    ran = steploop("g2p", "a", "--model", trained / "best.ckpt")
    assert ran.code == 2 and "a checkpoint of another model" in ran.err
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    ran = steploop("g2p", "a", "--model", tmp_path / "other.safetensors")
    assert ran.code == 2 and "weights of another model" in ran.err


def test_evaluate(steploop, words, pronounces, tmp_path):
    model = ("--model", pronounces / "model.safetensors", "--data", words)
    ran = steploop("evaluate", "g2p", *model, "--part", "dev", "--beam", "3", "--out", tmp_path)
    assert ran.code == 0, ran.err
    assert "greedy" in ran.out and "beam 3" in ran.out and "confusions" in ran.out
    numbers = json.loads((tmp_path / "dev-scores.json").read_text())
    best = Checkpoint.read(pronounces / "model.safetensors").history[-1]
    assert numbers["greedy"]["per"] == pytest.approx(best["dev_per"])
    assert numbers["greedy"]["wer"] == pytest.approx(best["dev_wer"])
    assert (tmp_path / "dev-by-length.png").read_bytes().startswith(b"\x89PNG")
    ran = steploop("evaluate", "g2p", *model, "--part", "all")
    assert ran.code == 2 and "--part is one of train, dev, test" in ran.err
