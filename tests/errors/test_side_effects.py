"""A step that changes something of Python's is refused, whatever that is: it would happen once, not at every step.
After the refusal everything is as it was, where that can be put back."""

from __future__ import annotations

import array
import collections
import contextvars
import ctypes
import itertools
import operator
import os
import queue
import secrets
import sys
import threading
import time
import types
import uuid
import weakref

import numpy as np
import pytest
import torch

import steploop as sl

VARIABLE = contextvars.ContextVar("level", default=0)


class Slots:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 0


class Key:
    pass


class Holds:
    n = 0


def function():
    return 1.0


def _generator():
    n = 0.0
    while True:
        n += 1.0
        yield n


def _up(things, key=0):
    things[key] = things[key] + 1
    return 1.0 + float(things[key])


def _up_attribute(thing, name="n"):
    setattr(thing, name, getattr(thing, name, 0) + 1)
    return 1.0 + getattr(thing, name)


def _up_of_a_module(thing):
    import module_that_is_imported  # made by the test

    module_that_is_imported.n += 1
    return 1.0 + module_that_is_imported.n


def _added(things):
    things.add(len(things))
    return float(len(things))


def _assigned(thing):
    VARIABLE.set(VARIABLE.get() + 1)
    return 1.0 + VARIABLE.get()


def _exported(thing):
    os.environ["STEPLOOP_TEST_N"] = str(int(os.environ.get("STEPLOOP_TEST_N", "0")) + 1)
    return 1.0 + int(os.environ["STEPLOOP_TEST_N"])


def _filled(things):
    things.put(1)
    return float(things.qsize())


KEY = Key()
MANY = [1.0, 2.0, 3.0, 4.0] * 9
# name: (what a step holds, how it changes that and makes a number of it)
CHANGES = {
    "a list": ([0], _up),
    "a dictionary": ({0: 0}, _up),
    "a Counter": (collections.Counter(), _up),
    "a UserDict": (collections.UserDict({0: 0}), _up),
    "a deque": (collections.deque([0]), _up),
    "a set": (set(), _added),
    "slots": (Slots(), _up_attribute),
    "a class": (Holds, _up_attribute),
    "a function": (function, _up_attribute),
    "a tensor's attribute": (torch.ones(1), _up_attribute),
    "a parameter's attribute": (torch.nn.Parameter(torch.ones(1)), _up_attribute),
    "a module": (types.ModuleType("held"), _up_attribute),
    "an imported module": (None, _up_of_a_module),
    "a thread's own": (threading.local(), _up_attribute),
    "a weak dictionary": (weakref.WeakKeyDictionary({KEY: 0}), lambda things: _up(things, KEY)),
    "an array of numpy": (np.zeros(1), _up),
    "an array": (array.array("d", [0.0]), _up),
    "bytes": (bytearray(1), _up),
    "a view of memory": (memoryview(bytearray(1)), _up),
    "a number of C": (ctypes.c_int(0), lambda thing: _up_attribute(thing, "value")),
    "an array of C": ((ctypes.c_double * 2)(), _up),
    "a queue": (queue.Queue(), _filled),
    "a context variable": (None, _assigned),
    "the environment": (None, _exported),
    "a clock": (None, lambda _: time.monotonic() % 1),
    "entropy": (None, lambda _: secrets.randbelow(9) / 9),
    "a uuid": (None, lambda _: uuid.uuid4().int % 9 / 9),
}
ITERATORS = {
    "generator": _generator,
    "count": lambda: itertools.count(1.0),
    "cycle": lambda: itertools.cycle(MANY),
    "iter": lambda: iter(MANY),
    "reversed": lambda: reversed(MANY),
    "keys": lambda: iter({1.0 * n: 0 for n in range(1, 40)}),
    "zip": lambda: zip(MANY, range(99)),
    "zip of generators": lambda: zip(_generator(), itertools.count()),
    "map": lambda: map(float, MANY),
    "map of a map": lambda: map(operator.neg, map(operator.neg, MANY)),
    "filter": lambda: filter(None, MANY),
    "enumerate": lambda: enumerate(MANY),
    "chain": lambda: itertools.chain(MANY, MANY),
    "islice": lambda: itertools.islice(itertools.count(1.0), 50),
    "accumulate": lambda: itertools.accumulate(MANY),
    "starmap": lambda: itertools.starmap(float, [(n,) for n in MANY]),
    "takewhile": lambda: itertools.takewhile(lambda n: n < 9, MANY),
    "zip_longest": lambda: itertools.zip_longest(MANY, [1.0]),
    "pairwise": lambda: itertools.pairwise(MANY),
    "tee": lambda: itertools.tee(MANY)[0],
    "the lines of a file": lambda: open(__file__),  # noqa: SIM115
}


class Changing(sl.Step):
    def __init__(self, held, change):
        super().__init__()
        self.h, self.change = sl.State(3), change
        object.__setattr__(self, "held", held)

    def step(self, x):
        self.h.next = (x + self.h.prev) * self.change(self.held)
        return self.h.next


def refused(held, change, training):
    with pytest.raises(sl.StepError) as caught, torch.set_grad_enabled(training):
        sl.Loop(Changing(held, change), backend="eager")(torch.ones(4, 2, 3))
    return str(caught.value)


def state_of(held):
    if isinstance(held, (list, dict, set, collections.deque, collections.UserDict, weakref.WeakKeyDictionary)):
        return list(held.items()) if hasattr(held, "items") else list(held)
    if isinstance(held, (np.ndarray, array.array, bytearray, memoryview, ctypes.Array)):
        return list(held)
    if isinstance(held, ctypes.c_int):
        return held.value
    return getattr(held, "n", None)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_whatever_a_step_changes(name, training, monkeypatch):
    made = types.ModuleType("module_that_is_imported")
    made.n = 0
    monkeypatch.setitem(sys.modules, "module_that_is_imported", made)
    held, change = CHANGES[name]
    VARIABLE.set(0)
    before = state_of(held)
    text = refused(held, change, training)
    assert "sl.State" in text or "reads the clock" in text or "draws a random number" in text, text
    assert state_of(held) == before and made.n == 0 and VARIABLE.get() == 0 and "STEPLOOP_TEST_N" not in os.environ


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ITERATORS)
def test_whatever_a_step_takes_the_next_of(name, training):
    def following(iterator):
        value = next(iterator)
        value = value[0] if isinstance(value, tuple) else value
        return float(len(value)) if isinstance(value, str) else value

    assert "sl.State" in refused(ITERATORS[name](), following, training)


def test_what_is_put_back_within_the_step_is_no_change():
    def there_and_back(held):
        token = VARIABLE.set(2)
        held.append(1)
        value = float(VARIABLE.get() + len(held))
        held.pop()
        VARIABLE.reset(token)
        return value

    xs = torch.ones(4, 2, 3)
    found, plain = (sl.Loop(Changing([1], there_and_back), backend=b)(xs)[0] for b in ("eager", "reference"))
    torch.testing.assert_close(found, plain)


def test_a_weak_dictionary_that_others_fill_and_empty():
    held = weakref.WeakKeyDictionary({KEY: 2.0})
    step = Changing(held, lambda things: things[KEY])
    for _ in range(3):
        passing = Key()
        held[passing] = 1.0
        del passing
        found, plain = (sl.Loop(step, backend=b)(torch.ones(4, 2, 3))[0] for b in ("eager", "reference"))
        torch.testing.assert_close(found, plain)
