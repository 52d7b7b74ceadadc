"""Steps as people write them, under every argument of a Loop: outputs, final states and all gradients equal
those of the plain loop. One step of each kind serves all calls, so that a capture has to serve them too."""

from __future__ import annotations

import pytest
import torch
from agree import agree
from torch import nn
from torch.nn import functional as F

import steploop as sl

T, B, INPUT, HIDDEN, MEMORY = 5, 3, 4, 6, 4
STEPS = {}


def data(*shape, grad=True, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


class Base(sl.Step):
    """A tanh cell whose subclasses say what becomes of x, of the new state and of the output."""

    def __init__(self, size=INPUT):
        super().__init__()
        self.h = sl.State(HIDDEN)
        self.w = nn.Linear(size + HIDDEN, HIDDEN)

    def new(self, x):
        return torch.tanh(self.w(torch.cat([x, self.h.prev], -1)))

    def step(self, x):
        self.h.next = self.new(x)
        return self.h.next


def step(*arguments, **constants):
    """Registers a Step with the shapes of its sequences (after T, B) or functions that make its arguments."""

    def register(cls):
        STEPS[cls.__name__] = (cls, arguments or ((INPUT,),), constants)
        return cls

    return register


def made(shape):
    return shape() if callable(shape) else data(T, B, *shape)


step()(Base)


@step(lambda: {"a": data(T, B, INPUT), "b": data(T, B, 2)})
class PytreesInAndOut(Base):
    def __init__(self):
        super().__init__()
        self.n = sl.State(dtype=torch.int64, init=0)

    def step(self, x):
        h = super().step(x["a"])
        self.n.next = self.n.prev + 1
        return {"y": h, "more": (h * 2, self.n.next, None, x["b"][:, 0] > 0)}


@step((INPUT,), (2,), c=lambda: data(B, HIDDEN), m=lambda: sl.unbatched(data(HIDDEN, HIDDEN)))
class SeveralSequencesAndConstants(Base):
    def __init__(self):
        super().__init__(INPUT + 2)

    def step(self, x, y, *, c, m):
        self.h.next = (self.new(torch.cat([x, y], -1)) + c) @ m
        return self.h.next


@step(memory=lambda: data(B, 3))
class Begins(Base):
    def __init__(self):
        super().__init__()
        self.bridge = nn.Linear(3, HIDDEN)

    def begin(self, *, memory):
        self.h.prev = torch.tanh(self.bridge(memory))

    def step(self, x, *, memory):
        return super().step(x)


@step()
class LearnedInitialState(Base):
    def __init__(self):
        super().__init__()
        self.h = sl.State(HIDDEN, init="learned")
        self.c = sl.State(2, 2, init=torch.full((2, 2), 0.3))

    def step(self, x):
        self.c.next = self.c.prev * 0.5 + x.view(-1, 2, 2)
        return super().step(x), self.c.next.sum((1, 2))


@step(
    memory=lambda: data(B, MEMORY, HIDDEN), seen=lambda: torch.arange(MEMORY) < torch.tensor([[3], [2], [4]])
)
class Attention(Base):
    def __init__(self):
        super().__init__(INPUT + HIDDEN)
        self.context = sl.State(HIDDEN)
        self.query, self.out = nn.Linear(HIDDEN, HIDDEN), nn.Linear(2 * HIDDEN, 7)

    def step(self, x, *, memory, seen):
        h = self.new(torch.cat([x, self.context.prev], -1))
        scores = torch.einsum("bd,bsd->bs", self.query(h), memory).masked_fill(~seen, -1e9)
        weights = torch.softmax(scores, -1)
        self.h.next, self.context.next = h, torch.einsum("bs,bsd->bd", weights, memory)
        return self.out(torch.cat([h, self.context.next], -1)), weights


@step(memory=lambda: data(B, MEMORY, HIDDEN))
class HeadsByViews(Base):
    def __init__(self):
        super().__init__()
        # Without a bias on the keys: softmax does not see it, so its gradient is rounding alone.
        self.q, self.v = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.k = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def heads(self, x):
        return x.view(x.shape[0], -1, 2, HIDDEN // 2).transpose(1, 2)

    def step(self, x, *, memory):
        h = self.new(x)
        q, k, v = self.heads(self.q(h)), self.heads(self.k(memory)), self.heads(self.v(memory))
        weights = torch.softmax(q @ k.transpose(-1, -2) / 3**0.5, -1)
        self.h.next = h + (weights @ v).transpose(1, 2).reshape(-1, HIDDEN)
        return self.h.next


@step(memory=lambda: data(B, MEMORY, HIDDEN))
class ScaledDotProductAttention(HeadsByViews):
    def step(self, x, *, memory):
        h = self.new(x)
        q, k, v = self.heads(self.q(h)), self.heads(self.k(memory)), self.heads(self.v(memory))
        mixed = F.scaled_dot_product_attention(q, k, v)
        self.h.next = h + mixed.transpose(1, 2).reshape(-1, HIDDEN)
        return self.h.next


@step(memory=lambda: data(B, MEMORY, HIDDEN))
class MultiheadModule(Base):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(HIDDEN, 2, batch_first=True, bias=False)

    def step(self, x, *, memory):
        h = self.new(x)
        mixed, weights = self.attention(h[:, None], memory, memory)
        self.h.next = h + mixed[:, 0]
        return self.h.next, weights[:, 0]


@step()
class InPlace(Base):
    def step(self, x):
        z = self.w(torch.cat([x, self.h.prev], -1))
        z.add_(1.0).exp_()
        z = z * 0.1
        z[:, 0] = x[:, 0]
        z[:, 1:3] += x[:, 1:3]
        before = self.h.prev
        before.add_(z)
        x.mul_(2)
        self.h.next = before * 0.5
        return z + x[:, :1]


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient / (1 + x.abs()) ** 2


@step()
class SurrogateGradient(Base):
    def __init__(self):
        super().__init__()
        self.v = sl.State(HIDDEN)

    def step(self, x):
        v = 0.9 * self.v.prev + self.w(torch.cat([x, self.h.prev], -1))
        spike = Spike.apply(v - 0.1)
        self.v.next, self.h.next = v * (1 - spike.detach()), spike
        return spike


@step()
class NoGradAndDetach(Base):
    def __init__(self):
        super().__init__()
        self.average = sl.State(HIDDEN)

    def step(self, x):
        h = self.new(x)
        with torch.no_grad():
            self.average.next = 0.9 * self.average.prev + 0.1 * h
        self.h.next = h - self.average.next + self.h.prev.detach()
        return h


@step(lambda: torch.randint(0, 5, (T, B)))
class Embeddings(Base):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, INPUT, padding_idx=0)
        self.before = sl.State(dtype=torch.int64, init=1)

    def step(self, x):
        self.before.next = x
        return super().step(self.table(x) + self.table(self.before.prev))


@step((INPUT,), lambda: torch.randint(0, HIDDEN, (T, B)))
class GatherAndScatter(Base):
    def __init__(self):
        super().__init__()
        self.slots = sl.State(4, 2)

    def step(self, x, k):
        h = self.new(x)
        place = (k % 4)[:, None, None].expand(-1, 1, 2)
        self.slots.next = self.slots.prev.scatter(1, place, h[:, None, :2])
        self.h.next = h + self.slots.next.sum((1, 2))[:, None]
        return h.gather(1, k[:, None].expand(-1, 2)) + self.slots.next.gather(1, place)[:, 0]


@step()
class MixesRows(Base):
    def step(self, x):
        h = self.new(x - x.mean(0))
        self.h.next = h + h.sum(0)
        return h


@step()
class BatchNormEval(Base):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN)
        nn.init.normal_(self.norm.running_mean)
        self.eval()

    def step(self, x):
        self.h.next = torch.tanh(self.norm(self.w(torch.cat([x, self.h.prev], -1))))
        return self.h.next


