"""Options and surroundings that all tests share."""

from __future__ import annotations

import contextlib
import os
import re
import weakref
from pathlib import Path

import devices
import pytest
import torch
from emulated_gpu import EmulatedCuda
from pairs import beyond, left_out
from spans import cut_time
from toy_backend import Toy

import steploop as sl
from steploop.backends import choose
from steploop.compiler import capture_store


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the long property tests")
    parser.addoption("--few", action="store_true", help="of each test two sets of parameters at most")
    parser.addoption("--toy", action="store_true", help="also run the oracle tests on a backend from outside")
    parser.addoption("--emulated", action="store_true", help='also run the oracle tests on an emulated "cuda"')
    parser.addoption("--device", choices=["cpu", "cuda", "pretended"], help="where tests run; see tests/devices.py")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--toy"):
        choose.register(Toy())
    if config.getoption("--emulated"):
        choose.register(EmulatedCuda())
        choose._order.remove(EmulatedCuda.name)  # "auto" does not try it
    os.environ["STEPLOOP_CHECK_GRAPHS"] = "1"  # every graph is checked after every pass, in child processes too
    torch.set_num_threads(min(2, torch.get_num_threads()))
    torch.backends.cudnn.allow_tf32 = False  # products of float32 are not TF32 by torch's default; convolutions are


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    fewer = left_out(items) | (beyond(2, items) if config.getoption("--few") else set())
    config.hook.pytest_deselected(items=[item for item in items if item in fewer])
    items[:] = [item for item in items if item not in fewer]
    skip = pytest.mark.skip(reason="long: only with --long")
    for item in items:
        if "long" in item.keywords:
            item.add_marker(skip)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Where a machine has more than a CPU, tests of some folders run once on each device."""
    found = devices.available(metafunc.config.getoption("--device"))
    file = Path(metafunc.module.__file__)
    if found != ["cpu"] and file.parent.name in devices.EVERY_DEVICE and file.stem not in devices.ON_THE_CPU:
        metafunc.parametrize("_device", found, indirect=True)


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest):
    device = getattr(request, "param", "cpu")
    with devices.MakesOn(device) if device != "cpu" else contextlib.nullcontext():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """A test of a native backend, each of which runs on devices of one kind, is skipped on others."""
    try:
        return (yield)
    except sl.UnsupportedError as error:
        if re.search("its values are on .* native loops run on", str(error)) is None:
            raise
        pytest.skip("the native backend runs on other devices")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_captures_of_other_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of other tests that are not collected yet serve no step of this one: tests count captures.

    Where a test is marked `shared_captures` equal steps of several tests serve each other, as they do for users.
    """
    if request.node.get_closest_marker("shared_captures"):
        return
    monkeypatch.setattr(capture_store, "_BY_CLASS", weakref.WeakKeyDictionary())


@pytest.fixture(autouse=True)
def _short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """STEPLOOP_TEST_SPANS=3 in the environment: every run is cut into spans of so many steps, as long ones are."""
    steps = os.environ.get("STEPLOOP_TEST_SPANS")
    if steps:
        cut_time(monkeypatch, int(steps))
