"""A capture is used again only where a new one would be the same: whatever a step depends on is changed, and
the next call must see it. `captured` counts captures: what needs none must make none."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import logging
import subprocess
import sys
import threading
import weakref

import devices
import numpy as np
import pytest
import torch
from agree import agree, agree_scan
from torch import nn

import steploop as sl
from steploop.compiler import capture_store, invocation

T, B, INPUT, HIDDEN = 4, 3, 2, 3


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def data(*shape):
    return torch.randn(*shape).requires_grad_()


class Cell(sl.Step):
    def __init__(self):
        super().__init__()
        self.h, self.w = sl.State(HIDDEN), nn.Linear(INPUT + HIDDEN, HIDDEN)
        self.temperature = 1.0

    def step(self, x):
        self.h.next = torch.tanh(self.w(torch.cat([x, self.h.prev], -1)) * self.temperature)
        return self.h.next


def right(step, captures_made=None, xs=None, **call):
    """A call gives what the plain loop gives, and makes so many captures (None: any number)."""
    before = capture_store.captured
    agree(step, data(T, B, INPUT) if xs is None else xs, save="states", **call)
    if captures_made is not None:
        assert capture_store.captured - before == captures_made


def test_weights():
    cell = Cell()
    right(cell, 1)
    with torch.no_grad():
        cell.w.weight.mul_(2)
    right(cell, 0)
    cell.w.weight = nn.Parameter(torch.randn(HIDDEN, INPUT + HIDDEN))
    right(cell, 0)
    cell.w = nn.Linear(INPUT + HIDDEN, HIDDEN)
    right(cell, 0)
    cell.w.weight.data = torch.randn(HIDDEN, INPUT + HIDDEN)
    right(cell, 0)
    cell.load_state_dict({k: v * 2 for k, v in cell.state_dict().items()})
    right(cell, 0)
    cell.w.weight.requires_grad_(False)
    right(cell)
    torch.nn.utils.parametrizations.weight_norm(cell.w.requires_grad_())
    right(cell)


def test_python_numbers():
    cell, loop, plain = Cell(), None, None
    loop, plain = sl.Loop(cell, backend="eager"), sl.Loop(cell, backend="reference")
    xs = data(T, B, INPUT)
    # A number that changes after the very first call, and one that is equal but of another type.
    for value in (1.0, 2.0, 2, True, -0.0, 0.0, torch.tensor(3.0)):
        cell.temperature = value
        torch.testing.assert_close(loop(xs)[0], plain(xs)[0], rtol=1e-9, atol=0)
    cell.temperature.fill_(4.0)
    right(cell, 0)
    cell.temperature = 1.0
    right(cell, 0)  # known from before


SCALE = 1.0
SETTINGS = {"shift": 1.0, "list": [1.0, 2.0]}


class Globals:
    factor = 2.0


def helper(z):
    return z * SCALE * Globals.factor + SETTINGS["shift"] + SETTINGS["list"][1]


class ReadsGlobals(Cell):
    def step(self, x):
        return helper(super().step(x))


def test_globals(monkeypatch):
    cell = ReadsGlobals()
    right(cell, 1)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    right(cell, 1)
    monkeypatch.setattr(Globals, "factor", 5.0)
    right(cell, 1)
    monkeypatch.setitem(SETTINGS, "shift", 7.0)
    right(cell, 1)
    monkeypatch.setitem(SETTINGS, "list", [1.0, 9.0])
    right(cell, 1)
    SETTINGS["list"][1] = 11.0
    right(cell, 0)  # a float that has changed once is an input of the graph


@dataclasses.dataclass
class Config:
    a: float = 1.0


@dataclasses.dataclass(slots=True)
class SlotConfig:
    a: float = 1.0


class Nested:
    def __init__(self):
        self.config, self.array, self.deep = Config(), np.array([1.0, 2.0]), {"z": (1, Config(2.0))}

    @property
    def a(self):
        return self.config.a


class ReadsConfigs(Cell):
    def __init__(self):
        super().__init__()
        self.config, self.slots, self.nested = Config(), SlotConfig(), Nested()

    def step(self, x):
        scale = self.config.a * self.slots.a * self.nested.a * self.nested.array[1]
        return super().step(x) * scale * self.nested.deep["z"][1].a


def test_config_objects():
    cell = ReadsConfigs()
    right(cell, 1)
    cell.config.a = 2.0
    right(cell, 1)
    cell.slots.a = 3.0
    right(cell, 1)
    cell.nested.config.a = 0.5
    right(cell, 1)
    cell.nested.array[1] = 7.0
    right(cell, 1)
    cell.nested.deep["z"][1].a = 3.0
    right(cell, 1)
    right(cell, 0)


class ReadsBuffers(Cell):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(HIDDEN))
        self.shifts = [torch.ones(HIDDEN)]

    def step(self, x):
        return super().step(x) * self.scale + self.shifts[0]


def test_buffers_and_tensors_in_lists():
    cell = ReadsBuffers()
    right(cell, 1)
    cell.scale.fill_(3.0)
    right(cell, 0)
    cell.scale = torch.randn(HIDDEN)
    right(cell, 0)
    cell.shifts[0] = torch.randn(HIDDEN)
    right(cell, 0)
    cell.shifts = [torch.randn(HIDDEN)]
    right(cell, 0)
    cell.scale = torch.randn(1)
    right(cell, 1)


class Calls(Cell):
    def __init__(self, function):
        super().__init__()
        self.function, self.sign = function, "plus"

    def step(self, x):
        y = self.function(super().step(x))
        return y if self.sign == "plus" else -y


def test_functions():
    cell = Calls(torch.sin)
    right(cell, 1)
    for function in (
        torch.cos,
        lambda z: z * 0.1,
        lambda z: z * 0.2,
        functools.partial(torch.clamp, max=0.3),
        functools.partial(torch.clamp, max=0.1),
    ):
        cell.function = function
        right(cell, 1)
    cell.sign = "minus"
    right(cell, 1)


def test_a_method_that_was_replaced(monkeypatch):
    cell = Cell()
    right(cell, 1)

    def step(self, x):
        self.h.next = torch.sigmoid(self.w(torch.cat([x, self.h.prev], -1)))
        return self.h.next

    with monkeypatch.context() as patch:
        patch.setattr(Cell, "step", step)
        right(cell, 1)
    right(cell, 0)


def test_hooks():
    cell = Cell()
    right(cell, 1)
    hook = cell.w.register_forward_hook(lambda module, args, result: result * 2)
    right(cell, 1)
    hook.remove()
    right(cell, 0)


class Trains(Cell):
    def step(self, x):
        return super().step(x) * (2 if self.training else 1)


def test_train_and_eval():
    cell = Trains()
    right(cell, 1)
    cell.eval()
    right(cell, 1)
    cell.train()
    right(cell, 0)


def test_a_deep_copy_is_another_step():
    cell = Cell()
    right(cell, 1)
    other = copy.deepcopy(cell)
    other.temperature = 5.0
    other.w.weight.data.zero_()
    right(other)
    right(cell, 0)


def test_dtype():
    cell = Cell()
    right(cell, 1)
    cell.float()
    right(cell, 1, data(T, B, INPUT).detach().float().requires_grad_())
    cell.double()
    right(cell, 0)


def test_autocast():
    devices.skip_on("pretended", why="it has no autocast")
    cell = Cell().float()
    xs = torch.randn(T, B, INPUT, dtype=torch.float32)
    loop, plain = sl.Loop(cell, backend="eager"), sl.Loop(cell, backend="reference")
    exact = loop(xs)[0]
    with torch.autocast(devices.here().type, torch.bfloat16):
        found, expected = loop(xs)[0], plain(xs)[0]
    assert found.dtype == expected.dtype
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(loop(xs)[0], exact)


def test_grad_modes():
    cell, xs = Cell(), data(T, B, INPUT)
    with torch.no_grad():
        right(cell, None, xs)
    right(cell, None, xs)
    with torch.inference_mode():
        right(cell, None, torch.randn(T, B, INPUT))
    right(cell, 0, xs)
    assert sl.Loop(cell, backend="eager")(xs)[0].requires_grad


class Attention(Cell):
    def step(self, x, *, memory):
        h = self.h.prev
        weights = torch.softmax(torch.einsum("bd,bsd->bs", h, memory), -1)
        context = torch.einsum("bs,bsd->bd", weights, memory)
        self.h.next = torch.tanh(self.w(torch.cat([x, h], -1)) + context)
        return self.h.next, weights.amax(-1)


def test_new_sizes():
    cell = Attention()
    sizes = [(5, 3, 4), (6, 3, 4), (5, 2, 4), (9, 7, 4), (5, 1, 4)]
    made = [attend(cell, *size) for size in sizes]
    assert made == [1, 0, 0, 0, 0]
    # A second S captures once more, with S free; one memory slot is a case of its own.
    assert attend(cell, 5, 3, 6) == 1
    assert [attend(cell, *size) for size in [(5, 3, 9), (5, 4, 5), (5, 6, 6), (0, 2, 3), (3, 11, 11)]] == [
        0
    ] * 5
    assert attend(cell, 5, 3, 1) <= 1
    assert [attend(cell, *size) for size in [(1, 1, 1), (5, 3, 2)]] == [0, 0]


def attend(cell, steps, batch, slots):
    before = capture_store.captured
    right(cell, None, data(steps, batch, INPUT), memory=data(batch, slots, HIDDEN))
    return capture_store.captured - before


# -- functions -----------------------------------------------------------------------------------------------


def make(w, scale, linear):
    def fn(c, x):
        h = torch.tanh(c @ w + linear(x)) * scale
        return h, h

    return fn


def scan_captures(fn):
    before = capture_store.captured
    agree_scan(fn, torch.zeros(B, HIDDEN), data(T, B, HIDDEN))
    return capture_store.captured - before


def test_a_new_closure_at_every_call_does_not_capture_again():
    square = lambda: data(HIDDEN, HIDDEN)
    made = [scan_captures(make(square(), 2.0, nn.Linear(HIDDEN, HIDDEN))) for _ in range(4)]
    assert made[1:] == [0, 0, 0]
    made = []
    for _ in range(3):
        w = square()
        made.append(scan_captures(lambda c, x: (torch.tanh(c @ w + x), c)))
    assert made[1:] == [0, 0]


def test_the_same_code_with_another_closure():
    w, linear = data(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
    assert scan_captures(make(w, 2.5, linear)) > 0
    scan_captures(make(w, 3.0, linear))
    assert scan_captures(make(w, 3.5, linear)) == 0  # a float that has changed once is an input of the graph
    assert scan_captures(make(w.detach(), 3.0, linear)) > 0


def test_one_tensor_closed_over_twice_is_not_two_tensors():
    def two(a, b):
        def fn(c, x):
            h = torch.tanh(c @ a + x @ b)
            return h, h

        return fn

    a, b = data(HIDDEN, HIDDEN), data(HIDDEN, HIDDEN)
    for pair in ((a, a), (a, b), (a, a), (b, a), (a.detach(), a), (a.detach(), b)):
        scan_captures(two(*pair))


# -- what is kept --------------------------------------------------------------------------------------------


def test_captures_die_with_their_modules():
    def dead_module():
        cell = Cell()
        right(cell)
        return weakref.ref(cell), weakref.ref(cell.w.weight)

    def dead_closure():
        w = data(HIDDEN, HIDDEN)
        fn = lambda c, x: (torch.tanh(c @ w + x), c)
        sl.scan(fn, torch.zeros(B, HIDDEN), data(T, B, HIDDEN), backend="eager")[1].sum().backward()
        return (weakref.ref(w),)

    references = [*dead_module(), *dead_closure(), *dead_closure()]
    gc.collect()
    assert [r() for r in references] == [None] * len(references)


CALLS = """
import gc
import torch
import steploop as sl

