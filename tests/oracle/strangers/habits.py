"""The habits of Python programmers: caches, dataclasses, closures, keyword arguments, in-place updates, hooks."""

import contextlib
import functools
import math
from dataclasses import dataclass, field
from functools import cached_property, partial, reduce
from typing import NamedTuple

import einops
import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from einops import reduce as einops_reduce
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from . import stranger


def sequences(features):
    return lambda steps, batch: torch.randn(steps, batch, features)


@functools.cache
def rotary_table(size: int) -> Tensor:
    return 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)


@stranger
def a_table_kept_by_lru_cache():
    def fn(carry, x):
        h, t = carry
        angle = t[:, None] * rotary_table(4)
        a, b = x[:, :2], x[:, 2:]
        turned = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
        return (0.9 * h + turned, t + 1), turned

    return fn, lambda b: (torch.zeros(b, 4), torch.zeros(b)), sequences(4)


class Kernel(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)

    @cached_property
    def mask(self):
        return torch.ones(4, 4).tril()

    @property
    def effective(self):
        return self.weight * self.mask

    @functools.lru_cache(maxsize=8)
    def scale(self, n):
        return 1 / math.sqrt(n)


@stranger
def cached_properties():
    kernel = Kernel()

    def fn(h, x):
        h = torch.tanh(h @ kernel.effective * kernel.scale(4) + x)
        return h, h.sum(-1)

    return fn, lambda b: torch.zeros(b, 4), sequences(4)


@dataclass
class Settings:
    decay: float = 0.9
    sizes: list = field(default_factory=lambda: [4, 4])
    activation: object = torch.tanh


class Output(NamedTuple):
    value: Tensor
    extra: dict


@stranger
def einops_everywhere():
    to_heads, qkv = Rearrange("b (h d) -> b h d", h=2), nn.Linear(6, 18)

    def fn(s, x):
        q, k, v = map(to_heads, qkv(x).chunk(3, dim=-1))
        s = 0.9 * s + einsum(k, v, "b h i, b h j -> b h i j")
        out = rearrange(einsum(q, s, "b h i, b h i j -> b h j"), "b h j -> b (h j)")
        pooled = einops_reduce(out, "b (h j) -> b h", "mean", h=2)
        spread = repeat(pooled, "b h -> b (h r)", r=3)
        packed, shapes = einops.pack([out, pooled], "b *")
        a, b = einops.unpack(packed, shapes, "b *")
        return s, (out + spread, a, b)

    return fn, lambda b: torch.zeros(b, 2, 3, 3), sequences(6)


@stranger
def weight_normalised_cell():
    cell = parametrizations.weight_norm(nn.Linear(7, 4))

    def fn(h, x):
        h = torch.tanh(cell(torch.cat((x, h), dim=-1)))
        return h, h

    return fn, lambda b: torch.zeros(b, 4), sequences(3)


@stranger
def spectral_and_orthogonal():
    spectral = parametrizations.spectral_norm(nn.Linear(4, 4)).eval()
    orthogonal = parametrizations.orthogonal(nn.Linear(4, 4, bias=False))

    def fn(h, x):
        h = torch.tanh(orthogonal(h) + spectral(x))
        return h, h

    return fn, lambda b: torch.zeros(b, 4), sequences(4)


@stranger
def orthogonal_by_other_maps():
    cayley = parametrizations.orthogonal(nn.Linear(4, 4, bias=False), orthogonal_map="cayley")
    exponential = parametrizations.orthogonal(nn.Linear(4, 4, bias=False), orthogonal_map="matrix_exp")

    def fn(h, x):
        h = F.softsign(exponential(cayley(h)) + x)
        return h, h

    return fn, lambda b: torch.zeros(b, 4), sequences(4)


class Skew(nn.Module):
    def forward(self, x):
        a = x.triu(1)
        return torch.linalg.matrix_exp(a - a.T)


@stranger
def a_parametrisation_of_ones_own():
    layer = nn.Linear(3, 3, bias=False)
    parametrize.register_parametrization(layer, "weight", Skew())

    def fn(h, x):
        with parametrize.cached():
            h = layer(h) + layer(x)
        return h / h.norm(dim=1, keepdim=True).clamp(min=1), h

    return fn, lambda b: torch.zeros(b, 3), sequences(3)


@stranger
def the_old_weight_norm_and_pruning():
    from torch.nn.utils import weight_norm

    old = weight_norm(nn.Linear(3, 3))
    pruned = prune.l1_unstructured(nn.Linear(3, 3), "weight", amount=0.5)

    def fn(h, x):
        h = torch.tanh(old(h) + pruned(x))
        return h, h

    return fn, lambda b: torch.zeros(b, 3), sequences(3)


