"""Reinforcement learning: policies, actors and critics, world models; with torch.distributions throughout."""

import torch
import torch.nn.functional as F
from torch import distributions as D
from torch import nn

from . import stranger


def sequences(features):
    return lambda steps, batch: torch.randn(steps, batch, features)


@stranger
def categorical_log_probs():
    body, head, value = nn.GRUCell(5, 8), nn.Linear(8, 4), nn.Linear(8, 1)

    def fn(h, x):
        h = body(x[..., :5], h)
        policy = D.Categorical(logits=head(h))
        action = policy.probs.argmax(-1)
        return h, (policy.log_prob(action), policy.entropy(), value(h).squeeze(-1))

    return fn, lambda b: torch.zeros(b, 8), sequences(5)


@stranger
def gaussian_policy_squashed():
    body, mean, spread = nn.Linear(9, 6), nn.Linear(6, 3), nn.Parameter(torch.zeros(3))

    def fn(h, x):
        h = torch.tanh(body(torch.cat([x, h], -1)))
        policy = D.Independent(D.Normal(mean(h), spread.exp().expand_as(mean(h))), 1)
        squashed = D.TransformedDistribution(policy, [D.transforms.TanhTransform(cache_size=1)])
        action = torch.tanh(policy.mean)
        return h, (action, squashed.log_prob(action * 0.9), policy.entropy())

    return fn, lambda b: torch.zeros(b, 6), sequences(3)


@stranger(random=True)
def sampled_actions():
    body, head = nn.GRUCell(4 + 3, 6), nn.Linear(6, 3)

    def fn(carry, x):
        h, last = carry
        h = body(torch.cat([x, F.one_hot(last, 3).to(x.dtype)], -1), h)
        policy = D.Categorical(logits=head(h))
        action = policy.sample()
        return (h, action), (action, policy.log_prob(action))

    return fn, lambda b: (torch.zeros(b, 6), torch.zeros(b, dtype=torch.long)), sequences(4)


@stranger(random=True)
def reparameterised_normal():
    body, heads = nn.Linear(4 + 5, 12), nn.Linear(12, 10)

    def fn(z, x):
        mean, log_scale = heads(F.elu(body(torch.cat([x, z], -1)))).chunk(2, -1)
        posterior = D.Normal(mean, F.softplus(log_scale) + 0.1)
        prior = D.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        z = posterior.rsample()
        return z, (posterior.log_prob(z).sum(-1), D.kl_divergence(posterior, prior).sum(-1))

    return fn, lambda b: torch.zeros(b, 5), sequences(4)


@stranger
def recurrent_state_space_model():
    """PlaNet's RSSM with means in place of samples."""
    cell, prior_net, post_net = nn.GRUCell(6 + 2, 8), nn.Linear(8, 12), nn.Linear(8 + 4, 12)

    def normal(parameters):
        mean, std = torch.chunk(parameters, 2, dim=-1)
        return D.Independent(D.Normal(mean, F.softplus(std) + 0.1), 1)

    def fn(state, inputs):
        frame, action = inputs["frame"], inputs["action"]
        h = cell(torch.cat([state["z"], action], -1), state["h"])
        prior, post = normal(prior_net(h)), normal(post_net(torch.cat([h, frame], -1)))
        kl = D.kl_divergence(post, prior)
        balanced = 0.8 * D.kl_divergence(D.Independent(D.Normal(post.mean.detach(), post.stddev.detach()), 1), prior)
        return {"h": h, "z": post.mean}, {"kl": torch.clamp(kl, min=1.0), "balanced": balanced, "prior": prior.mean}

    def xs(steps, batch):
        return {"frame": torch.randn(steps, batch, 4), "action": torch.randn(steps, batch, 2)}

    return fn, lambda b: {"h": torch.zeros(b, 8), "z": torch.zeros(b, 6)}, xs


@stranger(random=True)
def dreamer_discrete_latents():
    """Straight-through one-hot categoricals, with unimix."""
    cell, head = nn.GRUCell(3 * 4 + 2, 8), nn.Linear(8 + 4, 12)

    def fn(state, inputs):
        h, z = state
        h = cell(torch.cat([z.flatten(1), inputs[:, 4:]], -1), h)
        logits = head(torch.cat([h, inputs[:, :4]], -1)).view(-1, 3, 4)
        probs = 0.99 * logits.softmax(-1) + 0.01 / 4
        post = D.Independent(D.OneHotCategoricalStraightThrough(probs=probs), 1)
        z = post.rsample()
        return (h, z), (post.entropy(), post.log_prob(z.detach()))

    return fn, lambda b: (torch.zeros(b, 8), torch.zeros(b, 3, 4)), sequences(6)


