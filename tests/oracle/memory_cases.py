"""Every operation of sl.memory with a plain definition: what it gives after a row's frames so far.

A definition looks at one row: `plain(op, seen, constants, room)`, where `seen` is the list of this row's
valid frames since the start or the latest reset, up to and including this step. It uses no state and no
steploop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import steploop as sl
from steploop import memory
from steploop.nn.dropout import hashed_keep

ARPA = """\\data\\
ngram 1=6
ngram 2=5
ngram 3=2

\\1-grams:
-99\t<s>\t-0.3
-1.0\t<unk>
-0.7\ta\t-0.2
-0.9\tb\t-0.4
-1.1\tc\t-0.1
-1.0\t</s>

\\2-grams:
-0.3\t<s> a\t-0.15
-0.4\ta b\t-0.25
-0.6\tb c
-0.5\tb a\t-0.05
-0.8\tc </s>

\\3-grams:
-0.2\t<s> a b
-0.1\ta b c

\\end\\
"""


def floats(*shape: int) -> Callable[[int, int], torch.Tensor]:
    return lambda steps, batch: torch.randn(steps, batch, *shape, dtype=torch.float64, requires_grad=True)


def seeds(steps: int, batch: int) -> torch.Tensor:
    return torch.randint(1, 2**62, (steps, batch, 1))


def labels(low: int, high: int) -> Callable[[int, int], torch.Tensor]:
    return lambda steps, batch: torch.randint(low, high, (steps, batch))


def flags(steps: int, batch: int) -> torch.Tensor:
    return torch.rand(steps, batch) < 0.6


@dataclass
class Case:
    """op: the class in the registry.  make: a new operation.  xs: makers of (T, B, ...) sequences, one each.

    constants: B -> dict.  tolerance: where the operation itself computes in float32.
    """

    op: Any
    make: Callable[[], sl.Step]
    xs: tuple[Callable[[int, int], torch.Tensor], ...]
    plain: Callable[..., Any]
    constants: Callable[[int], dict[str, Any]] = field(default=lambda batch: {})
    tolerance: float = 1e-9
    name: str = ""


# -- definitions ---------------------------------------------------------------------------------------------


def delay(op, seen, constants, room):
    x = seen[-1][0]
    return seen[-1 - op.n][0] if len(seen) > op.n else torch.full_like(x, 0.5)


def step_index(op, seen, constants, room):
    return torch.tensor(len(seen) - 1)


def cumulative(combine, init):
    def plain(op, seen, constants, room):
        total = torch.full_like(seen[0][0], init)
        frames = seen[:-1] if op.exclusive else seen
        for (x,) in frames:
            total = combine(total, x)
        return total

    return plain


def window(op, seen, constants, room):
    zeros = [torch.zeros_like(seen[0][0])] * op.left
    return torch.stack([*zeros, *(x for (x,) in seen)][-op.left - 1 :])


def conv(op, seen, constants, room):
    y = op.bias.clone()
    per_group, out_group = op.in_channels // op.groups, op.out_channels // op.groups
    for k in range(op.kernel_size):
        back = (op.kernel_size - 1 - k) * op.dilation
        if back >= len(seen):
            continue
        x = seen[-1 - back][0]
        parts = [
            op.weight[g * out_group : (g + 1) * out_group, :, k] @ x[g * per_group : (g + 1) * per_group]
            for g in range(op.groups)
        ]
        y = y + torch.cat(parts)
    return y


def attention(op, seen, constants, room):
    if op.qkv is None:
        rows = [frame[:3] for frame in seen]
    else:
        rows = [op.qkv(x).split([op.key_size, op.key_size, op.value_size]) for (x,) in seen]
    q = rows[-1][0].unflatten(0, (op.heads, -1))
    last = len(rows) - 1
    scale = q.shape[1] ** -0.5 if op.scale is None else op.scale
    results = []
    for head in range(op.heads):
        scores, values = [], []
        for s, (_, k, v) in enumerate(rows):
            key = k.unflatten(0, (op.heads, -1))[head]
            query = q[head]
            if op.rope:
                query, key = rotated(query, last, op.rope), rotated(key, s, op.rope)
            score = query @ key
            if op.relative is not None:
                score = score + q[head] @ op.relative_keys[max(s - last, -op.relative) + op.relative]
            scores.append(scale * score)
            values.append(v.unflatten(0, (op.heads, -1))[head])
        weights = torch.softmax(torch.stack(scores), 0)
        if op.dropout:
            seed, places = seen[-1][3], torch.arange(len(rows)) * op.heads + head
            weights = weights * hashed_keep(seed, places, 1 - op.dropout) / (1 - op.dropout)
        results.append(weights @ torch.stack(values))
    y = torch.cat(results)
    return y if op.out is None else op.out(y)


def rotated(x, position, base):
    """Pairs (i, i + n/2) as complex numbers, turned."""
    half = len(x) // 2
    angles = torch.tensor([position * base ** (-i / half) for i in range(half)], dtype=x.dtype)
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag])


def history(op, seen, constants, room):
    frames = [x for (x,) in seen]
    padded = [*frames, *[torch.zeros_like(frames[0])] * (room - len(frames))]
    return torch.stack(padded), torch.tensor(len(frames))


def relative_positions(op, seen, constants, room):
    t = len(seen) - 1
    index = torch.tensor([min(max(k - t, -op.clip), op.clip) + op.clip for k in range(room)])
    return index if op.embedding is None else op.embedding.weight[index]


def positional_encoding(op, seen, constants, room):
    t, d = len(seen) - 1, op.size
    if op.layout == "halves":
        w = [1e4 ** -(i / max(d // 2 - 1, 1)) for i in range(d // 2)]
        values = [math.sin(t * f) for f in w] + [math.cos(t * f) for f in w] + [0.0] * (d % 2)
    else:
        values = [(math.cos if j % 2 else math.sin)(t * 1e4 ** -((j - j % 2) / d)) for j in range(d)]
    return seen[-1][0] + torch.tensor(values, dtype=torch.float64)


class Leaky(sl.Step):
    """A cell for wrappers: two outputs' worth of state, one of them an integer."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.h = sl.State(3, init=1.0)

    def step(self, x):
        self.h.next = torch.tanh(self.scale * self.h.prev + x)
        return self.h.next


