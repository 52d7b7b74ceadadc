"""Error rates against all references of a word, and what is confused with what."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steploop.recipes.g2p_scores import NOTHING, Scores, closest, confusions, draw_by_length

phonemes = st.lists(st.sampled_from(["AH", "B", "K", "IY"]), max_size=6).map(tuple)


def edits(a, b):
    """The textbook's recursion."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


@given(phonemes, phonemes)
def test_distances_and_confusions(right, said):
    distance, reference = closest(said, [right])
    assert reference == right and distance == edits(right, said)
    found = list(confusions(right, said))
    assert len(found) == distance
    assert all(a != b and {a, b} - {NOTHING} <= {*right, *said} for a, b in found)


def test_rates():
    scores = Scores()
    scores.add("read", ("R", "IY", "D"), [("R", "EH", "D"), ("R", "IY", "D")])
    scores.add("cab", ("K", "AE", "P"), [("K", "AE", "B")])
    scores.add("abed", ("AH", "B"), [("AE", "B", "EH", "D", "D"), ("AH", "B", "EH", "D")])
    assert (scores.words, scores.wrong) == (3, 2)
    assert scores.wer == pytest.approx(2 / 3)
    assert scores.per == pytest.approx((0 + 1 + 2) / (3 + 3 + 4))  # the phonemes of the closest references
    assert scores.confusions == {("B", "P"): 1, ("EH", NOTHING): 1, ("D", NOTHING): 1}
    assert scores.by_length == {4: [2, 1], 3: [1, 1]}
    assert scores.as_dict() == {"per": pytest.approx(0.3), "wer": pytest.approx(2 / 3), "words": 3, "phonemes": 10}


def test_nothing_said_is_all_wrong():
    scores = Scores()
    scores.add("ab", (), [("AH", "B")])
    assert scores.per == scores.wer == 1
    assert Scores().per == Scores().wer == 0


def test_the_picture(tmp_path):
    scores = Scores()
    scores.add("ab", ("AH",), [("AH", "B")])
    draw_by_length({"greedy": scores, "beam 4": scores}, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