@step()
class FixedBatchInAClosure(Base):
    def __init__(self):
        super().__init__()
        self.per_row = nn.Parameter(torch.randn(B, HIDDEN))

    def step(self, x):
        self.h.next = self.new(x) + self.per_row
        return self.h.next


class Inner(Base):
    def __init__(self):
        super().__init__(2)


@step()
class LoopInside(Base):
    def __init__(self):
        super().__init__(HIDDEN)
        self.inner = sl.Loop(Inner(), backend="eager")

    def step(self, x):
        outputs, state = self.inner(x.view(-1, 2, 2).transpose(0, 1))
        return super().step(outputs[-1] + state["h"])


@step()
class LoopInsideFedByTheState(LoopInside):
    def step(self, x):
        return super().step(x + self.h.prev[:, :INPUT])


@step()
class ScanInside(Base):
    def step(self, x):
        h = self.new(x)
        total, sums = sl.scan(
            lambda c, k: (c * 0.5 + k, c), torch.zeros_like(h[:, 0]), h.t(), backend="eager"
        )
        self.h.next = h + total[:, None]
        return sums.t()


@step()
class NestedAndShared(sl.Step):
    def __init__(self):
        super().__init__()
        self.a, self.b = Base(), Base(HIDDEN)
        self.c = sl.share(self.a)

    def step(self, x):
        g = self.b(self.a(x))
        return self.c(g[:, :INPUT]) + g


@step()
class DelayLine(sl.Step):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = sl.State(INPUT), sl.State(INPUT), sl.State(INPUT)

    def step(self, x):
        self.c.next, self.b.next, self.a.next = self.b.prev, self.a.prev, x
        return self.a.prev + 2 * self.b.prev * self.c.prev