loop, xs = sl.Loop(sl.nn.LSTMCell(2, 3), backend="eager"), torch.randn(4, 3, 2)

def calls(count):
    for _ in range(count):
        w = torch.randn(3, 3, requires_grad=True)
        loop(xs)[0].sum().backward()
        fn = lambda c, x: (torch.tanh(c @ w + x), c)
        sl.scan(fn, torch.zeros(3, 3), torch.ones(4, 3, 3), backend="eager")[1].sum().backward()
    while gc.collect():  # what one collection frees may have held garbage of its own
        pass
    return len(gc.get_objects())

calls(3)
before = calls(1)
print(calls(200) - before)
"""


def test_calls_leave_nothing_behind():
    """(in a process of its own: whatever else runs in this one makes objects too)"""
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100, done.stdout


class Counts(logging.Handler):
    weight, seen = 1, 0

    def emit(self, record):
        Counts.seen += Counts.weight


class AsksForItsTemperature(Cell):
    def step(self, x):
        return super().step(x) if self.temperature > 0.5 else x


def test_what_torch_logs_while_it_traces_is_none_of_the_steps():
    """pytest 9.2 gives torch's logs handlers of its own, others for each test."""
    step, log, handler = AsksForItsTemperature(), logging.getLogger("torch.__trace"), Counts()
    log.addHandler(handler)
    try:
        right(step, 1)
        step.temperature = 2.0  # it is a symbol from now on: torch logs the question about it
        right(step, 1)
        assert Counts.seen, "torch has logged nothing"
        Counts.weight = 2
        right(step, 0)
    finally:
        log.removeHandler(handler)
    right(step, 0)


