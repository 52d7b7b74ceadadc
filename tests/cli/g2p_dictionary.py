"""A dictionary of an easy language, as text, and what the tests of the g2p recipe train with."""

from __future__ import annotations

import random

SOUNDS = {"a": "AH1", "b": "B", "c": "K", "d": "D", "e": "IY0"}
TINY = ("--cell", "gru", "--units", "8", "--embedding", "4", "--batch", "16", "--learning-rate", "0.02",
        "--backend", "eager")  # fmt: skip


def dictionary(count: int = 150, seed: int = 0) -> str:
    """CMUdict's format: every letter has one sound, and words with an "e" may also be said with AY0 for it."""
    draw = random.Random(seed)
    words = sorted({"".join(draw.choices("abcde", k=draw.randint(1, 6))) for _ in range(count)})
    lines = []
    for word in words:
        lines.append(f"{word} {' '.join(SOUNDS[letter] for letter in word)}")
        if "e" in word:
            lines.append(f"{word}(2) {' '.join(SOUNDS[letter] for letter in word).replace('IY0', 'AY0')} # sometimes")
    return "\n".join(lines) + "\n"