@step()
class SwappedAndUntouched(sl.Step):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.kept, self.unread = (sl.State(HIDDEN) for _ in range(4))

    def step(self, x):
        self.a.next, self.b.next = self.b.prev, self.a.prev + 1
        return self.a.prev * self.b.prev + self.kept.prev.sum(1, keepdim=True)


@step(c=lambda: data(B, HIDDEN))
class ConstantNexts(sl.Step):
    def __init__(self):
        super().__init__()
        self.a, self.b = sl.State(HIDDEN), sl.State(HIDDEN)
        self.p = nn.Parameter(torch.randn(HIDDEN))

    def step(self, x, *, c):
        self.a.next, self.b.next = c, self.p.expand(x.shape[0], -1)
        return self.a.prev * self.b.prev


@step(c=lambda: data(B, HIDDEN))
class OutputsThatAreInputs(Base):
    def step(self, x, *, c):
        self.h.next = self.h.prev + 1
        return self.w.bias.expand(x.shape[0], -1), c, torch.ones(x.shape[0], 2), x, self.h.prev


@step()
class NoOutput(Base):
    def step(self, x):
        super().step(x)


@step((1, 4, 4))
class Convolution(sl.Step):
    def __init__(self):
        super().__init__()
        self.h = sl.State(2, 4, 4)
        self.w, self.norm = nn.Conv2d(3, 2, 3, padding=1), nn.GroupNorm(1, 2)

    def step(self, x):
        self.h.next = torch.tanh(self.norm(self.w(torch.cat([x, self.h.prev], 1))))
        return F.max_pool2d(self.h.next, 2), F.avg_pool2d(self.h.next, 2)


@step()
class BoolState(Base):
    def __init__(self):
        super().__init__()
        self.done = sl.State(dtype=torch.bool, init=False)

    def step(self, x):
        done = self.done.prev | (x[:, 0] > 1)
        self.h.next = torch.where(done[:, None], self.h.prev, self.new(x))
        self.done.next = done
        return self.h.next, done


@step()
class BatchAxisMoves(sl.Step):
    def __init__(self):
        super().__init__()
        self.h, self.w = sl.State(2, 3), nn.Linear(3, 3)

    def step(self, x):
        self.h.next = torch.tanh(self.w(self.h.prev.reshape(-1, 3)).view(-1, 2, 3) + x[:, :2, None])
        doubled = torch.stack([x, x * 2], 1).flatten(0, 1).view(-1, 2, INPUT)
        return self.h.next.flatten(1), self.h.next.permute(2, 0, 1).sum(0), doubled


@step()
class LayerNormLSTM(sl.Step):
    def __init__(self):
        super().__init__()
        self.h, self.c = sl.State(HIDDEN), sl.State(HIDDEN)
        self.w = nn.Linear(INPUT + HIDDEN, 4 * HIDDEN)
        self.norm, self.cell_norm = nn.LayerNorm(4 * HIDDEN), nn.LayerNorm(HIDDEN)

    def step(self, x):
        i, f, g, o = self.norm(self.w(torch.cat([x, self.h.prev], -1))).chunk(4, -1)
        self.c.next = torch.sigmoid(f) * self.c.prev + torch.sigmoid(i) * torch.tanh(g)
        self.h.next = torch.sigmoid(o) * torch.tanh(self.cell_norm(self.c.next))
        return self.h.next


# -- the calls -----------------------------------------------------------------------------------------------


def calls():
    lengths = torch.tensor([T, 0, 3])
    mask, resets = torch.rand(T, B) > 0.3, torch.rand(T, B) > 0.6
    everything = {"lengths": lengths, "mask": mask, "resets": resets}
    yield {}, {}
    yield {"lengths": lengths}, {}
    yield {"resets": resets}, {"reverse": True}
    yield everything, {}
    yield {**everything, "on_masked": "repeat"}, {"reverse": True}


def with_nan_where_masked(xs, call):
    """What stands at a masked step is never read, whatever it is."""
    valid = torch.ones(T, B, dtype=torch.bool)
    if "lengths" in call:
        valid &= torch.arange(T)[:, None] < call["lengths"]
    if "mask" in call:
        valid &= call["mask"]
    torch.utils._pytree.tree_map_only(
        torch.Tensor,
        lambda x: x.data.masked_fill_(~_wide(valid, x), float("nan")) if x.requires_grad else x,
        xs,
    )


def _wide(mark, like):
    return mark.view(*mark.shape, *[1] * (like.dim() - 2))


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", STEPS)
def test_every_call_gives_what_the_plain_loop_gives(name):
    cls, shapes, constants = STEPS[name]
    cell = cls()
    given = {k: v() for k, v in constants.items()}
    for i, (call, loop) in enumerate(calls()):
        xs = [made(shape) for shape in shapes]
        with_nan_where_masked(xs, call)
        if i % 2 and not isinstance(cell, Begins):
            call = {**call, "state": given_state(cell)}
        # Both policies in turn; what is saved must not depend on masks.
        agree(cell, *xs, loop=loop, save=("all", "states")[i % 2], **call, **given)


