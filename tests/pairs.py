"""Which of all combinations of a test's parameters run by default.

A test with `pytest.mark.pairs` runs so many of them that every two values of two parameters meet; --long runs all. Most
mistakes that hang on parameters hang on one or two (Kuhn, Wallace, Gallo 2004).
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import combinations

import pytest


def left_out(items: list[pytest.Item]) -> set[pytest.Item]:
    """The marked items that add no new pair of values."""
    tests: dict[object, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("pairs") and hasattr(item, "callspec"):
            tests[item.parent, item.function].append(item)
    return {item for together in tests.values() for item in _left_out_of(together)}


def _left_out_of(items: list[pytest.Item]) -> list[pytest.Item]:
    met: set[object] = set()
    out = []
    for item in random.Random(0).sample(items, len(items)):
        values = sorted((name, id(value)) for name, value in item.callspec.params.items())  # the lists' own objects
        new = set(combinations(values, 2)) - met
        met |= new
        if not new and len(values) > 2:
            out.append(item)
    return out


def beyond(count: int, items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Of every test all sets of parameters but the first so many."""
    seen: Counter[str] = Counter()
    found = set()
    for item in items:
        name = item.nodeid.partition("[")[0]
        seen[name] += 1
        if seen[name] > count:
            found.add(item)
    return found
