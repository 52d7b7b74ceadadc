"""State estimation: Kalman filters and their relatives, hidden Markov models, particle filters."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from . import stranger


def observations(features):
    return lambda steps, batch: torch.randn(steps, batch, features)


def gaussian(size):
    return lambda b: (torch.zeros(b, size), torch.eye(size).expand(b, size, size).clone())


@stranger
def kalman():
    a, c = nn.Parameter(torch.eye(4) * 0.9 + 0.05), nn.Parameter(torch.randn(2, 4))
    q, r = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2))

    def fn(belief, y):
        mean, cov = belief
        mean, cov = mean @ a.T, a @ cov @ a.T + torch.diag(q.exp())
        innovation = y - mean @ c.T
        s = c @ cov @ c.T + torch.diag(r.exp())
        gain = torch.linalg.solve(s, c @ cov).transpose(-1, -2)
        mean = mean + torch.einsum("bij,bj->bi", gain, innovation)
        cov = cov - gain @ c @ cov
        log_likelihood = -0.5 * (innovation * torch.linalg.solve(s, innovation)).sum(-1) - 0.5 * torch.logdet(s)
        return (mean, 0.5 * (cov + cov.mT)), (mean, log_likelihood)

    return fn, gaussian(4), observations(2)


@stranger
def square_root_kalman():
    a, c = nn.Parameter(torch.eye(3) * 0.8), nn.Parameter(torch.randn(1, 3))

    def fn(belief, y):
        mean, cov = belief
        mean, cov = mean @ a.T, a @ cov @ a.mT + 0.1 * torch.eye(3)
        s = (c @ cov @ c.mT + 0.2).squeeze(-1).squeeze(-1)
        gain = (cov @ c.mT).squeeze(-1) / s.unsqueeze(-1)
        mean = torch.addcmul(mean, gain, y - mean @ c.T)
        cov = cov - torch.einsum("bi,bj->bij", gain, gain) * s[:, None, None]
        lower = torch.linalg.cholesky(cov + 1e-3 * torch.eye(3))
        return (mean, lower @ lower.mT), (mean, lower.diagonal(dim1=-2, dim2=-1).log().sum(-1))

    return fn, gaussian(3), observations(1)


def motion(state, weight):
    return state + 0.1 * torch.stack([torch.cos(state[2]), torch.sin(state[2]), weight @ state])


@stranger
def extended_kalman_with_jacfwd():
    weight = nn.Parameter(torch.randn(3) * 0.1)

    def fn(belief, y):
        mean, cov = belief
        f = vmap(jacfwd(lambda s: motion(s, weight)))(mean)
        mean = vmap(lambda s: motion(s, weight))(mean)
        cov = f @ cov @ f.mT + 0.1 * torch.eye(3)
        s = cov[:, :2, :2] + 0.1 * torch.eye(2)
        gain = cov[:, :, :2] @ torch.linalg.inv(s)
        mean = mean + (gain @ (y - mean[:, :2]).unsqueeze(-1)).squeeze(-1)
        return (mean, cov - gain @ cov[:, :2]), mean

    return fn, gaussian(3), observations(2)


@stranger
def extended_kalman_with_jacrev():
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))

    def fn(belief, y):
        mean, cov = belief
        jacobian = vmap(jacrev(lambda s: s + 0.1 * net(s)))(mean)
        mean, cov = mean + 0.1 * net(mean), jacobian @ cov @ jacobian.mT + 0.1 * torch.eye(3, dtype=cov.dtype)
        gain = cov / (cov.diagonal(dim1=1, dim2=2).unsqueeze(1) + 0.5)
        return (mean + torch.bmm(gain, (y - mean)[..., None])[..., 0], (torch.eye(3) - gain) @ cov), mean

    return fn, gaussian(3), observations(3)


@stranger(rows=False)
def jacobian_without_vmap():
    """A step of one system without a batch: torch.func on plain vectors."""
    weight = nn.Parameter(torch.randn(3) * 0.1)

    def fn(belief, y):
        mean, cov = belief
        f = jacfwd(motion)(mean, weight)
        mean, cov = motion(mean, weight), f @ cov @ f.T + 0.1 * torch.eye(3)
        return (mean + 0.1 * F.pad(y[0] - mean[:2], (0, 1)), cov), mean

    return fn, lambda b: (torch.zeros(3), torch.eye(3)), observations(2)


@stranger
def unscented_kalman():
    net = nn.Sequential(nn.Linear(2, 4), nn.Softplus(), nn.Linear(4, 2))
    n, kappa = 2, 1.0
    weights = torch.full((2 * n + 1,), 0.5 / (n + kappa))
    weights[0] = kappa / (n + kappa)

    def fn(belief, y):
        mean, cov = belief
        root = torch.linalg.cholesky((n + kappa) * cov + 1e-4 * torch.eye(n))
        points = torch.cat([mean[:, None], mean[:, None] + root.mT, mean[:, None] - root.mT], dim=1)
        moved = points + 0.1 * net(points)
        mean = torch.einsum("p,bpi->bi", weights, moved)
        spread = moved - mean[:, None]
        cov = torch.einsum("p,bpi,bpj->bij", weights, spread, spread) + 0.1 * torch.eye(n)
        gain = cov @ torch.linalg.inv(cov + 0.5 * torch.eye(n))
        return (mean + (gain @ (y - mean)[:, :, None])[:, :, 0], cov - gain @ cov), (mean, cov)

    return fn, gaussian(2), observations(2)


@stranger
def hmm_forward():
    transitions, emissions = nn.Parameter(torch.randn(5, 5)), nn.Linear(3, 5)

    def fn(alpha, x):
        log_a = transitions.log_softmax(-1)
        alpha = torch.logsumexp(alpha.unsqueeze(-1) + log_a, dim=-2) + emissions(x).log_softmax(-1)
        return alpha, alpha.logsumexp(-1)

    return fn, lambda b: torch.full((b, 5), -math.log(5)), observations(3)


@stranger
def hmm_scaled():
    transitions, emissions = nn.Parameter(torch.randn(4, 4)), nn.Linear(2, 4)

    def fn(carry, x):
        alpha, total = carry
        alpha = (alpha @ transitions.softmax(-1)) * emissions(x).exp()
        scale = alpha.sum(-1, keepdim=True)
        alpha = alpha / scale
        return (alpha, total + scale.log().squeeze(-1)), alpha.max(-1)[1]

    return fn, lambda b: (torch.full((b, 4), 0.25), torch.zeros(b)), observations(2)


@stranger
def viterbi():
    transitions, emissions = nn.Parameter(torch.randn(4, 4)), nn.Linear(2, 4)

    def fn(scores, x):
        best, back = (scores[:, :, None] + transitions[None]).max(dim=1)
        scores = best + emissions(x)
        return scores, back

    return fn, lambda b: torch.zeros(b, 4), observations(2)


@stranger
def linear_chain_crf():
    transitions, start = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def fn(carry, inputs):
        alpha, gold, previous, first = carry
        scores, tags = inputs["scores"], inputs["tags"]
        emitted = scores.gather(-1, tags.unsqueeze(-1)).squeeze(-1)
        moved = torch.where(first, start[tags], transitions[previous, tags])
        gold = gold + moved + emitted
        following = torch.logsumexp(alpha[:, :, None] + transitions, 1) + scores
        alpha = torch.where(first[:, None], start + scores, following)
        return (alpha, gold, tags, torch.zeros_like(first)), alpha.logsumexp(-1) - gold

    def init(b):
        return (torch.zeros(b, 4), torch.zeros(b), torch.zeros(b, dtype=torch.long), torch.ones(b, dtype=torch.bool))

    def xs(steps, batch):
        return {"scores": torch.randn(steps, batch, 4), "tags": torch.randint(0, 4, (steps, batch))}

    return fn, init, xs


@stranger
def ctc_alphas():
    """The forward variables of CTC over an extended label sequence."""
    labels = torch.tensor([0, 2, 0, 3, 0, 3, 0])
    skip = torch.zeros(7, dtype=torch.bool)
    skip[2:] = (labels[2:] != 0) & (labels[2:] != labels[:-2])

    def fn(alpha, x):
        emit = x.log_softmax(-1)[:, labels]
        one = F.pad(alpha, (1, 0), value=-1e4)[:, :-1]
        two = F.pad(alpha, (2, 0), value=-1e4)[:, :-2].masked_fill(~skip, -1e4)
        alpha = torch.logaddexp(torch.logaddexp(alpha, one), two) + emit
        return alpha, torch.logaddexp(alpha[:, -1], alpha[:, -2])

    def init(b):
        alpha = torch.full((b, 7), -1e4)
        alpha[:, 0] = 0.0
        return alpha

    return fn, init, observations(5)


@stranger(random=True)
def particle_filter():
    drift = nn.Parameter(torch.tensor(0.9))

    def fn(carry, y):
        particles, log_weights = carry
        particles = drift * particles + 0.3 * torch.randn_like(particles)
        log_weights = log_weights - 0.5 * (y - particles) ** 2
        log_weights = log_weights - log_weights.logsumexp(-1, keepdim=True)
        effective = 1 / (2 * log_weights).exp().sum(-1, keepdim=True).clamp_min(1e-9).sqrt()
        order = torch.cumsum(log_weights.exp(), -1)
        places = (torch.arange(8) + 0.5).to(order) / 8
        picked = torch.searchsorted(order.detach(), places.expand_as(order).contiguous()).clamp(max=7)
        resampled = particles.gather(-1, picked)
        keep = effective > 2
        particles = torch.where(keep, particles, resampled)
        log_weights = torch.where(keep, log_weights, torch.full_like(log_weights, -math.log(8)))
        return (particles, log_weights), (log_weights.exp() * particles).sum(-1)

    return fn, lambda b: (torch.zeros(b, 8), torch.full((b, 8), -math.log(8))), observations(1)


@stranger
def natural_gradient_filter():
    """Newton steps on a log-likelihood, with hessians of every row."""

    def loss(z, y):
        return torch.log1p(torch.exp(-(y * z).sum())) + 0.5 * (z * z).sum()

    def fn(z, y):
        g, h = vmap(grad(loss))(z, y), vmap(hessian(loss))(z, y)
        z = z - 0.5 * torch.linalg.solve(h, g.unsqueeze(-1)).squeeze(-1)
        return z, vmap(loss)(z, y)

    return fn, lambda b: torch.zeros(b, 3), observations(3)


@stranger
def complementary_filter_of_quaternions():
    def product(q, r):
        w0, x0, y0, z0 = q.unbind(-1)
        w1, x1, y1, z1 = r.unbind(-1)
        return torch.stack(
            [
                w0 * w1 - x0 * x1 - y0 * y1 - z0 * z1,
                w0 * x1 + x0 * w1 + y0 * z1 - z0 * y1,
                w0 * y1 - x0 * z1 + y0 * w1 + z0 * x1,
                w0 * z1 + x0 * y1 - y0 * x1 + z0 * w1,
            ],
            dim=-1,
        )

    def fn(q, rate):
        angle = torch.linalg.vector_norm(rate, dim=-1, keepdim=True)
        axis = rate / (angle + 1e-6)
        turn = torch.cat([torch.cos(angle / 20), axis * torch.sin(angle / 20)], -1)
        q = F.normalize(product(q, turn), dim=-1)
        gravity = torch.linalg.cross(q[:, 1:], rate) + 2 * q[:, :1] * q[:, 1:]
        return q, gravity

    def init(b):
        q = torch.zeros(b, 4)
        q[:, 0] = 1
        return q

    return fn, init, observations(3)
