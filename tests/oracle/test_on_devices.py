"""Loops on every device, call after call: what is kept between calls (schedules, CUDA graphs and their memory) must
not show. On CUDA "auto" launches recorded graphs from the second call on."""

from __future__ import annotations

import threading

import devices
import pytest
import torch
from agree import agree, check, everything
from cell_cases import CASES, INPUT, randomised
from torch import nn

import steploop as sl

B = 3


def sequence(steps, batch=B, size=INPUT):
    return torch.randn(steps, batch, size, dtype=torch.float64, requires_grad=True)


def compare(loop, xs, **call):
    plain = sl.Loop(loop.step, backend="reference", reverse=loop.reverse)
    expected = everything(lambda leaves, rest: plain(*leaves, **rest), loop.step, xs, call)
    check(expected, everything(lambda leaves, rest: loop(*leaves, **rest), loop.step, xs, call), "auto")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cells_call_after_call(case):
    devices.skip_on("cpu", why="other tests call native loops again and again")
    loop = sl.Loop(randomised(case.make(), torch.float64))
    for steps in (20, 20, 23, 20):
        compare(loop, (sequence(steps),))
    resets = torch.rand(20, B) < 0.1
    for lengths in ([20, 20, 17], [20, 20, 17], [4, 0, 20]):
        compare(loop, (sequence(20),), lengths=torch.tensor(lengths), resets=resets)


class Deep(sl.Step):
    """Attention at a constant, an integer state, a learned start, a buffer, a discrete choice."""

    def __init__(self):
        super().__init__()
        self.h, self.n = sl.State(6, init="learned"), sl.State(dtype=torch.int64, init=0)
        self.mix, self.look = nn.Linear(INPUT + 6, 6).double(), nn.Linear(6, 4).double()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 6, dtype=torch.float64))

    def step(self, x, *, memory):
        h = torch.tanh(self.mix(torch.cat([x, self.h.prev], -1))) * self.scale
        weights = torch.softmax(torch.einsum("bd,bsd->bs", self.look(h), memory), -1)
        h = h + torch.nn.functional.pad(torch.einsum("bs,bsd->bd", weights, memory), (0, 2))
        even = (self.n.prev % 2 == 0).unsqueeze(1)
        self.h.next, self.n.next = torch.where(even, h, -h), self.n.prev + 1
        return self.h.next, weights, self.n.next


def test_a_step_of_many_kinds_call_after_call():
    loop = sl.Loop(Deep().double())
    for steps, batch, frames in [(20, 3, 4), (20, 3, 4), (20, 3, 7), (70, 2, 4), (70, 2, 4), (1, 1, 1), (20, 3, 4)]:
        memory = torch.randn(batch, frames, 4, dtype=torch.float64, requires_grad=True)
        compare(loop, (sequence(steps, batch),), memory=memory)


def test_lengths_mask_and_resets_on_either_device():
    cell, x = sl.nn.GRUCell(INPUT, 4).double(), sequence(9)
    lengths, mask, resets = torch.tensor([9, 0, 5]), torch.rand(9, B) < 0.8, torch.rand(9, B) < 0.2
    for move in (torch.Tensor.cpu, lambda t: t, torch.Tensor.cpu):
        for reverse in (False, True):
            given = {"lengths": move(lengths), "mask": move(mask), "resets": move(resets)}
            agree(cell, x, backend="auto", loop={"reverse": reverse}, **given)
            loop = sl.Loop(cell, backend="auto", reverse=reverse)
            assert loop(x, **given)[0].device == x.device


def test_weights_settings_and_modes_between_calls():
    cell = sl.nn.LSTMCell(INPUT, 4).double()
    loop, plain, x = sl.Loop(cell), sl.Loop(cell, backend="reference"), sequence(20)
    changes = [
        torch.no_grad, torch.no_grad, torch.inference_mode, lambda: cell.weight_hh.data.mul_(0.5), torch.no_grad,
        lambda: setattr(cell.weight_hh, "data", cell.weight_hh.data.clone()), torch.enable_grad, torch.enable_grad,
        lambda: setattr(cell, "weight_ih", nn.Parameter(cell.weight_ih * 2)), torch.inference_mode, torch.no_grad,
    ]  # fmt: skip
    kept = []
    for change in changes:
        mode = change()
        with mode if hasattr(mode, "__enter__") else torch.no_grad():
            kept.append((loop(x), plain(x)))
    for (ys, state), (ys_, state_) in kept:
        torch.testing.assert_close(ys, ys_)
        torch.testing.assert_close(dict(state), dict(state_))


