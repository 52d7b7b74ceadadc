"""Controllers, simulators, games and bookkeeping: many small states, flags and counters."""

from collections import OrderedDict, namedtuple

import torch
from torch import nn

from . import stranger


def sequences(features):
    return lambda steps, batch: torch.randn(steps, batch, features)


@stranger
def pid_with_anti_windup():
    gains = nn.Parameter(torch.tensor([1.0, 0.3, 0.05]))

    def fn(state, x):
        integral, last, first = state
        error = x[:, 0] - x[:, 1]
        derivative = torch.where(first, torch.zeros_like(error), error - last)
        u = gains[0] * error + gains[1] * integral + gains[2] * derivative
        limited = u.clip(-1, 1)
        integral = torch.where(u == limited, integral + error, integral)
        return (integral, error, torch.zeros_like(first)), limited

    return fn, lambda b: (torch.zeros(b), torch.zeros(b), torch.ones(b, dtype=torch.bool)), sequences(2)


@stranger
def cart_pole():
    def fn(s, action):
        x, v, theta, w = torch.unbind(s, dim=-1)
        force = torch.where(action > 0, 10.0, -10.0)
        cos, sin = theta.cos(), theta.sin()
        temp = (force + 0.05 * w.square() * sin) / 1.1
        acc = (9.8 * sin - cos * temp) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        s = torch.stack([x + 0.02 * v, v + 0.02 * (temp - 0.05 * acc * cos / 1.1), theta + 0.02 * w, w + 0.02 * acc], -1)
        done = (s[:, 0].abs() > 2.4) | (s[:, 2].abs() > 0.2095)
        s = torch.where(done[:, None], torch.zeros_like(s), s)
        return s, (done, torch.ones_like(x))

    return fn, lambda b: torch.zeros(b, 4) + 0.01, lambda t, b: torch.randn(t, b)


Queue = namedtuple("Queue", ["waiting", "served", "clock"])


@stranger
def queueing_with_namedtuples():
    def fn(q: Queue, arrivals):
        served = torch.minimum(q.waiting + arrivals, torch.full_like(arrivals, 2))
        q = q._replace(waiting=q.waiting + arrivals - served, served=q.served + served, clock=q.clock + 1)
        return q, Queue(q.waiting, served, (q.clock % 3 == 0).long())

    def init(b):
        return Queue(*(torch.zeros(b, dtype=torch.long) for _ in range(3)))

    return fn, init, lambda t, b: torch.randint(0, 5, (t, b))


@stranger
def finite_automaton():
    table = torch.tensor([[1, 0, 2], [1, 2, 0], [2, 2, 1]])

    def fn(state, symbol):
        following = table[state, symbol]
        accepted = torch.isin(following, torch.tensor([2]))
        return following, (accepted, following.eq(state))

    return fn, lambda b: torch.zeros(b, dtype=torch.int64), lambda t, b: torch.randint(0, 3, (t, b))


@stranger
def traffic_lights():
    """Elapsed times as uint8, wrap-around of small integers."""

    def fn(carry, x):
        timer, phase = carry
        timer = timer + 100
        switch = timer < 100
        phase = torch.where(switch, (phase + 1) % 4, phase).to(torch.int8)
        return (timer, phase), (phase.float() * x, switch)

    return fn, lambda b: (torch.zeros(b, dtype=torch.uint8), torch.zeros(b, dtype=torch.int8)), lambda t, b: torch.rand(t, b)


@stranger
def running_statistics():
    """Welford, exponentially weighted moments, counts of valid entries among nans."""

    def fn(s, x):
        valid = ~torch.isnan(x)
        filled = torch.where(valid, x, torch.zeros((), dtype=x.dtype))
        count = s["count"] + valid
        delta = torch.where(valid, filled - s["mean"], 0.0)
        mean = s["mean"] + delta / count.clamp(min=1)
        m2 = s["m2"] + delta * torch.where(valid, filled - mean, 0.0)
        std = (m2 / (count - 1).clamp(min=1)).clamp(min=1e-12).sqrt()
        new = OrderedDict(count=count, mean=mean, m2=m2)
        return new, {"z": (filled - mean) / (std + 1e-3), "nan": torch.isfinite(x).logical_not().sum(-1)}

    def init(b):
        return OrderedDict(count=torch.zeros(b, 2, dtype=torch.long), mean=torch.zeros(b, 2), m2=torch.zeros(b, 2))

    def xs(steps, batch):
        x = torch.randn(steps, batch, 2)
        return torch.where(torch.rand_like(x) < 0.2, float("nan"), x)

    return fn, init, xs


