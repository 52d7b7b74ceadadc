"""Beams, tables, sorting, indexing: steps that pick, place and count."""

import torch
import torch.nn.functional as F
from torch import nn

from . import stranger


def sequences(features):
    return lambda steps, batch: torch.randn(steps, batch, features)


@stranger
def beam_search():
    """A beam of 3 over 5 labels, histories reordered by gather."""
    embed, cell, head = nn.Embedding(5, 4), nn.GRUCell(4 + 2, 4), nn.Linear(4, 5)

    def fn(carry, x):
        h, scores, labels, history, ended = carry
        b, k = scores.shape
        inputs = torch.cat([embed(labels), x[:, None].expand(b, k, -1)], -1)
        h = cell(inputs.view(b * k, -1), h.view(b * k, -1)).view(b, k, -1)
        log_probs = F.log_softmax(head(h), dim=-1)
        only_end = torch.full_like(log_probs, -1e9)
        only_end[..., 0] = 0
        log_probs = torch.where(ended.unsqueeze(-1), only_end, log_probs)
        flat = (scores.unsqueeze(-1) + log_probs).view(b, -1)
        scores, index = flat.topk(k, dim=-1)
        parents, labels = torch.div(index, 5, rounding_mode="trunc"), index % 5
        h = h.gather(1, parents.unsqueeze(-1).expand_as(h))
        history = torch.cat([history.gather(1, parents[..., None].expand_as(history))[..., 1:], labels[..., None]], -1)
        ended = ended.gather(1, parents) | (labels == 0)
        return (h, scores, labels, history, ended), (labels, parents, scores)

    def init(b):
        scores = torch.tensor([0.0, -1e9, -1e9]).repeat(b, 1)
        labels = torch.ones(b, 3, dtype=torch.long)
        return torch.zeros(b, 3, 4), scores, labels, torch.zeros(b, 3, 6, dtype=torch.long), labels > 1

    return fn, init, sequences(2)


@stranger
def running_top_k():
    def fn(best, x):
        joined, order = torch.sort(torch.cat([best, x], dim=1), dim=1, descending=True)
        values, _ = torch.topk(joined, 3, dim=1, largest=True, sorted=True)
        low = torch.kthvalue(joined, 2, dim=1).values
        return values, (order[:, 0], low, torch.median(joined, dim=1)[0], joined.argsort(dim=1)[:, :2])

    return fn, lambda b: torch.full((b, 3), -9.0), sequences(4)