def test_streams_step_after_step():
    for cell in (sl.nn.LSTMCell(INPUT, 4).double(), sl.nn.Stack(sl.nn.GRUCell(INPUT, 4), nn.Linear(4, 2)).double()):
        x = sequence(9)
        with torch.no_grad():
            stream, plain = sl.Loop(cell).stream(B), sl.Loop(cell, backend="reference")
            found = [stream(one) for one in x]
            state, copied = stream.state, stream.state.clone()
            torch.testing.assert_close(torch.stack(found), plain(x)[0])
            for parameter in cell.parameters():
                parameter.mul_(0.9)
            expected, _ = plain(x, state=copied)
            torch.testing.assert_close(torch.stack([stream(one) for one in x]), expected)
            torch.testing.assert_close(dict(state), dict(copied))


def test_streams_with_masks_and_resets():
    cell, x = sl.nn.GRUCell(INPUT, 4).double(), sequence(9)
    mask, resets = torch.rand(9, B) < 0.7, torch.rand(9, B) < 0.3
    with torch.no_grad():
        expected, final = sl.Loop(cell, backend="reference")(x, mask=mask, resets=resets)
        stream = sl.Loop(cell).stream(B)
        found = [stream(a, mask=m, resets=r) for a, m, r in zip(x, mask.cpu(), resets)]
        torch.testing.assert_close(torch.stack(found), expected)
        torch.testing.assert_close(stream.state["h"], final["h"])


def test_torch_cells_in_a_scan():
    """On a GPU torch has one kernel for each of them; in a step they are their formula."""
    for made in (nn.GRUCell(INPUT, 4), nn.LSTMCell(INPUT, 4, bias=False), nn.RNNCell(INPUT, 4)):
        cell = made.double()
        zero = torch.zeros(B, 4, dtype=torch.float64)

        def fn(carry, x):
            carry = cell(x, carry)
            return carry, carry[0] if isinstance(carry, tuple) else carry

        init = (zero, zero) if isinstance(cell, nn.LSTMCell) else zero
        assert sl.verify(fn, init, sequence(8), lengths=torch.tensor([8, 0, 5])).ok


def cuda_only():
    devices.skip_on("cpu", "pretended", why="about CUDA's streams and graphs")


def test_cuda_streams_and_threads_by_turns():
    cuda_only()
    cell = sl.nn.LSTMCell(INPUT, 64).double()
    loop, wrong = sl.Loop(cell), []
    xs = [sequence(20) for _ in range(4)]
    expected = [sl.Loop(cell, backend="reference")(x)[0].detach() for x in xs]
    torch.cuda.synchronize()

    def work(number):
        try:
            with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
                for _ in range(5):
                    found = loop(xs[number])[0]
                    torch.cuda.current_stream().synchronize()
                    torch.testing.assert_close(found, expected[number])
        except BaseException as error:
            wrong.append(error)

    for number in range(4):
        work(number)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inside_a_graph_that_the_caller_records():
    cuda_only()
    cell = sl.nn.LSTMCell(INPUT, 4).double()
    loop, x = sl.Loop(cell), sequence(20).detach()
    with torch.no_grad():
        for _ in range(3):
            loop(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = loop(x)[0]
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(found, sl.Loop(cell, backend="reference")(x)[0])


def test_the_plan_says_that_loops_are_recorded():
    cuda_only()
    step, x = sl.nn.LSTMCell(INPUT, 4), torch.randn(20, B, INPUT)
    (loop,) = sl.Loop(step).plan(x).loops
    assert (loop.backend, loop.launched) == ("eager", "in CUDA graphs")
    assert "in CUDA graphs" in str(sl.Loop(step).plan(x))
    assert not sl.Loop(step, backend="eager").plan(x).loops[0].launched


def test_tf32_is_seen_between_calls():
    cuda_only()
    cell, x = sl.nn.LSTMCell(INPUT, 256).float(), torch.randn(16, 64, INPUT)
    loop, matmul = sl.Loop(cell), torch.backends.cuda.matmul
    with torch.no_grad():
        exact = [loop(x)[0] for _ in range(3)]
        matmul.allow_tf32 = True
        try:
            rounded = [loop(x)[0] for _ in range(3)]
        finally:
            matmul.allow_tf32 = False
        again = loop(x)[0]
    assert all(torch.equal(e, again) for e in exact)
    assert all(not torch.equal(r, again) for r in rounded)
