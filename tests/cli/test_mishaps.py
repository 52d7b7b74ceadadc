"""What goes wrong at a command line: exit code 2 and a message with the fix, never a traceback."""

from __future__ import annotations

import pytest

CELL = """
import steploop as sl, torch

class Cell(sl.Step):
    def __init__(self):
        super().__init__()
        self.w, self.h = torch.nn.Linear(3, 3), sl.State(3)

    def step(self, x):
        self.h.next = torch.tanh(self.w(x) + self.h.prev)
        return self.h.next

def example():
    raise KeyError("mine")
"""


def told(ran, *parts):
    assert ran.code == 2, ran.out + ran.err
    assert "Traceback" not in ran.err
    shown = " ".join(ran.err.replace("│", " ").split())
    for part in parts:
        assert part in shown, ran.err


@pytest.mark.parametrize(
    "content, why",
    [(b"", "it is empty"), (b"PK\x03\x04 cut", "it is cut short"), (b"\x80\x05 no pickle of ours", "could run code")],
)
def test_a_checkpoint_that_is_none(steploop, tmp_path, content, why):
    file = tmp_path / "best.ckpt"
    file.write_bytes(content)
    ran = steploop("sample", "--checkpoint", file)
    told(ran, "is not a checkpoint", why)
    assert "weights_only" not in ran.err


def test_a_checkpoint_that_was_cut(steploop, trained, tmp_path):
    file = tmp_path / "best.ckpt"
    file.write_bytes((trained / "best.ckpt").read_bytes()[:5000])
    told(steploop("sample", "--checkpoint", file), "it is cut short", "fix:")


def test_out_that_is_a_file(steploop, text, tmp_path):
    (tmp_path / "file").write_text("")
    told(steploop("train", "charlm", "--data", text, "--out", tmp_path / "file"), "is a file")
    below = steploop("train", "charlm", "--data", text, "--out", tmp_path / "file" / "run", "--max-steps", "1")
    told(below, "Not a directory", "fix:")


@pytest.mark.parametrize("option, value", [
    ("--seed", "-1"), ("--seed", "99999999999999999999"), ("--learning-rate", "nan"), ("--learning-rate", "inf"),
    ("--minutes", "inf"), ("--minutes", "-1"), ("--dropout", "nan"), ("--max-steps", "-3"),
])  # fmt: skip
def test_numbers_that_are_none(steploop, text, tmp_path, option, value):
    told(steploop("train", "charlm", "--data", text, "--out", tmp_path / "run", option, value), option)


def test_a_full_disk(steploop, text, tmp_path, monkeypatch):
    import torch

    def full(*_, **__):
        raise OSError(28, "No space left on device", "last.ckpt")

    monkeypatch.setattr(torch, "save", full)
    ran = steploop("train", "charlm", "--data", text, "--out", tmp_path / "run", "--max-steps", "2",
                   "--streams", "2", "--steps", "8", "--units", "4", "--embedding", "4")  # fmt: skip
    told(ran, "No space left on device", "--resume")


@pytest.mark.parametrize(
    "program, arguments, parts",
    [
        ("def (", (), ("steps.py:1", "invalid syntax")),
        ("x = 1\0", (), ("steps.py", "null bytes")),
        ("1 / 0", (), ("steps.py:1", "ZeroDivisionError")),
        ("import sys; sys.exit(5)", (), ("SystemExit: 5",)),
        (CELL, (), ("steps.py:14", "KeyError: 'mine'")),
        (CELL, ("--input", "3,4,5"), ("steps.py:10", "linear((4, 5) float32, (3, 3) float32")),
        (CELL, ("--input", "3,4,3", "--init", "7"), ("Cell(7)", "--init")),
        (CELL, ("--input", "3,4,3", "--html", "/no/such/folder/plan.html"), ("No such file or directory", "fix:")),
    ],
)
def test_explain_of_a_broken_file(steploop, tmp_path, program, arguments, parts):
    file = tmp_path / "steps.py"
    file.write_text(program)
    told(steploop("explain", f"{file}:Cell", *arguments), *parts)