class Logs(Cell):
    words = "one"

    def step(self, x):
        logging.getLogger("step").debug("%s", self.words)
        return super().step(x)


def test_what_a_step_logs_is_read():
    right(Logs(), 1)
    step = Logs()
    right(step)
    step.words = "two"
    right(step, 1)


def test_several_threads_make_one_capture():
    cell, wrong = Cell(), []
    before = capture_store.captured
    sequences = [[data(T + number, B + size, INPUT) for size in range(3)] for number in range(4)]

    def work(number):
        try:
            for xs in sequences[number]:
                found, _ = sl.Loop(cell, backend="eager")(xs)
                found.sum().backward()
                torch.testing.assert_close(found, sl.Loop(cell, backend="reference")(xs)[0])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert capture_store.captured - before == 1


class WithoutAutocast(Cell):
    def step(self, x):
        with torch.autocast(devices.here().type, enabled=False):
            return super().step(x)


class Normed(sl.Step):
    """Its norm has weights in float32 and, under autocast, an input in bfloat16: then torch's mean is float32."""

    def __init__(self):
        super().__init__()
        self.h, self.mix, self.norm = sl.State(5, dtype=torch.float32), nn.Linear(5, 5), nn.LayerNorm(5)

    def step(self, x):
        y = self.mix(self.h.prev) + x.to(torch.bfloat16)
        self.h.next = torch.tanh(self.norm(y)).float()
        return y.float()


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_norm_of_two_dtypes_under_autocast(backend):
    devices.skip_on("pretended", why="it has no autocast")
    step, x = Normed().float(), torch.randn(4, 3, 5, dtype=torch.float32, requires_grad=True)
    results = []
    for name in ("reference", backend):
        with torch.autocast(devices.here().type, torch.bfloat16):
            y = sl.Loop(step, backend=name)(x)[0]
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *step.parameters()])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_calls_of_one_kind_keep_their_own_dtypes(backend):
    """What one call was tried for says nothing of another whose arguments ask for another dtype."""

    def step(n, x):
        wide, narrow, small = n.to(torch.float64), n.to(torch.float32), n.to(torch.int16)
        halves = torch.div(n, 2, rounding_mode="floor") + torch.div(n, 2, rounding_mode=None).long()
        total = (wide / 3).floor().long() + (narrow / 3).ceil().long() + small * 2 + halves
        return (n * 3 + total) % 7 + x, n

    start, xs = torch.arange(5), torch.arange(15).view(3, 5)
    found, expected = (sl.scan(step, start, xs, backend=name) for name in (backend, "reference"))
    torch.testing.assert_close(found, expected)


