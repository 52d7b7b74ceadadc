"""Spectra, state spaces, complex numbers, signal processing."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import stranger


def sequences(features):
    return lambda steps, batch: torch.randn(steps, batch, features)


@stranger
def s4d():
    """A diagonal complex state space (Gu 2022)."""
    log_dt, log_real = nn.Parameter(torch.rand(3) - 3), nn.Parameter(torch.zeros(3, 4))
    imaginary, c = nn.Parameter(math.pi * torch.arange(4).expand(3, 4).clone().double()), nn.Parameter(torch.randn(3, 4, 2))

    def fn(h, u):
        dt = log_dt.exp()
        a = -torch.exp(log_real) + 1j * imaginary
        da = torch.exp(a * dt.unsqueeze(-1))
        db = (da - 1.0) / a
        h = da * h + db * u.unsqueeze(-1)
        y = 2 * torch.einsum("bhn,hn->bh", h, torch.view_as_complex(c)).real
        return h, y + u

    return fn, lambda b: torch.zeros(b, 3, 4, dtype=torch.complex128), sequences(3)


@stranger
def selective_state_space():
    """Mamba's recurrence, with its convolution over the last inputs."""
    inner, state = 4, 3
    project, bc, dt = nn.Linear(4, 2 * inner), nn.Linear(inner, 2 * state + 1), nn.Linear(1, inner)
    a_log, d = nn.Parameter(torch.log(torch.arange(1.0, state + 1).repeat(inner, 1))), nn.Parameter(torch.ones(inner))
    conv, out = nn.Parameter(torch.randn(inner, 3) / 2), nn.Linear(inner, 4)

    def fn(carry, x):
        h, window = carry
        x, z = project(x).chunk(2, dim=-1)
        window = torch.roll(window, -1, dims=-1)
        window[:, :, -1] = x
        x = F.silu((window * conv).sum(dim=-1))
        delta, b, c = torch.split(bc(x), [1, state, state], dim=-1)
        delta = F.softplus(dt(delta))
        da = torch.exp(torch.einsum("bd,dn->bdn", delta, -torch.exp(a_log)))
        h = h * da + (delta * x).unsqueeze(-1) * b.unsqueeze(1)
        y = torch.einsum("bdn,bn->bd", h, c) + d * x
        return (h, window), out(y * F.silu(z))

    return fn, lambda b: (torch.zeros(b, inner, state), torch.zeros(b, inner, 3)), sequences(4)


@stranger
def linear_recurrent_unit():
    """LRU (Orvieto 2023), complex parameters in polar form."""
    nu, theta = nn.Parameter(torch.rand(5)), nn.Parameter(torch.rand(5) * 3)
    b_re, b_im, c = (nn.Parameter(torch.randn(5, 2)) for _ in range(3))

    def fn(h, u):
        lam = torch.polar(torch.exp(-torch.exp(nu)), theta)
        gamma = torch.sqrt(1 - lam.abs() ** 2)
        h = lam * h + gamma * (u.to(h.dtype) @ torch.complex(b_re, b_im).T)
        return h, (h @ c.to(h.dtype)).real, h.abs()

    def pair(h, u):
        h, y, magnitude = fn(h, u)
        return h, (y, magnitude)

    return pair, lambda b: torch.zeros(b, 5, dtype=torch.complex128), sequences(2)


@stranger
def unitary_rnn():
    """uRNN: diagonal phases, FFT and reflection (Arjovsky 2016), modReLU."""
    phases, reflect, bias = nn.Parameter(torch.rand(6)), nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.zeros(6))
    inputs = nn.Linear(2, 12)

    def fn(h, x):
        h = torch.polar(torch.ones_like(phases), phases) * h
        h = torch.fft.fft(h, norm="ortho")
        v = torch.view_as_complex(reflect)
        h = h - 2 * torch.outer((h * v.conj()).sum(-1), v) / (v.abs() ** 2).sum()
        h = torch.fft.ifft(h, norm="ortho")
        z = h + torch.view_as_complex(inputs(x).view(-1, 6, 2))
        magnitude = torch.sqrt(z.real**2 + z.imag**2 + 1e-9)
        h = F.relu(magnitude + bias) / magnitude * z
        return h, torch.cat([h.real, h.imag], dim=-1)

    return fn, lambda b: torch.full((b, 6), 0.4 + 0.1j, dtype=torch.complex128), sequences(2)


@stranger
def spectral_gating():
    gate = nn.Parameter(torch.randn(5))

    def fn(h, x):
        spectrum = torch.fft.rfft(h + x, dim=-1)
        h = torch.fft.irfft(spectrum * torch.sigmoid(gate), n=8, dim=-1)
        return torch.tanh(h), torch.abs(spectrum).log1p()

    return fn, lambda b: torch.zeros(b, 8), sequences(8)


@stranger
def short_time_fourier():
    """A sliding buffer under a window, its spectrum at each step."""
    window = torch.hann_window(8)

    def fn(buffer, x):
        buffer = torch.cat((buffer[:, 2:], x), dim=1)
        spectrum = torch.fft.rfft(buffer * window)
        return buffer, {"power": spectrum.abs().pow(2), "phase": torch.angle(spectrum + 1e-3)}

    return fn, lambda b: torch.zeros(b, 8), sequences(2)


@stranger
def cascade_of_biquads():
    coefficients = nn.Parameter(torch.randn(3, 5) * 0.2)

    def fn(state, x):
        y = x[:, 0]
        new = []
        for i in range(3):
            b0, b1, b2, a1, a2 = coefficients[i].unbind()
            z1, z2 = state[i]
            out = b0 * y + z1
            new.append((b1 * y - a1 * out + z2, b2 * y - a2 * out))
            y = out
        return new, y

    return fn, lambda b: [(torch.zeros(b), torch.zeros(b)) for _ in range(3)], sequences(1)


@stranger
def legendre_memory():
    n = 6
    q = torch.arange(n, dtype=torch.float64)
    r = (2 * q + 1)[:, None] / 10.0
    j, i = torch.meshgrid(q, q, indexing="xy")
    a = torch.matrix_exp(torch.where(i < j, torch.tensor(-1.0), (-1.0) ** (i - j + 1)) * r)
    b = ((-1.0) ** q)[:, None] * r * 0.1
    encode, cell = nn.Linear(2 + 4 + n, 1), nn.Linear(2 + 4 + n, 4)

    def fn(carry, x):
        h, m = carry
        u = encode(torch.cat([x, h, m], 1))
        m = m @ a.to(m).T + u @ b.to(m).T
        h = torch.tanh(cell(torch.cat([x, h, m], 1)))
        return (h, m), h

    return fn, lambda b: (torch.zeros(b, 4), torch.zeros(b, n)), sequences(2)


@stranger
def hilbert_phase_and_wrapping():
    def fn(carry, x):
        z, turns = carry
        z = z * torch.exp(1j * x[:, 0]) + 0.1 * torch.complex(x[:, 0], x[:, 1])
        phase = torch.atan2(z.imag, z.real)
        wrapped = torch.remainder(phase + math.pi, 2 * math.pi) - math.pi
        return (z / z.abs().clamp(min=1e-3), turns + (wrapped.abs() > 3).to(turns.dtype)), (wrapped, turns)

    return fn, lambda b: (torch.ones(b, dtype=torch.complex128), torch.zeros(b, dtype=torch.int16)), sequences(2)
