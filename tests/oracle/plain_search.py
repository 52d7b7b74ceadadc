"""Searches written by hand: every label sequence there is, and a beam search that copies States itself."""

from __future__ import annotations

import copy
import itertools
import math

import torch

import steploop as sl
from steploop.search.copies import picked


def lone(step, label, state, constants):
    """One step of one row by the plain loop: (output without time and batch axes kept as (1, ...), state)."""
    loop = sl.Loop(step, backend="reference")
    with torch.no_grad():
        outputs, after = loop(torch.tensor([[label]]), state=state, **constants)
    return torch.utils._pytree.tree_map(lambda y: y[0], outputs), after


def log_probs_of(output, scores=None, normalised=False):
    values = picked(output, scores)[0]
    return values if normalised else torch.log_softmax(values, -1)


def rank(log_prob, length, penalty):
    """A hypothesis' score; length: labels without the end."""
    if penalty is None:
        return log_prob
    if callable(penalty):
        return float(penalty(torch.tensor(log_prob, dtype=torch.float64), torch.tensor(length)))
    kind, *numbers = penalty
    if kind == "gnmt":
        return log_prob / ((5 + length) / 6) ** numbers[0]
    return log_prob / max(length, 1) if kind == "average" else log_prob + numbers[0] * length


def every_hypothesis(model, labels, steps, start, end, *, penalty=None, min_steps=0, suppress=(), no_repeat=0,
                     allowed=None, scorers=(), coverage=None, scores=None, prefix=(), **constants):  # fmt: skip
    """[(score, labels without the end, log_prob, finished)] of all label sequences within the limits, best first."""
    found = {}

    def visit(so_far, total, log_prob, states, label, covered):
        if len(so_far) == steps:
            found[tuple(so_far), False] = (total, log_prob, covered)
            return
        output, after = lone(model, label, states[0], constants)
        own = log_probs_of(output, scores)
        gains, more = own.clone(), []
        for (weight, scorer), state in zip(scorers, states[1:], strict=True):
            y, its = lone(scorer, label, state, {})
            gains += weight * y[0]
            more.append(its)
        if coverage is not None:
            covered = covered + picked(output, coverage[1])[0]
        for v in range(labels):
            if v in suppress or (v == end and len(so_far) < min_steps):
                continue
            if allowed is not None and not allowed([*prefix, *so_far])[v]:
                continue
            if no_repeat and repeats([*prefix, *so_far, v], no_repeat):
                continue
            value, its = total + float(gains[v]), log_prob + float(own[v])
            if v == end:
                found[tuple(so_far), True] = (value, its, covered)
            else:
                visit([*so_far, v], value, its, [after, *more], v, covered)

    states = [None] * (1 + len(scorers))
    label = start
    for p in prefix:
        _, states[0] = lone(model, label, states[0], constants)
        for i, (_, scorer) in enumerate(scorers):
            _, states[i + 1] = lone(scorer, label, states[i + 1], {})
        label = p
    visit([], 0.0, 0.0, states, label, 0.0)
    ranked = []
    for (seq, finished), (total, log_prob, covered) in found.items():
        more = 0.0
        if coverage is not None and torch.is_tensor(covered):
            more = float(coverage[0] * covered.clamp(1e-6, 1.0).log().sum())
        ranked.append((rank(total, len(seq), penalty) + more, list(seq), log_prob, finished))
    return sorted(ranked, key=lambda h: -h[0])


def repeats(labels, n):
    groups = [tuple(labels[i : i + n]) for i in range(len(labels) - n + 1)]
    return bool(groups) and groups[-1] in groups[:-1]


def plain_beam(model, size, steps, start, end, *, penalty=None, scores=None, groups=1, diversity=0.0, stop="all",
               min_steps=0, suppress=(), no_repeat=0, **constants):  # fmt: skip
    """[(score, labels, log_prob, finished)] by a beam search of one row as anybody writes it; sums by default."""
    beams = [[(0.0, 0.0, [], False, None)] for _ in range(groups)]
    ends = step = 0
    while step < steps:
        step, used = step + 1, dict.fromkeys(range(1000), 0)
        for g, beam in enumerate(beams):
            candidates = []
            for score, log_prob, labels, ended, state in beam:
                if ended:
                    score *= step / (step - 1) if penalty == "returnn" else 1.0
                    candidates.append((score, score, log_prob, labels, True, state, None))
                    continue
                output, after = lone(model, labels[-1] if labels else start, copy.deepcopy(state), constants)
                for v, gain in enumerate(log_probs_of(output, scores).tolist()):
                    repeated = no_repeat and repeats([*labels, v], no_repeat)
                    if gain == -math.inf or v in suppress or repeated or (v == end and step <= min_steps):
                        continue
                    grown = labels if v == end else [*labels, v]
                    value = log_prob + gain
                    score = value if penalty == "returnn" else rank(value, len(grown), penalty)
                    candidates.append((score - diversity * used[v], score, value, grown, v == end, after, v))
            chosen = sorted(candidates, key=lambda c: -c[0])[: size // groups]
            for *_, v in chosen:
                if v is not None:
                    used[v] += 1
                    ends += v == end
            beams[g] = [c[1:-1] for c in chosen]
        found = [h for beam in beams for h in beam]
        if all(ended for *_, ended, _ in found) or (stop != "all" and ends >= stop[1] * size):
            break
    if penalty == "returnn":
        longest = step if step < steps or all(ended for *_, ended, _ in found) else step + 1
        found = [(score / longest, *rest) for score, *rest in found]
    found = [(score, labels, log_prob, ended) for score, log_prob, labels, ended, _ in found]
    return sorted(found, key=lambda h: -h[0])


def pairs(options):
    """Every option alone, and every two together."""
    names = list(options)
    return [
        {},
        *({n: options[n]} for n in names),
        *({a: options[a], b: options[b]} for a, b in itertools.combinations(names, 2)),
    ]
