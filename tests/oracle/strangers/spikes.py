"""Spiking neurons with surrogate gradients, binary and quantised networks."""

import torch
import torch.nn.functional as F
from torch import nn

from . import stranger


def sequences(features):
    return lambda steps, batch: torch.randn(steps, batch, features)


class FastSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        (u,) = ctx.saved_tensors
        return grad_output / (1 + 10 * u.abs()) ** 2


class ATan(torch.autograd.Function):
    """With setup_context, a constant and an output that is not differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u, alpha):
        return torch.heaviside(u, torch.zeros_like(u)), u > 0

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        u, ctx.alpha = inputs
        ctx.save_for_backward(u)
        ctx.mark_non_differentiable(outputs[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return None, None
        (u,) = ctx.saved_tensors
        return ctx.alpha / 2 / (1 + (torch.pi / 2 * ctx.alpha * u) ** 2) * grad, None


class StraightThroughRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, levels):
        return torch.round(x * levels) / levels

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@stranger
def leaky_integrate_and_fire():
    w, beta = nn.Linear(3, 5), nn.Parameter(torch.tensor(0.9))

    def fn(mem, x):
        mem = torch.clamp(beta, 0, 1) * mem + w(x)
        spike = FastSigmoid.apply(mem - 1)
        return mem - spike.detach(), (spike, mem)

    return fn, lambda b: torch.zeros(b, 5), sequences(3)


@stranger
def adaptive_thresholds():
    w_in, w_rec = nn.Linear(3, 5, bias=False), nn.Parameter(torch.randn(5, 5) / 3)
    mask = 1 - torch.eye(5)

    def fn(state, x):
        v, spike, b, refractory = state
        v = 0.9 * v + w_in(x) + spike @ (w_rec * mask) - spike * (1 + 1.8 * b)
        b = 0.97 * b + 0.03 * spike
        new, fired = ATan.apply((v - 1 - 1.8 * b) / (1 + 1.8 * b), 2.0)
        new = torch.where(refractory > 0, torch.zeros_like(new), new)
        refractory = torch.clamp(refractory - 1, min=0) + (fired & (refractory == 0)) * 2
        return (v, new, b, refractory.to(torch.int32)), new

    def init(n):
        return torch.zeros(n, 5), torch.zeros(n, 5), torch.zeros(n, 5), torch.zeros(n, 5, dtype=torch.int32)

    return fn, init, sequences(3)


@stranger
def izhikevich():
    def fn(vu, current):
        v, u = vu[..., 0], vu[..., 1]
        v = v + 0.5 * (0.04 * v**2 + 5 * v + 140 - u + 5 * current)
        v = v + 0.5 * (0.04 * v.pow(2) + 5 * v + 140 - u + 5 * current)
        u = u + 0.02 * (0.2 * v - u)
        fired = v >= 30
        v, u = v.masked_fill(fired, -65.0), torch.where(fired, u + 8, u)
        return torch.stack((v.clamp(-90, 30), u), dim=-1), fired

    def init(b):
        return torch.stack([torch.full((b, 3), -65.0), torch.full((b, 3), -13.0)], -1)

    return fn, init, sequences(3)


@stranger
def soft_reset_with_stop_gradient():
    w = nn.Parameter(torch.randn(4, 4) / 2)

    def spike(u):
        hard = (u >= 1).double()
        soft = torch.sigmoid(4 * (u - 1))
        return hard.detach() + soft - soft.detach()

    def fn(carry, x):
        u, s, trace = carry
        u = 0.8 * u * (1 - s) + x + s @ w
        s = spike(u)
        trace = torch.addcmul(trace * 0.95, s, torch.ones_like(s))
        return (u, s, trace), (s, trace.sum(-1))

    return fn, lambda b: tuple(torch.zeros(b, 4) for _ in range(3)), sequences(4)


@stranger
def fake_quantised_gru():
    cell = nn.GRUCell(3, 5)

    def quantise(t):
        return torch.fake_quantize_per_tensor_affine(t, 0.05, 0, -128, 127)

    def fn(h, x):
        gates = F.linear(quantise(x), quantise(cell.weight_ih), cell.bias_ih)
        hidden = F.linear(quantise(h), quantise(cell.weight_hh), cell.bias_hh)
        r, z, n = gates.chunk(3, 1)
        hr, hz, hn = hidden.chunk(3, 1)
        z = torch.sigmoid(z + hz)
        h = (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + z * h
        return quantise(h), h

    return fn, lambda b: torch.zeros(b, 5), sequences(3)


@stranger
def binary_weights():
    w = nn.Parameter(torch.randn(4, 4))

    def binarise(t):
        return (t.sign() - t).detach() + t.clamp(-1, 1)

    def fn(h, x):
        h = F.hardtanh(x + F.linear(h, binarise(w) * w.abs().mean()))
        return h, binarise(h)

    return fn, lambda b: torch.zeros(b, 4), sequences(4)


@stranger
def integers_and_bits():
    """A linear feedback register and CRC per row."""

    def fn(state, x):
        register, crc = state
        bit = (register ^ (register >> 2) ^ (register >> 3) ^ (register >> 5)) & 1
        register = (register >> 1) | (bit << 15)
        crc = torch.bitwise_xor(crc, (x[:, 0] * 100).to(torch.int64) & 0xFF)
        for _ in range(4):
            crc = torch.where((crc & 1).bool(), (crc >> 1) ^ 0xB8, crc >> 1)
        return (register, crc), (bit.bool(), crc % 7, torch.div(crc, 3, rounding_mode="floor"))

    return fn, lambda b: (torch.full((b,), 0xACE1), torch.zeros(b, dtype=torch.int64)), sequences(1)