@stranger
def every_log_prob():
    """One distribution after another, as in a toolbox."""

    def fn(h, x):
        a, b = F.softplus(h) + 0.5, F.softplus(x) + 0.5
        unit = torch.sigmoid(x).clamp(0.01, 0.99)
        total = D.Beta(a, b).log_prob(unit) + D.Gamma(a, b).log_prob(b) + D.Exponential(a).log_prob(b)
        total = total + D.Laplace(h, b).log_prob(x) + D.LogNormal(h, b).log_prob(b) + D.Cauchy(h, a).log_prob(x)
        total = total + D.StudentT(a + 2).log_prob(x) + D.Bernoulli(logits=h).log_prob((x > 0).to(x.dtype))
        total = total + D.Poisson(a).log_prob(b.floor()) + D.Geometric(unit).log_prob(b.floor())
        total = total + D.HalfNormal(a).log_prob(b) + D.Gumbel(h, a).log_prob(x) + D.Uniform(h - 9, h + 9).log_prob(x)
        total = total + D.Weibull(a, b).log_prob(b) + D.Kumaraswamy(a, b).log_prob(unit) + D.HalfCauchy(a).log_prob(b)
        total = total + D.ContinuousBernoulli(unit).log_prob(unit) + D.VonMises(h, a).log_prob(x)
        total = total + D.Dirichlet(a).log_prob(x.softmax(-1)).unsqueeze(-1)
        total = total + D.Binomial(5, logits=h).log_prob(b.floor().clamp(max=5)) + D.Pareto(a * 0.1, b).log_prob(b + 1)
        total = total + D.NegativeBinomial(a, unit).log_prob(b.floor()) + D.Chi2(a).log_prob(b)
        return torch.tanh(h + 0.01 * total), total

    return fn, lambda b: torch.zeros(b, 3), sequences(3)


@stranger
def mixture_of_gaussians():
    """A mixture density network (Graves 2013)."""
    body, head = nn.LSTMCell(2, 8), nn.Linear(8, 3 * (1 + 2 + 2))

    def fn(carry, x):
        h, c = body(x, carry)
        weights, means, scales = head(h).split([3, 6, 6], -1)
        parts = D.Independent(D.Normal(means.view(-1, 3, 2), scales.view(-1, 3, 2).exp()), 1)
        mixture = D.MixtureSameFamily(D.Categorical(logits=weights), parts)
        return (h, c), (mixture.log_prob(x), mixture.mean)

    return fn, lambda b: (torch.zeros(b, 8), torch.zeros(b, 8)), sequences(2)


@stranger
def multivariate_normal():
    head = nn.Linear(6, 3 + 6)
    rows, columns = torch.tril_indices(3, 3)

    def fn(h, x):
        out = head(torch.cat([h, x], -1))
        lower = out.new_zeros(*out.shape[:-1], 3, 3)
        lower[..., rows, columns] = out[..., 3:]
        lower = lower.tril(-1) + torch.diag_embed(F.softplus(torch.diagonal(lower, dim1=-2, dim2=-1)) + 0.1)
        density = D.MultivariateNormal(out[..., :3], scale_tril=lower)
        return torch.tanh(density.mean), (density.log_prob(x), density.entropy(), density.variance)

    return fn, lambda b: torch.zeros(b, 3), sequences(3)


@stranger
def generalised_advantages():
    """GAE, backwards in time over rewards, values and ends of episodes."""
    critic = nn.Linear(4, 1)

    def fn(carry, x):
        advantage, following = carry
        reward, done = x[:, 0], x[:, 1] > 0.5
        value = critic(x).squeeze(-1)
        delta = reward + 0.99 * following * (~done) - value
        advantage = delta + 0.99 * 0.95 * torch.where(done, torch.zeros_like(advantage), advantage)
        return (advantage, value), (advantage, advantage + value)

    return fn, lambda b: (torch.zeros(b), torch.zeros(b)), sequences(4)


@stranger
def v_trace():
    def fn(acc, x):
        rho = x[:, 0].exp().clamp(max=1.0)
        acc = rho * (x[:, 1] + 0.9 * x[:, 2] - x[:, 3]) + 0.9 * rho.clamp_max(0.7) * acc
        return acc, acc + x[:, 3]

    return fn, lambda b: torch.zeros(b), sequences(4)


@stranger(random=True)
def gumbel_softmax_policy():
    head = nn.Linear(7, 4)

    def fn(last, x):
        logits = head(torch.cat([x, last], -1))
        soft = F.gumbel_softmax(logits, tau=0.7)
        hard = F.gumbel_softmax(logits, tau=0.7, hard=True)
        return hard, (soft, D.RelaxedOneHotCategorical(torch.tensor(0.5), logits=logits).rsample())

    return fn, lambda b: torch.zeros(b, 4), sequences(3)


@stranger
def epsilon_greedy_values():
    online, target = nn.Linear(5, 3), nn.Linear(5, 3)
    for parameter in target.parameters():
        parameter.requires_grad_(False)

    def fn(carry, x):
        last_q, steps = carry
        q = online(torch.cat([x, last_q[:, None], steps[:, None].to(x.dtype) / 100], -1))
        with torch.no_grad():
            best = online(torch.cat([x, last_q[:, None], x[:, :1]], -1)).argmax(dim=1, keepdim=True)
            wanted = target(torch.cat([x, last_q[:, None], x[:, :1]], -1)).gather(1, best).squeeze(1)
        loss = F.smooth_l1_loss(q.max(1).values, wanted, reduction="none")
        return (q.max(1)[0], steps + 1), (loss, best[:, 0])

    return fn, lambda b: (torch.zeros(b), torch.zeros(b, dtype=torch.int32)), sequences(3)
