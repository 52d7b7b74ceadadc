"""The backend "cuda" against the plain loop, on the GPU that tests/emulated_gpu.py makes of the CPU.

Every test asserts that kernels were launched, so nothing passes because something else ran.
"""

from __future__ import annotations

import copy

import pytest
import torch
from agree import agree, agree_scan, situations
from emulated_gpu import registered
from torch import nn

import steploop as sl

WAYS = {"blocks": False, "grid": True}
LENGTHS = torch.tensor([6, 1, 4, 0, 5])
SITUATIONS = situations(LENGTHS, torch.rand(6, 5) < 0.7, torch.rand(6, 5) < 0.3)


@pytest.fixture(params=WAYS)
def gpu(request):
    """Two blocks of two warps of four lanes. Five rows are three tiles where every block has rows of its own."""
    with registered(together=WAYS[request.param], rows=2) as backend:
        yield backend
        assert backend.machine.launches, "no kernel was launched"
        assert {launch.together for launch in backend.machine.launches} == {WAYS[request.param]}


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


class Cell(sl.Step):
    """Norms, a gate, a count, and what is the best of it."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(3 + 7, 14).double(), nn.Linear(7, 2).double()
        self.norm = nn.LayerNorm(7).double()
        self.h, self.n = sl.State(7), sl.State(dtype=torch.int64)

    def step(self, x):
        gate, new = self.mix(torch.cat([x, self.h.prev], 1)).chunk(2, 1)
        self.h.next = torch.lerp(self.h.prev, self.norm(new).tanh(), gate.sigmoid())
        self.n.next = self.n.prev + self.h.next.argmax(1)
        return self.head(self.h.next), self.n.next


@pytest.mark.parametrize("call", SITUATIONS.values(), ids=SITUATIONS)
def test_every_situation(gpu, call):
    agree(Cell(), double(6, 5, 3), backend=gpu.name, **call)


@pytest.mark.parametrize("cell", [sl.nn.LSTMCell, sl.nn.GRUCell, sl.nn.LayerNormLSTMCell])
def test_cells(gpu, cell):
    step = cell(3, 7).double()
    for batch in (5, 1, 2):
        agree(step, double(5, batch, 3), backend=gpu.name, save="all")
    agree(step, double(5, 2, 3), backend=gpu.name, save="states", loop={"reverse": True})


def test_single_precision(gpu):
    agree(sl.nn.LayerNormLSTMCell(3, 7), torch.randn(6, 5, 3, requires_grad=True), backend=gpu.name)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("cell", [sl.nn.LSTMCell, sl.nn.GRUCell, sl.nn.LayerNormLSTMCell])
def test_half_precision(gpu, cell, dtype):
    """As near to the loop in double precision as the plain loop in half precision is."""
    step, x = cell(3, 7).to(dtype), torch.randn(6, 5, 3, dtype=dtype)

    def results(name, step, x):
        x = x.clone().requires_grad_()
        y = sl.Loop(step, backend=name)(x, lengths=LENGTHS)[0]
        weights = torch.arange(y.numel()).view(y.shape).sin().to(y.dtype)
        return [v.double() for v in (y, *torch.autograd.grad(y, [x, *step.parameters()], weights))]

    exact = results("reference", copy.deepcopy(step).double(), x.double())
    plain, found = (results(name, step, x) for name in ("reference", gpu.name))
    for a, b, c in zip(exact, plain, found, strict=True):
        largest, ulp = a.abs().max(), torch.finfo(dtype).eps
        assert (c - a).abs().max() <= 2 * (b - a).abs().max() + 2 * ulp * largest


@pytest.mark.parametrize("together", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("memory", [1 << 14, 0], ids=["kept", "read"])
def test_tensor_cores(together, dtype, memory):
    """Warps of 32 lanes, 21 rows, 19 units: tiles of 16 rows and 8 columns of which some are not full."""
    with registered(together=together, lanes=32, memory=memory) as gpu:
        torch.manual_seed(1)
        step, x = sl.nn.GRUCell(3, 19).to(dtype), torch.randn(3, 21, 3, dtype=dtype)
        lengths = torch.randint(0, 4, (21,))
        found, plain = (sl.Loop(step, backend=name)(x, lengths=lengths)[0] for name in (gpu.name, "reference"))
        torch.testing.assert_close(found, plain, rtol=0, atol=4 * torch.finfo(dtype).eps)
        assert {launch.near > 0 for launch in gpu.machine.launches} == {memory > 0}


class Glance(sl.Step):
    """Looks numbers up, normalises and compares them."""

    def __init__(self, dtype):
        super().__init__()
        self.table, self.mix = nn.Embedding(5, 6, dtype=dtype), nn.Linear(6, 6, dtype=dtype)
        self.h, self.best = sl.State(6, dtype=dtype), sl.State(dtype=torch.int64)

    def step(self, x):
        h = self.mix(self.h.prev) + self.table((x[:, 0] > 0) + self.best.prev % 4)
        self.h.next = torch.where(h > x, h.softmax(1), h.tanh()) - h.mean(1, keepdim=True)
        self.best.next = h.argmax(1)
        return self.h.next.square().sum(1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_beside_others(gpu, dtype):
    """The table is a power of two, so that no rounding decides what is largest."""
    step = Glance(dtype)
    with torch.no_grad():
        step.table.weight.copy_(torch.randn(5, 6).sign() * torch.tensor([8.0, 2.0, 0.5, 4.0, 1.0, 0.25]))
    agree(step, torch.randn(6, 5, 6, dtype=dtype), backend=gpu.name)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_roundings_are_torchs(gpu, dtype):
    """Operations without products give torch's bits, halfway cases, subnormal numbers and infinities included."""
    values = torch.tensor([1.0, 1 + 2.0**-9, 3e38, 7e4, 6e-8, 1e-40, -65519.0, 1.00390625, 0.1, torch.inf, torch.nan])

    def step(carry, x):
        y = (carry + x * 3) / 7 - x
        return y, y.exp()

    start = values.to(dtype)
    xs = torch.stack([start.flip(0), start * 1.5])
    found, expected = (sl.scan(step, start, xs, backend=name) for name in (gpu.name, "reference"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "work", [lambda h: h == 0.1, lambda h: h <= torch.tensor(0.1), lambda h: h.nan_to_num()], ids=["eq", "0-d", "nan"]
)
def test_what_means_something_else_in_single_precision_is_refused(work):
    start = torch.tensor([0.1, 0.5, torch.inf]).bfloat16()
    with registered() as backend, pytest.raises(sl.UnsupportedError, match="half precision"):
        sl.scan(lambda h, x: (h * 0.5 + work(h), h), start, start[None], backend=backend.name)


def test_a_number_that_halves_hold_is_compared(gpu):
    def step(h, x):
        return torch.where(h > 0.5, h - x, h + x), h == 1.5

    start, xs = torch.tensor([0.1, 0.5, 1.5]).bfloat16(), torch.ones(3, 3).bfloat16()
    found, expected = (sl.scan(step, start, xs, backend=name) for name in (gpu.name, "reference"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_autocast(gpu):
    step, x = sl.nn.LSTMCell(3, 7), torch.randn(6, 5, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (sl.Loop(step, backend=name)(x)[0] for name in (gpu.name, "reference"))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    found, expected = (torch.autograd.grad(y.float().sum(), x)[0] for y in (found, expected))
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)


def test_attention(gpu):
    class Decoder(sl.Step):
        def __init__(self):
            super().__init__()
            self.cell = sl.nn.LSTMCell(3 + 4, 6).double()
            self.query, self.c = nn.Linear(6, 4, bias=False).double(), sl.State(4)

        def step(self, x, memory, keep):
            h = self.cell(torch.cat([x, self.c.prev], -1))
            energy = (memory * self.query(h)[:, None]).sum(-1).masked_fill(~keep, -torch.inf)
            self.c.next = (energy.softmax(-1)[..., None] * memory).sum(1)
            return torch.cat([h, self.c.next], -1)

    step = Decoder()
    for batch, positions in ((5, 6), (2, 3), (1, 1)):
        keep = torch.arange(positions) < torch.randint(1, positions + 1, (batch, 1))
        agree(step, double(4, batch, 3), memory=double(batch, positions, 4), keep=keep, backend=gpu.name)


def test_a_weight_that_no_block_can_keep():
    with registered(together=True, memory=64) as backend:
        agree(sl.nn.LSTMCell(3, 7).double(), double(5, 3, 3), backend=backend.name)
        assert {launch.near for launch in backend.machine.launches} == {0}


def test_small_linear_algebra(gpu):
    def kalman(carry, z):
        mean, cov = carry
        inverse = torch.linalg.inv(cov[:, :2, :2] + torch.eye(2, dtype=cov.dtype))
        gain = cov[:, :, :2] @ inverse
        rest = z - mean[:, :2]
        mean = mean + (gain @ rest[..., None])[..., 0]
        cov = cov - gain @ cov[:, :2] + 0.1 * torch.eye(3, dtype=cov.dtype)
        return (mean, cov), (rest[:, None] @ inverse @ rest[..., None]).sum((1, 2)) + torch.logdet(cov)

    start = double(3, 3), torch.eye(3, dtype=torch.float64).expand(3, 3, 3).clone().requires_grad_()
    agree_scan(kalman, start, double(4, 3, 2), backend=gpu.name)


def test_scans_and_scatters(gpu):
    def step(carry, x):
        order = (carry * 3).long().abs() % 4
        piled = torch.zeros_like(x).scatter_add(1, order, x)
        return (piled.cumsum(1) * 0.3 + carry).sin(), piled.amax(1)

    agree_scan(step, double(5, 4), double(3, 5, 4), backend=gpu.name, backward=False)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_whole_numbers(gpu, dtype):
    """At the edges of their types: they wrap as torch's do."""
    info = torch.iinfo(dtype)
    start = torch.tensor([info.min, -1 % (info.max + 1), 0, 7, info.max], dtype=dtype)
    xs = torch.stack([start.flip(0), start]).clamp(min=info.min + 1)
    xs = torch.where(xs == 0, 3, xs)

    def step(carry, x):
        a, b = carry
        a, b = (a * 3 + x) ^ b, (a // x + b % x) & ~(a << 1)
        return (torch.maximum(a, b), torch.where(a > b, -b, b.abs())), (a - b, a >= b)

    agree_scan(step, (start, start.flip(0)), xs, backend=gpu.name, backward=False)


def test_an_index_outside_is_an_error(gpu):
    def step(carry, i):
        return carry + torch.arange(4.0)[i + carry.long() * 0], carry

    assert sl.scan(step, torch.zeros(3), torch.tensor([[0, 3, 1]]), backend=gpu.name)[0].tolist() == [0, 3, 1]
    with pytest.raises(sl.OutsideError, match="index out of range"):
        sl.scan(step, torch.zeros(3), torch.tensor([[0, 4, 1]]), backend=gpu.name)


def test_a_search(gpu):
    class Speller(sl.Step):
        def __init__(self):
            super().__init__()
            self.embed, self.cell, self.out = nn.Embedding(6, 3), sl.nn.GRUCell(3, 7), nn.Linear(7, 6)

        def step(self, token):
            return self.out(self.cell(self.embed(token)))

    speller = Speller()
    found = [
        sl.search.greedy(speller, start=torch.tensor([0, 2, 3, 4, 5]), end=1, max_steps=7, backend=name).labels
        for name in ("reference", gpu.name)
    ]
    torch.testing.assert_close(*found)
