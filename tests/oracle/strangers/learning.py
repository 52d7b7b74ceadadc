"""Steps that learn while they run: test-time training, fast weights, meta-learned optimisers, plasticity."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, grad_and_value, jvp, vjp, vmap

from . import stranger


def sequences(features):
    return lambda steps, batch: torch.randn(steps, batch, features)


@stranger
def test_time_training():
    """TTT-Linear (Sun 2024): the state is a linear model, trained on every token."""
    key, value, query = (nn.Linear(4, 4, bias=False) for _ in range(3))
    rate = nn.Parameter(torch.tensor(0.1))

    def loss(w, k, v):
        return ((k @ w - v) ** 2).sum()

    def fn(w, x):
        g = vmap(grad(loss))(w, key(x), value(x))
        w = w - rate * g
        return w, torch.einsum("bi,bij->bj", query(x), w)

    return fn, lambda b: torch.zeros(b, 4, 4), sequences(4)


@stranger
def test_time_training_of_a_network():
    query = nn.Linear(3, 3)

    def model(params, x):
        return torch.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]

    def loss(params, x):
        return (model(params, x) - x.flip(0)).pow(2).mean()

    def fn(params, x):
        g, value = vmap(grad_and_value(loss))(params, x)
        params = {name: p - 0.3 * g[name] for name, p in params.items()}
        return params, (vmap(model)(params, query(x)), value)

    def init(b):
        generator = torch.Generator().manual_seed(1)
        made = {"w1": torch.randn(3, 5, generator=generator), "b1": torch.zeros(5),
                "w2": torch.randn(5, 3, generator=generator)}  # fmt: skip
        return {name: p.expand(b, *p.shape).clone() for name, p in made.items()}

    return fn, init, sequences(3)


@stranger(rows=False)
def inner_loop_over_the_whole_batch():
    """MAML's inner step: one model for all rows, trained by functional_call."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    names = [name for name, _ in net.named_parameters()]

    def fn(carry, x):
        params = dict(zip(names, carry))

        def loss(params):
            return functional_call(net, params, (x[:, :3],)).sub(x[:, 3:]).square().mean()

        g = grad(loss)(params)
        return tuple(params[n] - 0.1 * g[n] for n in names), functional_call(net, params, (x[:, :3],))

    return fn, lambda b: tuple(p.detach().clone() for p in net.parameters()), sequences(4)


@stranger
def delta_rule():
    """DeltaNet (Schlag 2021)."""
    qkv, beta = nn.Linear(4, 12), nn.Linear(4, 1)

    def fn(s, x):
        q, k, v = qkv(x).chunk(3, dim=-1)
        k = F.normalize(k, dim=-1)
        b = beta(x).sigmoid()
        s = s + torch.einsum("bi,bj->bij", b * (v - torch.einsum("bij,bj->bi", s, k)), k)
        return s, (s @ q.unsqueeze(-1)).squeeze(-1)

    return fn, lambda b: torch.zeros(b, 4, 4), sequences(4)


@stranger
def gated_linear_attention():
    project, gate = nn.Linear(6, 18), nn.Linear(6, 6)

    def fn(s, x):
        q, k, v = project(x).view(x.size(0), 3, 2, 3).unbind(1)
        g = F.logsigmoid(gate(x)).view(-1, 2, 3) / 4
        s = s * g.exp()[..., None] + k[..., None] * v[..., None, :]
        return s, torch.einsum("bhk,bhkv->bhv", q, s).reshape(x.size(0), -1)

    return fn, lambda b: torch.zeros(b, 2, 3, 3), sequences(6)


@stranger
def rwkv_time_mixing():
    decay, bonus = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    receptance, key, value = (nn.Linear(4, 4) for _ in range(3))

    def fn(state, x):
        last, num, den, top = state
        mixed = 0.6 * x + 0.4 * last
        r, k, v = torch.sigmoid(receptance(mixed)), key(mixed), value(mixed)
        q = torch.maximum(top, bonus + k)
        e1, e2 = torch.exp(top - q), torch.exp(bonus + k - q)
        out = r * (e1 * num + e2 * v) / (e1 * den + e2)
        w = top - torch.exp(decay)
        q = torch.maximum(w, k)
        e1, e2 = torch.exp(w - q), torch.exp(k - q)
        return (x, e1 * num + e2 * v, e1 * den + e2, q), out

    def init(b):
        return (torch.zeros(b, 4), torch.zeros(b, 4), torch.zeros(b, 4), torch.full((b, 4), -1e9))

    return fn, init, sequences(4)