@stranger
def histogram_and_quantiles():
    edges = torch.linspace(-2, 2, 9)

    def fn(counts, x):
        place = torch.bucketize(x, edges)
        counts = counts + F.one_hot(place, 10).sum(1)
        total = counts.cumsum(-1)
        middle = torch.searchsorted(total.contiguous(), (total[:, -1:] + 1) // 2)
        return counts, (middle.squeeze(1), edges[middle.clamp(max=8)].squeeze(1), torch.quantile(x, 0.5, dim=1))

    return fn, lambda b: torch.zeros(b, 10, dtype=torch.long), sequences(3)


@stranger
def running_extremes():
    def fn(carry, x):
        high, low, place, step = carry
        newer = (x > high).any(1)
        place = torch.where(newer, step, place)
        high, low = torch.fmax(high, x), torch.minimum(low, x)
        across, where_ = torch.cummax(x, dim=1)
        down, _ = x.cummin(1)
        return (high, low, place, step + 1), (across - down, where_, torch.logcumsumexp(x, 1), x.cumprod(-1))

    def init(b):
        return torch.full((b, 3), -1e9), torch.full((b, 3), 1e9), torch.full((b,), -1), torch.zeros(b, dtype=torch.long)

    return fn, init, sequences(3)


@stranger
def best_place_by_argmin():
    """A dynamic program that jumps to the cheapest entry."""

    def fn(cost, x):
        cost = torch.minimum(cost, F.pad(cost, (1, 0), value=9.0)[:, :-1]) + x.abs()
        best = cost.argmin(dim=1)
        jump = cost.gather(1, best[:, None])
        cost = torch.cat([cost[:, :-1], torch.minimum(cost[:, -1:], jump + 0.5)], dim=1)
        return cost, (best, cost.amin(1))

    return fn, lambda b: torch.zeros(b, 5), sequences(5)


@stranger(rows=False)
def the_best_row_leads():
    """Particle swarm: all rows look at the best of them."""

    def fn(carry, x):
        place, speed, own, own_cost = carry
        cost = (place**2).sum(1)
        own = torch.where((cost < own_cost)[:, None], place, own)
        own_cost = torch.minimum(cost, own_cost)
        leader = own[own_cost.argmin()]
        speed = 0.7 * speed + 0.3 * x.sigmoid() * (own - place) + 0.2 * (leader - place)
        return (place + speed, speed, own, own_cost), own_cost.min()

    def init(b):
        return torch.linspace(-1, 1, b * 2).view(b, 2), torch.zeros(b, 2), torch.zeros(b, 2), torch.full((b,), 1e9)

    return fn, init, sequences(2)


@stranger(rows=False)
def kmeans_online():
    def fn(carry, x):
        centres, counts = carry
        nearest = torch.cdist(x, centres).argmin(1)
        one_hot = F.one_hot(nearest, 3).to(x.dtype)
        counts = counts + one_hot.sum(0)
        centres = centres + (one_hot.T @ x - one_hot.sum(0)[:, None] * centres) / counts.clamp(min=1)[:, None]
        return (centres, counts), nearest

    return fn, lambda b: (torch.tensor([[0.0, 1], [1, 0], [-1, -1]]), torch.zeros(3)), sequences(2)


@stranger(rows=False)
def table_of_counts():
    """index_put with accumulate, bincount-like, over one table for all rows."""
    flat = torch.zeros(6)

    def fn(table, x):
        i = (x[:, 0].abs() * 2).long().clamp(max=5)
        j = (x[:, 1].abs() * 2).long().clamp(max=5)
        table = table.index_put((i, j), x[:, 0], accumulate=True)
        seen = flat.scatter_add(0, i, torch.ones_like(x[:, 0]))
        return table, (table.sum(), seen)

    return fn, lambda b: torch.zeros(6, 6), sequences(2)


@stranger
def permutations_and_flips():
    order = torch.tensor([2, 0, 3, 1])

    def fn(h, x):
        h = torch.flip(h, dims=[1])[:, order] + x
        h = torch.roll(h, shifts=(1, 1), dims=(1, 2)) if h.dim() == 3 else h.roll(1, 1)
        upper = torch.triu(h[:, :, None] * h[:, None, :], 1)
        return torch.tanh(h), (upper.sum((1, 2)), torch.take_along_dim(h, h.argsort(1), 1), torch.diff(h, dim=1))

    return fn, lambda b: torch.zeros(b, 4), sequences(4)


@stranger(rows=False)
def rows_rolled_and_flipped():
    """A ring of agents, each looking at its neighbours: axis 0 is no batch here."""
    mix = nn.Parameter(torch.tensor([0.5, 0.3, 0.2]))

    def fn(h, x):
        left, right = torch.roll(h, 1, 0), torch.roll(h, -1, 0)
        mirrored = h.flip(0)
        h = torch.tanh(mix[0] * h + mix[1] * left + mix[2] * right + x + 0.1 * mirrored)
        return h, h.cumsum(0)

    return fn, lambda b: torch.zeros(b, 3), sequences(3)


@stranger
def bool_reductions():
    def fn(seen, x):
        flags = x > 0
        seen = seen | flags
        most, least = flags.max(dim=1), flags.amin(dim=1)
        filled = torch.nan_to_num(flags.double()) + torch.nan_to_num(flags)
        return seen, (most.values, least, seen.all(1), flags.any(-1), filled, flags.amax(1), flags.min(1).indices)

    return fn, lambda b: torch.zeros(b, 3, dtype=torch.bool), sequences(3)


@stranger
def edit_distance_rows():
    target = torch.tensor([1, 2, 3, 1])

    def fn(row, token):
        cost = (target[None] != token[:, None]).to(row.dtype)
        diagonal = row[:, :-1] + cost
        best = torch.minimum(diagonal, row[:, 1:] + 1)
        new = [row[:, 0] + 1]
        for i in range(4):
            new.append(torch.minimum(best[:, i], new[-1] + 1))
        row = torch.stack(new, 1)
        return row, row[:, -1]

    return fn, lambda b: torch.arange(5.0).expand(b, 5), lambda t, b: torch.randint(0, 4, (t, b))
