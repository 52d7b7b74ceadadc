"""What stands around a step, or in it, in other people's programs: anomaly detection, inference mode, torch.compile,
generators, checkpoints, quantised layers, pickles. Each works as in the plain loop, or an error says what to do."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import steploop as sl

BACKENDS = ["eager", "cpu"]


class Cell(sl.Step):
    def __init__(self, layer=None):
        super().__init__()
        self.w, self.h = nn.Linear(4, 4) if layer is None else layer, sl.State(4)

    def step(self, x):
        self.h.next = torch.tanh(self.w(x) + self.h.prev)
        return self.h.next


XS = torch.linspace(-1, 1, 40).view(5, 2, 4)


def plain(step, xs=XS):
    return sl.Loop(step, backend="reference")(xs)[0]


def gradients(run, step, xs=XS):
    """The outputs, and the gradients of inputs and parameters."""
    xs = xs.detach().clone().requires_grad_()
    outputs = run(xs)
    (outputs * torch.linspace(0, 1, outputs.numel()).view_as(outputs)).sum().backward()
    found = [outputs.detach(), xs.grad, *(p.grad for p in step.parameters())]
    step.zero_grad()
    return found


def same(found, wanted, **tolerances):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **tolerances)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_call_under_anomaly_detection(backend):
    step = Cell()
    wanted = gradients(lambda x: plain(step, x), step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            loop = sl.Loop(step, backend=backend)
            same(gradients(lambda x: loop(x)[0], step), wanted)
            with pytest.raises(RuntimeError, match="nan values"):
                gradients(lambda x: loop(torch.sqrt(x * 0))[0], step)
        assert not torch.is_anomaly_enabled()


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_in_inference_mode_and_over_its_parameters(backend):
    with torch.inference_mode():
        step = Cell()
        stream = sl.Loop(step, backend=backend).stream(2)
        outputs = [stream(x) for x in XS]
        same([torch.stack(outputs)], [plain(step)])
    with torch.no_grad():
        stream = sl.Loop(step, backend=backend).stream(2)
        outputs = [stream(x) for x in XS[:4]]
        same([torch.stack(outputs)], [plain(step)[:4]])
        with torch.inference_mode():
            step.w.weight.mul_(2)  # which torch does not count
        wanted = torch.tanh(step.w(XS[4]) + outputs[-1])
        same([stream(XS[4])], [wanted])


def test_inside_torch_compile():
    weight = nn.Parameter(torch.eye(4))
    step = Cell()
    loop = sl.Loop(step)

    def scanned(x):
        return sl.scan(lambda h, x: (torch.tanh(h @ weight + x),) * 2, torch.zeros(2, 4), x)[1] * 2

    for backend in ("eager", "aot_eager"):
        same(gradients(torch.compile(scanned, backend=backend), step), gradients(scanned, step))
    with torch.no_grad():
        stream = loop.stream(2)
        outputs = [torch.compile(lambda x: stream(x) * 2, backend="eager")(x) for x in XS]
        same([torch.stack(outputs)], [2 * plain(step)])

        def streamed(xs):
            made = loop.stream(2)
            return torch.stack([made(x) for x in xs]) + 1

        same([torch.compile(streamed, backend="eager")(XS)], [plain(step) + 1])


def compiled_layer():
    layer = nn.Linear(4, 4)
    layer.compile(backend="eager")
    return layer


@pytest.mark.parametrize("make", [lambda: torch.compile(nn.Linear(4, 4), backend="eager"), compiled_layer])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_module_in_a_step(make, backend):
    step = Cell(make())
    same(gradients(lambda x: sl.Loop(step, backend=backend)(x)[0], step), gradients(lambda x: plain(step, x), step))


def test_a_compiled_function_in_a_step():
    function = torch.compile(lambda a, b: torch.tanh(a + b), backend="eager")
    found = sl.scan(lambda h, x: (function(h, x),) * 2, torch.zeros(2, 4), XS)
    wanted = sl.scan(lambda h, x: (torch.tanh(h + x),) * 2, torch.zeros(2, 4), XS)
    same(found, wanted)


@pytest.mark.parametrize("batched", [{}, {"lengths": [5, 3]}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_own_generator(backend, batched):
    generator = torch.Generator()

    def fn(h, x):
        noise = torch.rand(x.shape, generator=generator) + torch.randn(x.shape, generator=generator)
        kept = torch.bernoulli(torch.full_like(x, 0.5), generator=generator)
        label = torch.multinomial(torch.softmax(h, -1), 1, generator=generator)
        return torch.tanh(h + noise * kept), (noise, kept, label)

    def run(seed):
        generator.manual_seed(seed)
        return sl.scan(fn, torch.zeros(2, 4), XS, backend=backend, **batched)

    before = torch.get_rng_state()
    (state, (noise, kept, label)), again, other = run(1), run(1), run(2)
    assert torch.equal(before, torch.get_rng_state()), "torch's own generator must not move"
    assert torch.equal(state, again[0]) and not torch.equal(state, other[0])
    assert not torch.equal(noise[0], noise[1]) and set(kept.unique().tolist()) == {0.0, 1.0} and label.max() < 4
    assert not torch.equal(run(1)[0], sl.scan(fn, torch.zeros(2, 4), XS, backend=backend, **batched)[0])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_in_a_step(backend, reentrant):
    layer = nn.Linear(4, 4)

    def fn(h, x):
        h = checkpoint(lambda a, b: torch.tanh(layer(a) + b), h, x, use_reentrant=reentrant)
        return h, h

    def run(backend):
        return lambda x: sl.scan(fn, torch.zeros(2, 4), x, backend=backend)[1]

    same(gradients(run(backend), layer), gradients(run("reference"), layer))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_a_loop(reentrant):
    step = Cell()
    loop = sl.Loop(step)
    found = gradients(lambda x: checkpoint(lambda z: loop(z)[0], x, use_reentrant=reentrant), step)
    same(found, gradients(lambda x: plain(step, x), step))


@pytest.mark.parametrize("call", [lambda m: m(XS)[0], lambda m: m.stream(2)(XS[0])])
def test_tracing_with_torch_jit(call):
    class Holds(nn.Module):
        def __init__(self, backend):
            super().__init__()
            self.loop = sl.Loop(Cell(), backend=backend)

        def forward(self, x):
            return call(self.loop) + x.sum()

    with pytest.raises(sl.UnsupportedError, match="torch.jit.trace") as caught:
        torch.jit.trace(Holds("auto"), XS)
    assert 'backend="reference"' in str(caught.value) and "torch.export" in str(caught.value)


def test_a_warm_stream_under_torch_jit():
    with torch.no_grad():
        stream = sl.Loop(Cell()).stream(2)
        for x in XS:
            stream(x)
        with pytest.raises(sl.UnsupportedError, match="torch.jit.trace"):
            torch.jit.trace(lambda x: stream(x), XS[0], check_trace=False)


def test_the_plain_loop_under_torch_jit():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.loop = sl.Loop(Cell(), backend="reference")

        def forward(self, x):
            return self.loop(x)[0]

    held = Holds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(held, XS)
    same([traced(XS * 2)], [held(XS * 2)])


def test_the_graph_in_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with pytest.raises(sl.UnsupportedError, match="add_graph"):
        tensorboard.SummaryWriter(str(tmp_path)).add_graph(sl.Loop(Cell()), XS)


def test_symbolic_tracing():
    with pytest.raises(sl.UnsupportedError, match="symbolic_trace"):
        torch.fx.symbolic_trace(nn.Sequential(sl.Loop(Cell())))


class Scaled(Cell):
    factor = 1

    def step(self, x):
        return super().step(x) * self.factor


@pytest.mark.parametrize("warm", [False, True])
def test_dynamically_quantised_layers(warm):
    loop = sl.Loop(Scaled())
    if warm:
        loop(XS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(loop, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        same([small(XS)[0]], [plain(small.step)], atol=1e-6, rtol=1e-5)
        stream = small.stream(2)
        same([torch.stack([stream(x) for x in XS])], [plain(small.step)], atol=1e-6, rtol=1e-5)
        small.step.factor = 2  # the step is captured again
        same([small(XS)[0]], [plain(small.step)], atol=1e-6, rtol=1e-5)
        small.step.factor = 3
        same([small(XS[:, :1])[0]], [plain(small.step, XS[:, :1])], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("copied", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy])
@pytest.mark.parametrize("step", [Cell, lambda: sl.nn.LSTMCell(4, 4), lambda: sl.memory.Delay(2)])
def test_a_warm_stream_is_copied(step, copied):
    with torch.no_grad():
        stream = sl.Loop(step()).stream(2)
        for x in XS[:3]:
            stream(x)
        other = copied(stream)
        assert list(other.state) == list(stream.state)
        for x in XS[3:]:
            same([other(x)], [stream(x)])


def test_saved_states_are_loaded_without_trust():
    loop = sl.Loop(Cell())
    states = loop(XS)[1].detach()
    file = io.BytesIO()
    torch.save({"state": states, "epoch": 3}, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)["state"]
    assert type(found) is sl.States and torch.equal(found["h"], states["h"])
    same([loop(XS, state=found.clone())[0]], [loop(XS, state=states)[0]])
    assert not found.reset_()["h"].any()


class Plain(torch.Tensor):
    pass


class Odd(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("kind", [Plain, Odd])
def test_a_weight_of_a_subclass(kind):
    step, weight = Cell(), torch.eye(4).as_subclass(kind)
    with pytest.raises(sl.StepError, match=r"test_surroundings.py:\d+: the step computes with a (Plain|Odd)") as caught:
        sl.scan(lambda h, x: (torch.tanh(h @ weight + x), h), torch.zeros(2, 4), XS)
    assert "as_subclass(torch.Tensor)" in str(caught.value)
    step.w.weight = nn.Parameter(step.w.weight.detach().as_subclass(kind))
    with pytest.raises(sl.StepError, match="a subclass of Tensor"):
        sl.Loop(step)(XS)
