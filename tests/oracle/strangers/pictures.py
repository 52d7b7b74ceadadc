"""Convolutions, grids and dynamical systems."""

import torch
import torch.nn.functional as F
from torch import nn

from . import stranger


def frames(channels, size=4):
    return lambda steps, batch: torch.randn(steps, batch, channels, size, size)


@stranger
def conv_lstm():
    gates = nn.Conv2d(2 + 3, 12, 3, padding=1)

    def fn(carry, x):
        h, c = carry
        i, f, o, g = torch.split(gates(torch.cat([x, h], dim=1)), 3, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h, c), h.mean(dim=(2, 3))

    return fn, lambda b: (torch.zeros(b, 3, 4, 4), torch.zeros(b, 3, 4, 4)), frames(2)


@stranger
def conv_gru_with_pooling():
    reset_update, new = nn.Conv2d(5, 6, 3, padding="same"), nn.Conv2d(5, 3, 3, padding="same")
    down = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 2, 1), nn.Flatten(1))

    def fn(h, x):
        r, z = reset_update(torch.cat([x, h], 1)).sigmoid().chunk(2, 1)
        h = (1 - z) * h + z * torch.tanh(new(torch.cat([x, r * h], 1)))
        return h, (down(h), F.adaptive_avg_pool2d(h, 1).squeeze(-1).squeeze(-1), F.max_pool2d(h, 2).amax((2, 3)))

    return fn, lambda b: torch.zeros(b, 3, 4, 4), frames(2)


@stranger
def cellular_automaton():
    """A neural cellular automaton: fixed filters of perception, a small network, alive cells only."""
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    identity = torch.zeros(3, 3)
    identity[1, 1] = 1
    filters = torch.stack([identity, sobel, sobel.T]).unsqueeze(1).repeat(3, 1, 1, 1)
    update = nn.Sequential(nn.Conv2d(9, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1, bias=False))

    def alive(x):
        return F.max_pool2d(x[:, -1:], 3, stride=1, padding=1) > 0.1

    def fn(grid, x):
        grid = grid + 0.1 * x
        before = alive(grid)
        seen = F.conv2d(F.pad(grid, (1, 1, 1, 1), mode="circular"), filters, groups=3)
        grid = grid + update(seen)
        return grid * (before & alive(grid)), before.float().mean((1, 2, 3))

    return fn, lambda b: torch.ones(b, 3, 4, 4) * 0.2, frames(3)


@stranger
def game_of_life():
    kernel = torch.ones(1, 1, 3, 3)
    kernel[..., 1, 1] = 0

    def fn(board, x):
        board = board ^ (x > 1.5)
        n = F.conv2d(F.pad(board.to(x.dtype), (1, 1, 1, 1), "circular"), kernel)
        return (n == 3) | (board & (n == 2)), board.sum((1, 2, 3))

    return fn, lambda b: torch.zeros(b, 1, 4, 4, dtype=torch.bool), frames(1)


@stranger
def heat_and_waves():
    """Finite differences by rolls and slices."""
    speed = nn.Parameter(torch.tensor(0.3))

    def fn(u, force):
        now, before = u[:, 0], u[:, 1]
        lap = -4 * now
        for shift, dim in ((1, 1), (-1, 1), (1, 2), (-1, 2)):
            lap = lap + torch.roll(now, shift, dim)
        new = 2 * now - before + speed**2 * lap + 0.01 * force.squeeze(1)
        new[:, 0, :] = 0
        new[:, -1, :] = new[:, -2, :]
        return torch.stack([new, now], 1), (new**2).sum((-1, -2))

    return fn, lambda b: torch.rand(b, 2, 4, 4), frames(1)


@stranger
def group_norm_and_residuals():
    conv, norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.GroupNorm(2, 4)
    batch_norm = nn.BatchNorm2d(4).eval()

    def fn(h, x):
        h = F.relu(batch_norm(norm(conv(h + x))), inplace=True) + 0.5 * h
        return h / (1 + h.flatten(1).norm(dim=1)[:, None, None, None]), F.interpolate(h, scale_factor=2, mode="nearest").mean((2, 3))

    return fn, lambda b: torch.zeros(b, 4, 4, 4), frames(4)


