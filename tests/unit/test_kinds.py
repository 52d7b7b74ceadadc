"""Tensors of every kind, and default devices, given to everything that takes an address: a right result, or an error.

Each way runs in a process of its own, which a wrong address would end.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAD = """
import sys, warnings
import torch, steploop as sl
from torch import nn
from torch._subclasses import FakeTensorMode

warnings.simplefilter("ignore")
BACKEND = sys.argv[1]


class Cell(sl.Step):
    def __init__(self):
        super().__init__()
        self.w, self.h = nn.Linear(4, 4), sl.State(4)

    def step(self, x):
        self.h.next = torch.tanh(self.w(x) + self.h.prev)
        return self.h.next


class Reads(Cell):
    def step(self, x, *, m):
        self.h.next = torch.tanh(self.w(x) + self.h.prev + m)
        return self.h.next


class Lazy(Cell):
    def __init__(self):
        super().__init__()
        self.w = nn.LazyLinear(4)


class Plain(torch.Tensor):
    pass


class Odd(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


x, m = torch.randn(5, 2, 4), torch.randn(2, 4)
cell, reads = Cell(), Reads()
loop, reading = sl.Loop(cell, backend=BACKEND), sl.Loop(reads, backend=BACKEND)
wanted, wanted_m = loop(x)[0].detach(), reading(x, m=m)[0].detach()
emptied, emptied_step = x.clone(), m.clone()
for tensor in (emptied, emptied_step):
    tensor.untyped_storage().resize_(0)
fake = FakeTensorMode(allow_non_fake_inputs=True)


def stream(*inputs, state=None):
    with torch.no_grad():
        made = loop.stream(2)
        for t in range(3):
            made(x[t])
        if state is not None:
            made.state = state
        for given in inputs:
            result = made(given)
        return result


def trained(loop, x):
    x = x.detach().requires_grad_()
    loop(x)[0].sum().backward()
    return x.grad


def on(device, call, *args, **kwargs):
    torch.set_default_device(device)
    try:
        return call(*args, **kwargs)
    finally:
        torch.set_default_device("cpu")


def seen(name, call, expect):
    print(name, flush=True)  # the last name is that of the call that ended the process
    try:
        result = call()
        result = result[0] if isinstance(result, tuple) else result
    except sl.SteploopError as error:
        assert isinstance(expect, str) and expect in str(error), f"{name}: {error}"
        return
    if isinstance(expect, str):
        assert expect == "meta" and result.is_meta or expect == "fake" and not type(result) is torch.Tensor, name
    else:
        assert torch.allclose(result, expect), name


DENSE, SAME = "is not a dense tensor", "several devices"
"""
WAYS = {
    "sequences": """
seen("sparse", lambda: loop(x.to_sparse()), DENSE)
seen("compressed", lambda: loop(torch.eye(4).to_sparse_csr()), DENSE)
seen("mkldnn", lambda: loop(x.to_mkldnn()), DENSE)
seen("quantised", lambda: loop(torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)), DENSE)
seen("nested", lambda: loop(torch.nested.nested_tensor([x[:, 0], x[:3, 1]])), DENSE)
seen("ragged", lambda: loop(torch.nested.nested_tensor([x[:, 0], x[:3, 1]], layout=torch.jagged)), DENSE)
seen("masked", lambda: loop(torch.masked.masked_tensor(x, x > 0)), "operations of its own")
seen("own function", lambda: loop(x.as_subclass(Odd)), "x.as_subclass(torch.Tensor)")
seen("subclass", lambda: loop(x.as_subclass(Plain)), wanted)
seen("parameter", lambda: loop(nn.Parameter(x)), wanted)
seen("buffer", lambda: loop(nn.Buffer(x)), wanted)
seen("fake", lambda: loop(fake.from_tensor(x)), "fake")
seen("without memory", lambda: loop(emptied), "has no memory")
seen("without memory, in a loop", lambda: trained(loop, emptied), "has no memory")
seen("negative", lambda: loop(torch._neg_view(-x)), wanted)
seen("negative part", lambda: loop(torch.complex(x, -x).conj().imag), wanted)
seen("negative constant", lambda: reading(x, m=torch._neg_view(-m)), wanted_m)
seen("expanded", lambda: loop(x[:1].expand(5, 2, 4)), loop(x[:1].repeat(5, 1, 1))[0])
seen("unaligned", lambda: loop(torch.frombuffer(bytearray(161), dtype=torch.float32, offset=1).view(5, 2, 4)),
     loop(torch.zeros(5, 2, 4))[0])
seen("lazy", lambda: sl.Loop(Lazy(), backend=BACKEND)(x)[0].shape == x.shape and wanted, wanted)
""",
    "streams": """
