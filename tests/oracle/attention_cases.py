"""Every attention of sl.nn.attention with its formula written a second time: one row, one entry after the other.

A test fails where a Step exported by sl.nn.attention has no case here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from steploop.nn import attention

QUERY, MEMORY, SIZE = 6, 5, 4


@dataclass(frozen=True, eq=False)
class Case:
    """make() -> the attention.  plain(attention, q (Q,), memory (S, D), valid, kept) -> (context, weights, kept):

    memory: every entry of one row.  valid: a list of S bools; what stands elsewhere is not looked at.
    kept: what the attention kept of the step before; None before the first.
    context: features of the context.  states: by path.  projects: modules that depend on the memory alone.
    """

    name: str
    make: Callable[[], Any]
    plain: Callable[..., tuple]
    covers: type
    states: tuple[str, ...] = ()
    projects: tuple[str, ...] = ()
    context: int = MEMORY
    query: int = QUERY


def softmax(energies, valid):
    """A list of S weights; zeros where an entry is not valid."""
    those = [e for e, v in zip(energies, valid, strict=True) if v]
    if not those:
        return [torch.zeros((), dtype=torch.float64) for _ in valid]
    powers = [(e - max(x.detach() for x in those)).exp() if v else None for e, v in zip(energies, valid, strict=True)]
    total = sum(p for p in powers if p is not None)
    return [p / total if p is not None else torch.zeros_like(total) for p in powers]


def summed(weights, memory, valid):
    context = torch.zeros(memory.shape[-1], dtype=memory.dtype)
    for weight, entry, v in zip(weights, memory, valid, strict=True):
        if v:
            context = context + weight * entry
    return context


def by_energy(energy):
    """energy(attention, q, h) -> a number; for mechanisms that look at each entry alone."""

    def plain(a, q, memory, valid, kept):
        energies = [energy(a, q, h) if v else None for h, v in zip(memory, valid, strict=True)]
        weights = softmax(energies, valid)
        return summed(weights, memory, valid), torch.stack(weights), None

    return plain


def additive(a, q, h):
    bias = 0 if a.keys.bias is None else a.keys.bias
    return a.energy.weight[0] @ torch.tanh(a.query.weight @ q + a.keys.weight @ h + bias)


def dot(a, q, h):
    return (q @ h) / (math.sqrt(len(q)) if a.scaled else 1)


def general(a, q, h):
    return q @ (a.keys.weight @ h)


def multi_head(a, q, memory, valid, kept):
    part = a.query.out_features // a.heads
    contexts, table = [], []
    for head in range(a.heads):
        rows = slice(head * part, (head + 1) * part)

        def of(module, x, rows=rows):
            return module.weight[rows] @ x + (0 if module.bias is None else module.bias[rows])

        energies = [
            of(a.query, q) @ of(a.keys, h) / math.sqrt(part) if v else None for h, v in zip(memory, valid, strict=True)
        ]
        weights = softmax(energies, valid)
        values = torch.stack(
            [of(a.values, torch.where(torch.tensor(v), h, 0.0)) for h, v in zip(memory, valid, strict=True)]
        )
        contexts.append(summed(weights, values, valid))
        table.append(torch.stack(weights))
    context = a.out.weight @ torch.cat(contexts)
    if a.out.bias is not None:
        context = context + a.out.bias
    return context if any(valid) else torch.zeros_like(context), torch.stack(table), None


def location_sensitive(a, q, memory, valid, kept):
    size, (filters, width) = len(valid), a.filters.shape
    kept = [torch.zeros((), dtype=torch.float64)] * size if kept is None else kept
    energies = []
    for j, (h, v) in enumerate(zip(memory, valid, strict=True)):
        f = torch.zeros(filters, dtype=torch.float64)
        for i in range(width):
            there = j + i - width // 2
            if 0 <= there < size:
                f = f + a.filters[:, i] * kept[there]
        hidden = a.query.weight @ q + a.keys.weight @ h + a.keys.bias + a.location.weight @ f
        energies.append(a.energy.weight[0] @ hidden.tanh() if v else None)
    if a.smoothing:
        lit = [e.sigmoid() if v else torch.zeros((), dtype=torch.float64) for e, v in zip(energies, valid, strict=True)]
        total = sum(lit) if any(valid) else 1.0
        weights = [x / total for x in lit]
    else:
        weights = softmax(energies, valid)
    kept = [b + w for b, w in zip(kept, weights, strict=True)] if a.accumulate else weights
    return summed(weights, memory, valid), torch.stack(weights), kept


def monotonic_energy(a, q, h):
    direction = a.energy / a.energy.square().sum().sqrt()
    return a.gain * direction @ torch.tanh(a.query.weight @ q + a.keys.weight @ h + a.keys.bias) + a.bias


def first(size):
    return [torch.tensor(float(j == 0), dtype=torch.float64) for j in range(size)]


def monotonic_soft(a, q, memory, valid, kept):
    """Equation 9, literally: the sum over where it stood, of the product of not having stopped since."""
    kept = first(len(valid)) if kept is None else kept
    zero = torch.zeros((), dtype=torch.float64)
    stop = [monotonic_energy(a, q, h).sigmoid() if v else zero for h, v in zip(memory, valid, strict=True)]
    weights = []
    for j in range(len(valid)):
        total = zero
        for k in range(j + 1):
            passed = torch.ones((), dtype=torch.float64)
            for between in range(k, j):
                passed = passed * (1 - stop[between])
            total = total + kept[k] * passed
        weights.append(stop[j] * total)
    return summed(weights, memory, valid), torch.stack(weights), weights


def monotonic_hard(a, q, memory, valid, kept):
    """Algorithm 1 of the paper."""
    kept = first(len(valid)) if kept is None else kept
    stood = next((j for j, w in enumerate(kept) if w > 0), len(valid))
    weights = [torch.zeros((), dtype=torch.float64) for _ in valid]
    for j in range(stood, len(valid)):
        if valid[j] and monotonic_energy(a, q, memory[j]) > 0:
            weights[j] = torch.ones((), dtype=torch.float64)
            break
    return summed(weights, memory, valid), torch.stack(weights), weights


def gaussian_mixture(a, q, memory, valid, kept):
    components = a.kappa.shape[0]
    kept = torch.zeros(components, dtype=torch.float64) if kept is None else kept
    hat = a.window.weight @ q + a.window.bias
    alpha, beta = hat[:components].exp(), hat[components : 2 * components].exp()
    kappa = kept + hat[2 * components :].exp()
    weights = []
    for u, v in enumerate(valid, 1):
        total = sum(alpha[k] * torch.exp(-beta[k] * (kappa[k] - u) ** 2) for k in range(components))
        weights.append(total if v else torch.zeros_like(total))
    return summed(weights, memory, valid), torch.stack(weights), kappa


a_ = attention
CASES = [
    Case(
        "additive",
        lambda: a_.AdditiveAttention(QUERY, MEMORY, SIZE),
        by_energy(additive),
        a_.AdditiveAttention,
        projects=("keys",),
    ),
    Case(
        "additive_no_bias",
        lambda: a_.AdditiveAttention(QUERY, MEMORY, SIZE, bias=False),
        by_energy(additive),
        a_.AdditiveAttention,
        projects=("keys",),
    ),
    Case("dot", lambda: a_.DotAttention(MEMORY), by_energy(dot), a_.DotAttention, query=MEMORY),
    Case("scaled_dot", lambda: a_.DotAttention(MEMORY, scaled=True), by_energy(dot), a_.DotAttention, query=MEMORY),
    Case(
        "general",
        lambda: a_.GeneralAttention(QUERY, MEMORY),
        by_energy(general),
        a_.GeneralAttention,
        projects=("keys",),
    ),
    Case(
        "multi_head",
        lambda: a_.MultiHeadAttention(QUERY, MEMORY, 2, SIZE, output_size=3),
        multi_head,
        a_.MultiHeadAttention,
        projects=("keys", "values"),
        context=3,
    ),
    Case(
        "multi_head_no_bias",
        lambda: a_.MultiHeadAttention(QUERY, MEMORY, 4, SIZE, bias=False),
        multi_head,
        a_.MultiHeadAttention,
        projects=("keys", "values"),
        context=SIZE,
    ),
    Case(
        "location_sensitive",
        lambda: a_.LocationSensitiveAttention(QUERY, MEMORY, SIZE, filters=3, width=5),
        location_sensitive,
        a_.LocationSensitiveAttention,
        states=("before",),
        projects=("keys",),
    ),
    Case(
        "location_sensitive_smooth_accumulated",
        lambda: a_.LocationSensitiveAttention(QUERY, MEMORY, SIZE, filters=2, width=3, smoothing=True, accumulate=True),
        location_sensitive,
        a_.LocationSensitiveAttention,
        states=("before",),
        projects=("keys",),
    ),
    Case(
        "monotonic",
        lambda: a_.MonotonicAttention(QUERY, MEMORY, SIZE, noise=0.0, bias=0.2),
        monotonic_soft,
        a_.MonotonicAttention,
        states=("before",),
        projects=("keys",),
    ),
    Case(
        "monotonic_hard",
        lambda: a_.MonotonicAttention(QUERY, MEMORY, SIZE, bias=0.2).eval(),
        monotonic_hard,
        a_.MonotonicAttention,
        states=("before",),
        projects=("keys",),
    ),
    Case(
        "gaussian_mixture",
        lambda: a_.GaussianMixtureAttention(QUERY, MEMORY, 3),
        gaussian_mixture,
        a_.GaussianMixtureAttention,
        states=("kappa",),
    ),
]


def made(case, dtype=torch.float64):
    """The attention in dtype with every parameter random."""
    torch.manual_seed(11)
    attention = case.make().to(dtype)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.6)
    return attention


FIRST = [case for case in CASES if case.name in {
    "additive", "dot", "general", "multi_head", "location_sensitive", "monotonic", "monotonic_hard", "gaussian_mixture",
}]  # fmt: skip