def test_a_region_without_autocast_inside_the_step():
    devices.skip_on("pretended", why="it has no autocast")
    cell, xs = WithoutAutocast().float(), torch.randn(T, B, INPUT, dtype=torch.float32)
    with torch.autocast(devices.here().type, torch.bfloat16):
        found = sl.Loop(cell, backend="eager")(xs)[0]
        expected = sl.Loop(cell, backend="reference")(xs)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_global_that_is_only_named_like_an_attribute(monkeypatch):
    cell = Cell()
    right(cell, 1)
    monkeypatch.setitem(globals(), "temperature", 3.0)
    right(cell, 0)


class Convolves(sl.Step):
    def __init__(self):
        super().__init__()
        self.h, self.w = sl.State(1, HIDDEN), nn.Conv1d(2, 1, 3, padding=1)

    def step(self, x):
        self.h.next = torch.tanh(self.w(torch.cat([x[:, None], self.h.prev], 1)))
        return self.h.next


def test_torch_takes_another_way_for_few_rows():
    cell = Convolves().float()

    def made(batch):
        before = capture_store.captured
        right(cell, None, torch.randn(T, batch, HIDDEN, dtype=torch.float32).requires_grad_())
        return capture_store.captured - before

    assert sum(made(batch) for batch in (3, 4, 20, 40, 2, 16, 15, 6, 100)) <= 2