@stranger
def separable_convolution_in_time():
    weight = nn.Parameter(torch.randn(4, 1, 3))

    def fn(buffer, x):
        buffer = torch.cat([buffer, x.unsqueeze(-1)], dim=-1)[..., 1:]
        return buffer, F.conv1d(buffer, weight, groups=4).squeeze(-1) + F.unfold(buffer[:, :, None], (1, 3)).mean(1)

    return fn, lambda b: torch.zeros(b, 4, 3), lambda t, b: torch.randn(t, b, 4)


@stranger
def attention_over_pictures():
    """DRAW's Gaussian filters."""
    head, back = nn.Linear(5, 4), nn.GRUCell(4, 5)

    def filters(centre, log_scale, size, n):
        mu = centre[:, None] + (torch.arange(n, device=centre.device) - n / 2 + 0.5) * 1.2
        a = torch.arange(size, dtype=centre.dtype)
        f = torch.exp(-((a - mu[..., None]) ** 2) / (2 * log_scale.exp()[:, None, None]))
        return f / (f.sum(-1, keepdim=True) + 1e-8)

    def fn(h, x):
        y, z, scale, gamma = head(h).unbind(1)
        fy, fx = filters(2 + y, scale, 4, 2), filters(2 + z, scale, 4, 2)
        glimpse = gamma.exp()[:, None, None] * (fy @ x[:, 0] @ fx.mT)
        h = back(glimpse.reshape(x.shape[0], -1), h)
        return h, fy.mT @ glimpse @ fx

    return fn, lambda b: torch.zeros(b, 5), frames(1)


@stranger
def runge_kutta_gru():
    """GRU-ODE with four stages between observations that may be missing."""
    f, jump = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 5)), nn.GRUCell(3, 5)

    def fn(carry, inputs):
        h, clock = carry
        x, seen, dt = inputs
        step = dt.unsqueeze(-1) / 2
        for _ in range(2):
            k1 = f(h)
            k2 = f(h + step / 2 * k1)
            k3 = f(h + step / 2 * k2)
            k4 = f(h + step * k3)
            h = h + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        h = torch.where(seen.unsqueeze(-1), jump(torch.nan_to_num(x), h), h)
        return (h, clock + dt), (h, clock)

    def xs(steps, batch):
        x = torch.randn(steps, batch, 3)
        seen = torch.rand(steps, batch) > 0.3
        return (torch.where(seen[..., None], x, float("nan")), seen, torch.rand(steps, batch))

    return fn, lambda b: (torch.zeros(b, 5), torch.zeros(b)), xs


@stranger
def lorenz():
    sigma, rho, beta = nn.Parameter(torch.tensor([10.0, 28.0, 8 / 3])).unbind()

    def derivative(s):
        x, y, z = s.T
        return torch.stack((sigma * (y - x), x * (rho - z) - y, x * y - beta * z), 1)

    def fn(s, kick):
        half = s + 0.005 * derivative(s)
        s = s + 0.01 * derivative(half) + 0.01 * kick
        return s, s.norm(p=2, dim=1)

    return fn, lambda b: torch.rand(b, 3), lambda t, b: torch.randn(t, b, 3)


@stranger
def symplectic_pendulum():
    """Leapfrog with the gradient of a learned potential, taken by autograd inside the step."""
    potential = nn.Sequential(nn.Linear(2, 6), nn.Softplus(), nn.Linear(6, 1))

    def force(q):
        return -torch.func.grad(lambda z: potential(z).sum())(q)

    def fn(state, kick):
        q, p = state["q"], state["p"]
        p = p + 0.05 * force(q) + kick
        q = q + 0.1 * p
        p = p + 0.05 * force(q)
        return dict(q=q, p=p), potential(q)[..., 0] + p.square().sum(-1) / 2

    return fn, lambda b: {"q": torch.zeros(b, 2), "p": torch.zeros(b, 2)}, lambda t, b: torch.randn(t, b, 2)