def _bidirectional():
    forward, backward = Leaky(), Leaky()
    with torch.no_grad():
        backward.scale.mul_(-0.5)
    return sl.nn.Bidirectional(forward, backward, batch_first=True)


class LeakyPair(Leaky):
    def step(self, x):
        h = super().step(x)
        return {"h": h, "x": (2 * x, x.argmax(-1))}


def leaky(scale, frames):
    h = torch.ones_like(frames[0])
    for x in frames:
        h = torch.tanh(scale * h + x)
    return h


def masked(op, seen, constants, room):
    kept = [x for x, where in seen if where]
    return leaky(op.cell.scale, kept) if kept else torch.full_like(seen[0][0], 0.25)


def masked_pair(op, seen, constants, room):
    kept = [x for x, where in seen if where]
    if not kept:
        zeros = torch.zeros_like(seen[0][0])
        return {"h": zeros, "x": (zeros, torch.tensor(0))}
    return {"h": leaky(op.cell.scale, kept), "x": (2 * kept[-1], kept[-1].argmax(-1))}


def masked_masked(op, seen, constants, room):
    kept = [(x, inner) for x, inner, outer in seen if outer]
    below = [x for x, inner in kept if inner]
    if not kept:
        return torch.full_like(seen[0][0], 2.0)
    return leaky(op.cell.cell.scale, below) if below else torch.full_like(seen[0][0], 0.25)


def masked_sum(op, seen, constants, room):
    return sum((x for x, where in seen if where), torch.zeros_like(seen[0][0]))


def unmask(op, seen, constants, room):
    kept = [x for x, where in seen if where]
    return kept[-1] if kept else torch.full_like(seen[0][0], -1.0)


def masked_from(op, seen, constants, room):
    kept = sum(bool(where) for (where,) in seen)
    x = constants["source"]
    return leaky(op.masked.cell.scale, list(x[:kept])) if kept else torch.full_like(x[0], 0.25)