@stranger
def checkpointed_inside():
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))

    def inner(h, x):
        return h + net(torch.cat([h, x], -1))

    def fn(h, x):
        h = checkpoint(inner, h, x, use_reentrant=False)
        return torch.tanh(h), h

    return fn, lambda b: torch.zeros(b, 3), sequences(3)


class GradientReversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lam):
        ctx.lam = lam
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.lam * grad.clamp(-0.1, 0.1), None


@stranger
def parts_without_gradients():
    online, average = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)

    def fn(h, x):
        with torch.no_grad():
            target = average(h) + x
        with torch.autocast("cpu", enabled=False), contextlib.nullcontext():
            h = torch.tanh(online(h) + x)
        loss = (h - target.detach()).square().sum(-1)
        return h.detach() + 0.5 * (h - h.detach()), loss

    return fn, lambda b: torch.zeros(b, 3), sequences(3)


@stranger
def functions_made_of_functions():
    layers = [nn.Linear(3, 3) for _ in range(3)]
    stack = reduce(lambda f, g: lambda x: g(f(x)), [lambda x, m=m: F.silu(m(x)) for m in layers])
    shift = partial(torch.add, other=torch.ones(3), alpha=0.1)

    def fn(h, x):
        h = sum(map(torch.tanh, (stack(h), shift(x)))) / 2
        out = {name: getattr(h, name)(-1) for name in ("sum", "mean", "logsumexp")}
        return h, out

    return fn, lambda b: torch.zeros(b, 3), sequences(3)


@stranger
def shapes_computed_in_python():
    def fn(h, x):
        batch, *rest = x.shape
        flat = x.reshape(batch, math.prod(rest))
        width = flat.size(-1) // 2
        a, b = flat.narrow(1, 0, width), flat[:, -width:]
        padded = F.pad(a, (0, h.shape[-1] - width))
        h = h.lerp(padded + F.pad(b, (h.size(1) - width, 0)), 0.5)
        assert h.ndim == 2 and h.numel() == batch * 6
        return h, h.view(batch, -1, 2).transpose(-2, -1).contiguous()

    return fn, lambda b: torch.zeros(b, 6), lambda t, b: torch.randn(t, b, 2, 3)


@stranger
def modules_of_torch_in_a_row():
    norm, rms, act = nn.LayerNorm(4), nn.RMSNorm(4), nn.PReLU(4)
    encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, norm_first=True)
    bilinear = nn.Bilinear(4, 4, 4)

    def fn(h, x):
        h = act(norm(h) + rms(x))
        pair = encoder(torch.stack([h, x], 1))
        return torch.tanh(bilinear(h, pair[:, 0])), F.glu(pair.flatten(1), -1)

    return fn, lambda b: torch.zeros(b, 4), sequences(4)


@stranger
def assertions_and_constants_of_the_step():
    bands = {"low": slice(0, 2), "high": slice(2, None)}

    def fn(h, x):
        assert x.dtype is h.dtype, "dtypes differ"
        scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
        eye = torch.eye(4).to(x)
        parts = [x[..., band] * (i + 1) for i, band in enumerate(bands.values())]
        h = h @ eye * 0.5 + torch.cat(parts, -1) / scale
        h = torch.where(torch.isnan(h), torch.tensor(0.0), h)
        return h, [p.clone() for p in parts]

    return fn, lambda b: torch.zeros(b, 4), sequences(4)


class Counter:
    total = 0

    def __call__(self, h, x):
        return h + x * self.factor, h

    def __init__(self):
        self.factor = 0.5


@stranger
def a_callable_object():
    return Counter(), lambda b: torch.zeros(b, 2), sequences(2)


class Bound(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.register_buffer("mask", torch.tensor([1.0, 0.0]))

    @torch.no_grad()
    def frozen(self, x):
        return self.lin(x) * self.mask

    def advance(self, carry, x):
        (h,) = carry
        return (self.lin(h) + x + self.frozen(x),), h


@stranger
def a_bound_method():
    module = Bound()
    return module.advance, lambda b: (torch.zeros(b, 2),), sequences(2)


@stranger(random=True)
def dropout_noise_and_own_draws():
    drop, feature = nn.Dropout(0.3), nn.AlphaDropout(0.2)
    w = nn.Linear(4, 4)

    def fn(h, x):
        noise = torch.randn_like(h) * 0.1 + torch.rand(h.shape) * 0.01
        keep = torch.bernoulli(torch.full_like(h, 0.8))
        h = torch.tanh(w(drop(h)) + feature(x) + noise) * keep
        flip = torch.rand(h.shape[0], 1) < 0.5
        h = torch.where(flip, -h, h)
        return h, torch.randint(0, 5, (h.shape[0],)), torch.normal(h, 1.0)

    def pair(h, x):
        h, i, n = fn(h, x)
        return h, (i, n)

    return pair, lambda b: torch.zeros(b, 4), sequences(4)
