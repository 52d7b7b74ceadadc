"""Options and surroundings that all tests share."""

from __future__ import annotations

import os

import pytest
import torch
from spans import cut_time


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the long property tests")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    skip = pytest.mark.skip(reason="long: only with --long")
    for item in items:
        if "long" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """STEPLOOP_TEST_SPANS=3 in the environment: every run is cut into spans of so many steps, as long ones are."""
    steps = os.environ.get("STEPLOOP_TEST_SPANS")
    if steps:
        cut_time(monkeypatch, int(steps))