def inner(op, seen, constants, room):
    x = seen[-1][0]
    length = int(seen[-1][1]) if len(seen[-1]) > 1 else len(x)
    frames = list(x[:length])
    if op.reverse:
        frames.reverse()
    scale = op.loop.step.scale
    outputs = [leaky(scale, frames[: i + 1]) for i in range(length)]
    if op.output == "last":
        return outputs[-1] if outputs else torch.zeros_like(x[0])
    if op.reverse:
        outputs.reverse()
    return torch.stack([*outputs, *[torch.zeros_like(x[0])] * (len(x) - length)])


def both_ways(op, seen, constants, room):
    """What each direction ends with: the forward half at the last inner position, the backward half at the first."""
    x = seen[-1][0]
    frames = list(x[: int(seen[-1][1])])
    if not frames:
        return x.new_zeros(6)
    scales = [loop.step.scale for loop in (op.loop.forward_loop, op.loop.backward_loop)]
    return torch.cat([leaky(scales[0], frames), leaky(scales[1], frames[::-1])])


def edit_distance(op, seen, constants, room):
    a = [int(label) for (label,) in seen if int(label) != op.blank]
    target = constants["target"].tolist()
    rows = [[j for j in range(len(target) + 1)]]
    for i, label in enumerate(a):
        row = [i + 1]
        for j, other in enumerate(target):
            row.append(min(rows[-1][j + 1] + 1, row[j] + 1, rows[-1][j] + (label != other)))
        rows.append(row)
    length = int(constants.get("target_lengths", len(target)))
    return torch.tensor([rows[-1][min(j, length)] for j in range(len(target) + 1)])


def two_d_lstm(op, seen, constants, room):
    source = constants["source"]
    length = int(constants.get("source_lengths", len(source)))
    n = op.hidden_size
    zeros = source.new_zeros(n)
    above = [(zeros, zeros)] * len(source)
    for (target,) in seen:
        row, left = [], (zeros, zeros)
        for x in range(len(source)):
            (h_left, c_left), (h_up, c_up) = left, above[x]
            gates = op.weight_source @ source[x] + op.weight_target @ target + op.bias
            i, f, mix, o, g = (gates + op.weight_h @ h_left + op.weight_v @ h_up).split(n)
            i, f, mix, o = (part.sigmoid() for part in (i, f, mix, o))
            c = i * g.tanh() + f * (mix * c_up + (1 - mix) * c_left)
            left = (o * c.tanh(), c) if x < length else (zeros, zeros)
            row.append(left)
        above = row
    h = torch.stack([h for h, _ in above])
    if op.pooling is None:
        return h
    if length == 0:
        return zeros
    kept = h[:length]
    if op.pooling == "weighted":
        return torch.softmax(kept @ (seen[-1][0] @ op.weight_pool), 0) @ kept
    return {"last": kept[-1], "max": kept.amax(0), "mean": kept.mean(0)}[op.pooling]


def ngram(op, seen, constants, room):
    table = arpa_table(ARPA)
    words = ["<s>", *(word_of(op, int(token)) for (token,) in seen)]
    return torch.tensor(arpa_score(table, words[-3:]) * math.log(10))


def word_of(op, token):
    word = op.words[token] if 0 <= token < len(op.words) else "<unk>"
    return word if word in ("<s>", "<unk>", "a", "b", "c", "</s>") else "<unk>"


def arpa_table(text):
    table = {}
    for line in text.splitlines():
        parts = line.split("\t")
        if len(parts) > 1:
            table[tuple(parts[1].split())] = float(parts[0]), float(parts[2]) if len(parts) > 2 else 0.0
    return table


def arpa_score(table, words):
    """log10 p(last word | the others), by the definition."""
    words = tuple(words)
    if words in table:
        return table[words][0]
    return table.get(words[:-1], (0.0, 0.0))[1] + arpa_score(table, words[1:])


def choice_given(op, seen, constants, room):
    return seen[-1][1]


def choice_imposed(op, seen, constants, room):
    scores, target, where = seen[-1]
    return target if where else scores.argmax()


def choice_own(op, seen, constants, room):
    return seen[-1][0].argmax()


# -- the registry --------------------------------------------------------------------------------------------


def _targets(batch):
    lengths = torch.tensor([4, 2, 0])[torch.arange(batch) % 3]
    return {"target": torch.randint(0, 4, (batch, 4)), "target_lengths": lengths}