def given_state(cell):
    _, state = sl.Loop(cell, backend="reference")(*example(cell)[0], **example(cell)[1])
    return {
        k: torch.randn_like(v).requires_grad_() if v.is_floating_point() else v.detach()
        for k, v in state.items()
    }


def example(cell):
    _, shapes, constants = STEPS[type(cell).__name__]
    return [made(shape) for shape in shapes], {k: v() for k, v in constants.items()}


@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("batch", [1, 5])
def test_sizes(steps, batch):
    cell = Base()
    agree(cell, data(steps, batch, INPUT))
    agree(
        cell, data(steps, batch, INPUT), state={"h": data(batch, HIDDEN)},
        lengths=torch.randint(0, steps + 1, (batch,)), resets=torch.rand(steps, batch) > 0.5,
    )  # fmt: skip


def test_no_sequence():
    class Free(sl.Step):
        def __init__(self):
            super().__init__()
            self.h, self.w = sl.State(HIDDEN), nn.Linear(HIDDEN, HIDDEN)

        def step(self):
            self.h.next = torch.tanh(self.w(self.h.prev))
            return self.h.next

    cell = Free()
    for loop in ({}, {"reverse": True}):
        agree(cell, state={"h": data(B, HIDDEN)}, steps=4, loop=loop)
        agree(cell, steps=4, batch_size=2, loop=loop)
        agree(cell, steps=5, lengths=torch.tensor([5, 0, 3]), state={"h": data(B, HIDDEN)}, loop=loop)


def test_only_some_tensors_require_gradients():
    cell = Base().requires_grad_(False)
    given = {"h": data(B, HIDDEN)}
    agree(cell, data(T, B, INPUT, grad=False))
    agree(cell, data(T, B, INPUT, grad=False), state=given)
    agree(cell, data(T, B, INPUT))
    agree(cell, data(T, B, INPUT, grad=False), state=given, resets=torch.rand(T, B) > 0.5)
    cell.w.weight.requires_grad_()
    agree(cell, data(T, B, INPUT, grad=False))


def test_batch_norm_over_the_batch():
    class OfTheBatch(BatchNormEval):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(INPUT + HIDDEN, HIDDEN, bias=False)
            self.norm = nn.BatchNorm1d(HIDDEN, track_running_stats=False)

    cell = OfTheBatch().train()
    agree(cell, data(T, B, INPUT))
    # At least two rows at every step: with one, torch's batch norm is an error.
    agree(cell, data(T, B, INPUT), lengths=torch.tensor([5, 3, 5]), resets=torch.rand(T, B) > 0.5)


def test_a_step_that_reads_the_batch_size():
    class ReadsTheBatchSize(Base):
        def step(self, x):
            self.h.next = self.new(x) / x.shape[0]
            return self.h.next + torch.arange(x.shape[0])[:, None]

    cell = ReadsTheBatchSize()
    for batch in (3, 5, 1):
        agree(cell, data(T, batch, INPUT))
    agree(cell, data(T, B, INPUT), resets=torch.rand(T, B) > 0.5, loop={"reverse": True})


def test_float32():
    torch.set_default_dtype(torch.float32)
    cell = LayerNormLSTM()
    for call, loop in calls():
        agree(cell, data(T, B, INPUT, dtype=torch.float32), loop=loop, **call)


def test_random_numbers_are_fresh_at_every_step_and_repeat_with_the_seed():
    class Noisy(Base):
        def step(self, x):
            return super().step(F.dropout(x, 0.5)), torch.rand(x.shape[0])

    loop = sl.Loop(Noisy(), backend="eager")
    xs = data(50, B, INPUT)

    def run():
        torch.manual_seed(5)
        (outputs, random), _ = loop(xs)
        return outputs, random, *torch.autograd.grad(outputs.sum(), xs)

    first, again = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[1].unique().numel() == 50 * B
    # The same mask in the forward and in the backward: what was dropped has no gradient.
    assert 0.3 < float((first[2] == 0).double().mean()) < 0.7


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("marks", ["resets", "mask"])
def test_marks_that_do_not_stand_one_after_the_other(marks, backend):
    cell, x = sl.nn.GRUCell(3, 2), torch.randn(4, 5, 3)
    flags = torch.rand(4, 5, 2) < 0.5
    for given in (flags[..., 0], torch.rand(5, 4).T < 0.5, flags[:1, :, 1].expand(4, 5)):
        found, expected = (sl.Loop(cell, backend=one)(x, **{marks: given})[0] for one in (backend, "reference"))
        torch.testing.assert_close(found, expected)
