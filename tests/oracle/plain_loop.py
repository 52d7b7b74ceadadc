"""What a Loop call means, in plain Python, row by row: the reference for the reference. It does not use
steploop."""

from __future__ import annotations

import torch


def plain_loop(
    step,
    initial,
    xs,
    width,
    given=None,
    lengths=None,
    mask=None,
    resets=None,
    reverse=False,
    on_masked="zero",
):
    """Run step(x (1, I), states) -> (y (1, width), states) over xs (T, B, I), one row after the other.

    initial: state name -> (features,).  given: state name -> (B, features), or None.
    Returns the outputs (T, B, width) and the final states, name -> (B, features).
    """
    steps, batch = xs.shape[:2]
    rows, finals = [], {name: [] for name in initial}
    for b in range(batch):
        fresh = {name: value.unsqueeze(0) for name, value in initial.items()}
        states = fresh if given is None else {name: given[name][b : b + 1] for name in initial}
        zeros = last = xs.new_zeros(1, width)
        column = {}
        for t in reversed(range(steps)) if reverse else range(steps):
            valid = (lengths is None or t < lengths[b]) and (mask is None or bool(mask[t, b]))
            if not valid:
                column[t] = last if on_masked == "repeat" else zeros
                continue
            if resets is not None and bool(resets[t, b]):
                states = fresh
            column[t], states = step(xs[t, b : b + 1], states)
            last = column[t]
        rows.append(torch.cat([column[t] for t in range(steps)]) if steps else xs.new_zeros(0, width))
        for name, values in finals.items():
            values.append(states[name])
    return torch.stack(rows, dim=1), {name: torch.cat(values) for name, values in finals.items()}


def in_turn(fn, carry, xs):
    """What `sl.scan` promises, for one sequence and one output: a step after the other."""
    ys = []
    for x in xs.unbind():
        carry, y = fn(carry, x)
        ys.append(y)
    return carry, torch.stack(ys)
