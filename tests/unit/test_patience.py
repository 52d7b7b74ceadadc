"""A person at a terminal is told what a first call does, where that takes long."""

import io
import time
from contextlib import redirect_stderr

import pytest

from steploop.compiler import patience


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A terminal in place of stderr, and a person who waits for a tenth of a second."""
    shown = Terminal()
    monkeypatch.setattr(patience, "AFTER", 0.1)
    monkeypatch.setattr(patience, "_ended", 0.0)
    monkeypatch.delenv("STEPLOOP_QUIET", raising=False)
    return shown


def part(terminal, seconds, doing="capturing Decoder"):
    with redirect_stderr(terminal), patience.long_part(doing):
        time.sleep(seconds)


def test_a_long_part_is_told_once(terminal):
    part(terminal, 0.3)
    part(terminal, 0.3, "building native loops")
    assert terminal.getvalue().count("\n") == 1
    assert "capturing Decoder" in terminal.getvalue() and "STEPLOOP_QUIET=1" in terminal.getvalue()


def test_short_parts_of_one_call_count_together(terminal):
    for _ in range(4):
        part(terminal, 0.06)
    assert terminal.getvalue().count("\n") == 1


def test_a_later_call_is_told_again(terminal, monkeypatch):
    monkeypatch.setattr(patience, "TOGETHER", 0.0)
    for _ in range(2):
        part(terminal, 0.3)
        time.sleep(0.01)
    assert terminal.getvalue().count("\n") == 2


def test_nothing_is_told_of_what_is_short(terminal, monkeypatch):
    monkeypatch.setattr(patience, "AFTER", 10.0)
    part(terminal, 0)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("reason", ["asked for", "no terminal", "no stderr"])
def test_nobody_is_told(terminal, monkeypatch, reason):
    if reason == "asked for":
        monkeypatch.setenv("STEPLOOP_QUIET", "1")
    elif reason == "no terminal":
        monkeypatch.setattr(terminal, "isatty", lambda: False)
    part(terminal if reason != "no stderr" else None, 0.2)
    assert terminal.getvalue() == ""


def test_an_error_goes_through(terminal):
    with pytest.raises(ZeroDivisionError), redirect_stderr(terminal), patience.long_part("capturing Decoder"):
        raise ZeroDivisionError
    time.sleep(0.2)
    assert terminal.getvalue() == ""
