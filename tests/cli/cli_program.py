"""What the tests of the command line share."""

from dataclasses import dataclass

# Tests train for a handful of steps on a few characters: what is tested is what happens around the training.
TINY = ("--streams", "4", "--steps", "8", "--units", "8", "--layers", "1", "--embedding", "4")


@dataclass
class Ran:
    code: int
    out: str
    err: str