def _source(lengths):
    def make(batch):
        found = {"source": torch.randn(batch, 4, 5, dtype=torch.float64, requires_grad=True)}
        if lengths:
            found["source_lengths"] = torch.tensor([4, 2, 0])[torch.arange(batch) % 3]
        return found

    return make


def _compact(batch):
    return {"source": torch.randn(batch, 9, 3, dtype=torch.float64, requires_grad=True)}


def _arpa(vocabulary=None):
    import tempfile

    def make():
        with tempfile.NamedTemporaryFile("w", suffix=".arpa") as file:
            file.write(ARPA)
            file.flush()
            return memory.NGramScorer(file.name, vocabulary)

    return make


def _maximum(a, b):
    return torch.maximum(a, b)


_pool = [
    Case(
        memory.TwoDLSTM,
        lambda pooling=pooling: memory.TwoDLSTM(5, 3, 2, pooling),
        (floats(3),),
        two_d_lstm,
        _source(pooling != "last"),
        name=f"TwoDLSTM-{pooling}",
    )
    for pooling in ("last", "max", "mean", "weighted", None)
]

CASES = [
    Case(memory.Delay, lambda: memory.Delay(init=0.5), (floats(3),), delay),
    Case(memory.Delay, lambda: memory.Delay(3, init=0.5), (floats(2, 2),), delay, name="Delay-3"),
    Case(memory.StepIndex, memory.StepIndex, (floats(),), step_index),
    Case(memory.CumSum, lambda: memory.CumSum(1.5), (floats(3),), cumulative(lambda a, b: a + b, 1.5)),
    Case(
        memory.CumSum,
        lambda: memory.CumSum(exclusive=True),
        (floats(),),
        cumulative(lambda a, b: a + b, 0.0),
        name="CumSum-exclusive",
    ),
    Case(memory.CumMax, lambda: memory.CumMax(-9.0), (floats(3),), cumulative(_maximum, -9.0)),
    Case(memory.CumMax, memory.CumMax, (labels(-5, 5),), cumulative(_maximum, -99), name="CumMax-int"),
    Case(memory.CumProd, memory.CumProd, (floats(3),), cumulative(lambda a, b: a * b, 1.0)),
    Case(
        memory.CumLogSumExp,
        lambda: memory.CumLogSumExp(-1.0),
        (floats(3),),
        cumulative(torch.logaddexp, -1.0),
    ),
    Case(memory.Window, lambda: memory.Window(2), (floats(3),), window),
    Case(memory.Window, lambda: memory.Window(0), (labels(0, 9),), window, name="Window-0"),
    Case(memory.CausalConv1d, lambda: memory.CausalConv1d(3, 4, 3), (floats(3),), conv),
    Case(
        memory.CausalConv1d,
        lambda: memory.CausalConv1d(4, 4, 2, dilation=2, groups=2),
        (floats(4),),
        conv,
        name="CausalConv1d-groups",
    ),
    Case(memory.CausalSelfAttention, lambda: memory.CausalSelfAttention(2, 4), (floats(4),), attention),
    Case(
        memory.CausalSelfAttention,
        lambda: memory.CausalSelfAttention(
            2, 3, key_size=8, value_size=6, output_size=3, rope=True, bias=False
        ),
        (floats(3),),
        attention,
        name="CausalSelfAttention-rope",
    ),
    Case(
        memory.CausalSelfAttention,
        lambda: memory.CausalSelfAttention(2, 4, relative=2, scale=0.9),
        (floats(4),),
        attention,
        name="CausalSelfAttention-relative",
    ),
    Case(
        memory.CausalSelfAttention,
        lambda: memory.CausalSelfAttention(1),
        (floats(2), floats(2), floats(3)),
        attention,
        name="CausalSelfAttention-qkv",
    ),
    Case(
        memory.CausalSelfAttention,
        lambda: memory.CausalSelfAttention(2, dropout=0.4),
        (floats(4), floats(4), floats(6), seeds),
        attention,
        name="CausalSelfAttention-dropout",
    ),
    Case(
        memory.CausalSelfAttention,
        lambda: memory.CausalSelfAttention(2, relative=1, key_size=4, dropout=0.4),
        (floats(4), floats(4), floats(2), seeds),
        attention,
        name="CausalSelfAttention-relative-dropout",
    ),
    Case(memory.History, memory.History, (floats(2),), history),
    Case(memory.RelativePositions, lambda: memory.RelativePositions(2), (floats(),), relative_positions),
    Case(
        memory.RelativePositions,
        lambda: memory.RelativePositions(1, 3),
        (floats(),),
        relative_positions,
        name="RelativePositions-embedded",
    ),
    Case(
        memory.PositionalEncoding,
        lambda: memory.PositionalEncoding(7),
        (floats(7),),
        positional_encoding,
        tolerance=1e-5,
    ),
    Case(
        memory.PositionalEncoding,
        lambda: memory.PositionalEncoding(6, "interleaved"),
        (floats(6),),
        positional_encoding,
        tolerance=1e-5,
        name="PositionalEncoding-interleaved",
    ),
    Case(memory.SequenceRNN, lambda: memory.SequenceRNN(Leaky()), (floats(4, 3),), inner),
    Case(
        memory.SequenceRNN,
        lambda: memory.SequenceRNN(Leaky(), reverse=True),
        (floats(4, 3), labels(0, 5)),
        inner,
        name="SequenceRNN-reverse",
    ),
    Case(
        memory.SequenceRNN,
        lambda: memory.SequenceRNN(Leaky(), output="last"),
        (floats(4, 3), labels(0, 5)),
        inner,
        name="SequenceRNN-last",
    ),
    Case(
        memory.SequenceRNN,
        lambda: memory.SequenceRNN(Leaky(), reverse=True, output="last"),
        (floats(4, 3), labels(0, 5)),
        inner,
        name="SequenceRNN-reverse-last",
    ),
    Case(
        memory.SequenceRNN,
        lambda: memory.SequenceRNN(_bidirectional(), output="last"),
        (floats(4, 3), labels(0, 5)),
        both_ways,
        name="SequenceRNN-bidirectional-last",
    ),
    Case(memory.EditDistance, memory.EditDistance, (labels(0, 4),), edit_distance, _targets),
    Case(
        memory.EditDistance,
        lambda: memory.EditDistance(blank=0),
        (labels(0, 4),),
        edit_distance,
        lambda batch: {"target": torch.randint(0, 4, (batch, 5))},
        name="EditDistance-blank",
    ),
    Case(memory.Masked, lambda: memory.Masked(Leaky(), initial=0.25), (floats(3), flags), masked),
    Case(
        memory.Masked,
        lambda: memory.Masked(LeakyPair()),
        (floats(3), flags),
        masked_pair,
        name="Masked-pytree",
    ),
    Case(
        memory.Masked,
        lambda: memory.Masked(memory.Masked(Leaky(), initial=0.25), initial=2.0),
        (floats(3), flags, flags),
        masked_masked,
        name="Masked-nested",
    ),
    Case(
        memory.Masked,
        lambda: memory.Masked(memory.CumSum()),
        (floats(2), flags),
        masked_sum,
        name="Masked-CumSum",
    ),
    Case(memory.Unmask, lambda: memory.Unmask(-1.0), (floats(2), flags), unmask),
    Case(memory.MaskedFrom, lambda: memory.MaskedFrom(Leaky(), 0.25), (flags,), masked_from, _compact),
    *_pool,
    Case(memory.NGramScorer, _arpa(), (labels(-1, 8),), ngram, tolerance=1e-5),
    Case(
        memory.NGramScorer,
        _arpa(["c", "b", "a", "zebra"]),
        (labels(0, 4),),
        ngram,
        tolerance=1e-5,
        name="NGramScorer-vocabulary",
    ),
    Case(memory.Choice, memory.Choice, (floats(5), labels(0, 5)), choice_given),
    Case(memory.Choice, memory.Choice, (floats(5),), choice_own, name="Choice-own"),
    Case(memory.Choice, memory.Choice, (floats(5), labels(0, 5), flags), choice_imposed, name="Choice-where"),
]
for case in CASES:
    case.name = case.name or case.op.__name__
FIRST = list({case.op: case for case in reversed(CASES)}.values())[::-1]  # one case of every operation
