"""A small text, a trained model, and the program itself."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
from cli_program import TINY, Ran

pytest.importorskip("lightning")
pytest.importorskip("typer")


@pytest.fixture
def steploop(capsys, monkeypatch):
    """steploop("sample", "--length", "3", input="...") -> Ran: the program, in this process."""
    from steploop.cli import main

    def run(*arguments: object, input: str = "") -> Ran:
        monkeypatch.setattr("sys.stdin", io.StringIO(input))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(int(end.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """3,000 characters of an easy language."""
    words = random.Random(0).choices(["the", "cat", "sat", "on", "a", "mat\n", "and", "purred."], k=700)
    path = tmp_path_factory.mktemp("text") / "cat.txt"
    path.write_text(" ".join(words)[:3000])
    return path


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory) -> Path:
    """The folder of a model that was trained for a few steps. Tests must not change it."""
    from steploop.cli import main

    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.raises(SystemExit) as end:
        main(["train", "charlm", "--data", str(text), "--out", str(folder), "--max-steps", "20", *TINY])
    assert not end.value.code
    return folder