@stranger
def debounce_and_hysteresis():
    def fn(carry, x):
        on, held = carry
        rising, falling = (x > 0.5) & ~on, torch.logical_and(x < -0.5, on)
        on = torch.logical_xor(on, rising | falling)
        held = torch.where(rising | falling, torch.zeros_like(held), held + 1)
        return (on, held), (on.int() * 2 - 1, held.float().sqrt(), torch.sign(x) == torch.where(on, 1, -1))

    return fn, lambda b: (torch.zeros(b, dtype=torch.bool), torch.zeros(b, dtype=torch.int32)), lambda t, b: torch.randn(t, b)


@stranger
def phased_lstm_gates():
    cell = nn.LSTMCell(2, 4)
    period, shift = nn.Parameter(torch.rand(4) * 5 + 1), nn.Parameter(torch.rand(4))

    def fn(carry, inputs):
        (h, c), (x, time) = carry, inputs
        new_h, new_c = cell(x, (h, c))
        phi = torch.fmod(time[:, None] - shift, period) / period
        k = torch.where(phi < 0.025, 40 * phi, torch.where(phi < 0.05, 2 - 40 * phi, 0.001 * phi))
        return (torch.lerp(h, new_h, k), k * new_c + (1 - k) * c), h

    def xs(steps, batch):
        return torch.randn(steps, batch, 2), torch.rand(steps, batch).cumsum(0)

    return fn, lambda b: (torch.zeros(b, 4), torch.zeros(b, 4)), xs


@stranger
def clockwork():
    """Parts of the state that move every 1st, 2nd, 4th step."""
    w = nn.Linear(6 + 2, 6)
    periods = torch.tensor([1, 1, 2, 2, 4, 4])

    def fn(carry, x):
        h, t = carry
        new = torch.tanh(w(torch.cat([x, h], 1)))
        h = torch.where((t[:, None] % periods) == 0, new, h)
        return (h, t + 1), h

    return fn, lambda b: (torch.zeros(b, 6), torch.zeros(b, dtype=torch.long)), sequences(2)


@stranger
def adaptive_computation():
    """ACT with a fixed number of pondering steps and a halting sum."""
    cell, halt = nn.GRUCell(3, 4), nn.Linear(4, 1)

    def fn(h, x):
        total, mixed, ponder = torch.zeros_like(h[:, :1]), torch.zeros_like(h), torch.zeros_like(h[:, 0])
        s = h
        for n in range(4):
            s = cell(x + (n == 0), s)
            p = halt(s).sigmoid()
            p = torch.where((total + p > 0.99) | (n == 3), 1 - total, p) * (total < 0.99)
            mixed, total = mixed + p * s, total + p
            ponder = ponder + (total < 0.99).squeeze(1)
        return mixed, (ponder, total)

    return fn, lambda b: torch.zeros(b, 4), sequences(3)


@stranger
def constraints_by_projection():
    """A portfolio: weights projected on the simplex by sorting, costs of turning over."""

    def project(v):
        u = v.sort(dim=-1, descending=True)[0]
        css = u.cumsum(-1) - 1
        k = torch.arange(1, v.shape[-1] + 1, device=v.device, dtype=v.dtype)
        rho = (u - css / k > 0).sum(-1, keepdim=True)
        theta = css.gather(-1, rho - 1) / rho
        return torch.relu(v - theta)

    def fn(carry, returns):
        w, wealth = carry
        wealth = wealth * (1 + 0.01 * (w * returns).sum(-1))
        new = project(w + 0.1 * returns)
        return (new, wealth * (1 - 0.001 * (new - w).abs().sum(-1))), wealth.log()

    return fn, lambda b: (torch.full((b, 4), 0.25), torch.ones(b)), sequences(4)