seen("sparse", lambda: stream(x[0].to_sparse()), DENSE)
seen("negative", lambda: stream(torch._neg_view(-x[0])), stream(x[0]))
seen("fake", lambda: stream(fake.from_tensor(x[0])), "fake")
seen("meta", lambda: stream(x[0].to("meta")), SAME)
if BACKEND == "cpu":
    seen("without memory", lambda: stream(emptied_step), "has no memory")
seen("meta state", lambda: stream(x[0], state={"h": torch.zeros(2, 4, device="meta")}), SAME)
seen("sparse state", lambda: stream(x[0], state={"h": torch.zeros(2, 4).to_sparse()}), DENSE)
seen("negative state", lambda: stream(x[0], state={"h": torch._neg_view(-m)}), stream(x[0], state={"h": m}))
""",
    "meta": """
meta, xm, mark = sl.Loop(Cell(), backend=BACKEND).to("meta"), x.to("meta"), torch.ones(5, 2, dtype=torch.bool)
there = "meta"
seen("all", lambda: meta(xm), there)
seen("gradients", lambda: trained(meta, xm), there)
seen("lengths", lambda: meta(xm, lengths=[3, 5]), there)
seen("marks", lambda: meta(xm, mask=mark, resets=mark), there)
seen("marks on meta", lambda: meta(xm, mask=mark.to("meta"), resets=mark.to("meta")), there)
seen("real marks only", lambda: loop(x, lengths=torch.tensor([3, 5], device="meta")), "`lengths` is on the meta device")
seen("real mask only", lambda: loop(x, resets=mark.to("meta")), "`resets` is on the meta device")
seen("state", lambda: loop(x, state={"h": torch.zeros(2, 4, device="meta")}), SAME)
seen("constant", lambda: reading(x, m=m.to("meta")), SAME)
seen("cell", lambda: sl.Loop(sl.nn.GRUCell(3, 4, device="meta"), backend=BACKEND)(x[..., :3].to("meta")), there)
seen("layer", lambda: sl.nn.LSTM(4, 4, 2, bidirectional=True, device="meta")(xm), "meta")
seen("scan", lambda: sl.scan(lambda h, x: (h + x, h * x), xm[0], xm), "meta")
seen("mixing", lambda: sl.scan(lambda h, x: (h - h.mean(0) + x, h), xm[0], xm, lengths=[3, 5])[1], "meta")
seen("memory", lambda: sl.memory.CumSum()(xm), "meta")
cell.to("meta")
seen("after a call", lambda: loop(xm), "meta")
stream = sl.Loop(cell).stream(2)
seen("stream", lambda: [stream(xm[0]) for _ in range(4)][-1], "meta")
""",
    "default devices": """
keywords = dict(lengths=torch.tensor([5, 2]), mask=torch.rand(5, 2) < 0.7, resets=torch.rand(5, 2) < 0.3)
reverse = sl.Loop(cell, backend=BACKEND, reverse=True)
calls = {
    "plain": lambda: loop(x)[0], "fresh": lambda: sl.Loop(cell, backend=BACKEND)(x)[0],
    "lists": lambda: loop(x, lengths=[5, 2])[0], "ragged": lambda: loop(x, **keywords)[0],
    "repeat": lambda: loop(x, **keywords, on_masked="repeat")[0], "reverse": lambda: reverse(x, **keywords)[0],
    "gradient": lambda: trained(loop, x), "stream": lambda: stream(x[0], x[1]), "large": lambda: loop(large)[0],
    "scan": lambda: sl.scan(lambda h, x: (torch.tanh(h + x).cumsum(0), h * x), x[0], x, backend=BACKEND)[1],
    "memory": lambda: sl.memory.CumMax()(x, lengths=[5, 2])[0],
}
large = torch.randn(300, 300, 4)
expected = {name: call() for name, call in calls.items()}
for name, call in calls.items():
    seen(name, lambda: on("meta", call), expected[name])
    seen(name, call, expected[name])
makes = lambda h, x: (torch.tanh(h + x + torch.ones(4, device=None if asked else "cpu")), h)
asked = False
seen("inside", lambda: on("meta", sl.scan, makes, x[0], x)[1], sl.scan(makes, x[0], x)[1])
asked = True
seen("of the step", lambda: on("meta", sl.scan, makes, x[0], x)[1], SAME)
seen("of the step, once more", lambda: sl.scan(makes, x[0], x)[1], sl.scan(makes, x[0], x, backend="reference")[1])
""",
}


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("way", WAYS)
def test_tensors_of_every_kind(way, backend):
    done = subprocess.run([sys.executable, "-c", HEAD + WAYS[way], backend], capture_output=True, text=True)
    last = (done.stdout.splitlines() or ["nothing"])[-1]
    assert done.returncode == 0, f"{last}: {done.stderr or f'signal {-done.returncode}'}"