@stranger
def hebbian_plasticity():
    """Differentiable plasticity (Miconi 2018), with Oja's rule."""
    w, alpha, eta = nn.Parameter(torch.randn(4, 4) / 2), nn.Parameter(torch.randn(4, 4) / 9), nn.Parameter(torch.ones(1) / 9)

    def fn(carry, x):
        y, trace = carry
        now = torch.tanh(x + torch.bmm(y.unsqueeze(1), w + alpha * trace).squeeze(1))
        trace = trace + eta * (torch.bmm(y.unsqueeze(2), now.unsqueeze(1)) - now.unsqueeze(1).square() * trace)
        return (now, trace.clamp(-1, 1)), now

    return fn, lambda b: (torch.zeros(b, 4), torch.zeros(b, 4, 4)), sequences(4)


@stranger
def learned_optimiser():
    """An LSTM that gives the updates (Andrychowicz 2016); its inputs are logs and signs of gradients."""
    cell, out = nn.LSTMCell(2, 5), nn.Linear(5, 1)

    def fn(carry, target):
        theta, h, c = carry
        g = 2 * (theta - target)
        log = torch.clamp(torch.log(g.detach().abs() + 1e-8) / 10, min=-1)
        sign = torch.clamp(g.detach() * torch.e**10, -1, 1)
        h, c = cell(torch.stack([log, sign], -1).view(-1, 2), (h.view(-1, 5), c.view(-1, 5)))
        theta = theta + 0.1 * out(h).view_as(theta)
        return (theta, h.view(*theta.shape, 5), c.view(*theta.shape, 5)), (theta - target).pow(2).sum(-1)

    return fn, lambda b: (torch.zeros(b, 3), torch.zeros(b, 3, 5), torch.zeros(b, 3, 5)), sequences(3)


@stranger
def adam_as_a_scan():
    def fn(state, g):
        m, v, t = state
        t = t + 1
        m = torch.lerp(m, g, 0.1)
        v = v.mul(0.999).addcmul(g, g, value=0.001)
        step = (m / (1 - 0.9 ** t.to(g.dtype))[:, None]) / ((v / (1 - 0.999 ** t.to(g.dtype))[:, None]).sqrt() + 1e-8)
        return (m, v, t), -0.01 * step

    return fn, lambda b: (torch.zeros(b, 3), torch.zeros(b, 3), torch.zeros(b, dtype=torch.int64)), sequences(3)


@stranger
def eligibility_traces():
    """e-prop: forward-mode traces by hand, a vjp for the readout."""
    w = nn.Parameter(torch.randn(3, 3) / 2)

    def fn(carry, x):
        h, trace = carry
        pre = h @ w + x
        now, back = vjp(torch.tanh, pre)
        (slope,) = back(torch.ones_like(pre))
        trace = slope[:, None, :] * (h[:, :, None] + 0.9 * trace)
        return (now, trace), trace.mean(1)

    return fn, lambda b: (torch.zeros(b, 3), torch.zeros(b, 3, 3)), sequences(3)


@stranger
def directional_derivatives():
    net = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3))

    def fn(h, x):
        value, change = jvp(lambda z: net(z), (h,), (x,))
        return torch.tanh(value), change

    return fn, lambda b: torch.zeros(b, 3), sequences(3)


@stranger
def hypernetwork():
    """HyperLSTM's idea: a small cell makes the weights of the main one."""
    small, scale = nn.GRUCell(3, 4), nn.Linear(4, 5 * 5 + 5)
    inputs = nn.Linear(3, 5)

    def fn(carry, x):
        h, z = carry
        z = small(x, z)
        made = scale(z)
        w, b = made[:, :25].reshape(-1, 5, 5), made[:, 25:]
        h = torch.tanh(torch.matmul(w, h.unsqueeze(2)).squeeze(2) + b + inputs(x))
        return (h, z), h

    return fn, lambda b: (torch.zeros(b, 5), torch.zeros(b, 4)), sequences(3)