@pytest.mark.parametrize("given", ["mask", "lengths", "resets"])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_rows_that_numpy_changes(given, backend):
    """Memory that is shared with numpy changes without torch's notice."""
    values = np.full(B, T) if given == "lengths" else np.ones((T, B), dtype=bool)
    marks, cell, xs = {given: torch.from_numpy(values)}, Cell(), torch.randn(T, B, INPUT)
    loop, reference = sl.Loop(cell, backend=backend), sl.Loop(cell, backend="reference")
    loop(xs, **marks)
    values[...] = 2 if given == "lengths" else np.arange(T * B).reshape(T, B) % 3 == 0
    torch.testing.assert_close(loop(xs, **marks), reference(xs, **marks))


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_lengths_that_numpy_changes_before_the_backward(backend):
    values, cell, xs = np.array([T, 1, 2]), Cell(), data(T, B, INPUT)
    loop = sl.Loop(cell, backend=backend)
    wanted = torch.autograd.grad(loop(xs, lengths=torch.tensor(values))[0].sum(), xs)
    outputs, _ = loop(xs, lengths=torch.from_numpy(values))
    values[:] = [1, T, T]
    torch.testing.assert_close(torch.autograd.grad(outputs.sum(), xs), wanted)


def test_lengths_changed_in_inference_mode():
    cell, xs, lengths = Cell(), torch.randn(T, B, INPUT), [T, T, T]
    with torch.inference_mode():
        lengths = torch.tensor(lengths)
        loop, reference = sl.Loop(cell), sl.Loop(cell, backend="reference")
        loop(xs, lengths=lengths)
        lengths.fill_(2)
        torch.testing.assert_close(loop(xs, lengths=lengths), reference(xs, lengths=lengths))


def test_the_schedule_of_another_thread(monkeypatch):
    """The schedule of the last call is looked at once: another thread's call may come in between."""
    cell, xs = Cell(), torch.randn(T, B, INPUT)
    loop, mine, other = sl.Loop(cell), torch.tensor([T, 1, 2]), torch.tensor([1, 1, 1])
    with torch.no_grad():
        wanted, _ = loop(xs, lengths=mine)
        once = [lambda: loop(xs, lengths=other)]
        plain = invocation._Known.fits

        def fits(self, steps, batch, marks):
            found = plain(self, steps, batch, marks)
            if once:
                once.pop()()
            return found

        monkeypatch.setattr(invocation._Known, "fits", fits)
        assert torch.equal(loop(xs, lengths=mine)[0], wanted)


class Inner(sl.Step):
    def __init__(self):
        super().__init__()
        self.h = sl.State(HIDDEN)

    def step(self, x, *, table):
        self.h.next = torch.tanh(self.h.prev + x @ table)
        return self.h.next


class HoldsALoop(sl.Step):
    """Runs a loop at every step, over a weight of its own."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(INPUT, HIDDEN) * 0.3)
        self.inner, self.h = sl.Loop(Inner()), sl.State(HIDDEN)

    def step(self, x):
        outputs, _ = self.inner(x.unsqueeze(0).expand(3, *x.shape), table=sl.unbatched(self.table))
        self.h.next = torch.tanh(self.h.prev + outputs[-1])
        return self.h.next


def test_a_loop_in_a_step_does_not_look_at_weights():
    """Its call of the compiler runs while the outer step is traced: what the compiler does then is not the step's."""
    step = HoldsALoop()
    loop, optimizer = sl.Loop(step), torch.optim.SGD(step.parameters(), 0.1)
    made = []
    for _ in range(4):
        before = capture_store.captured
        outputs, _ = loop(data(T, B, INPUT))
        optimizer.zero_grad()
        outputs.square().sum().backward()
        optimizer.step()
        made.append(capture_store.captured - before)
    assert made[0] > 0 and made[1:] == [0, 0, 0]
    right(step)
    reads = next(iter(capture_store._store(_program_of(loop)).values()))[0].reads
    assert not {f().__module__.split(".")[0] for f in reads.functions if f() is not None} & {"steploop", "torch"}
    assert not reads.contents


def _program_of(loop):
    return loop.prepare(data(T, B, INPUT)).program
