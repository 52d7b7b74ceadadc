"""What RETURNN's layers have beside the goldens, built of sl.memory: its formulas, written out with numpy."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import steploop as sl
from steploop import memory

sys.path.insert(0, str(Path(__file__).parent.parent))

from agree import agree

STEPS, BATCH = 6, 3
LENGTHS = torch.tensor([6, 4, 2])


def tensor2tensor(position, size):
    """The signal of one position; halves, not in turn."""
    count = size // 2
    frequency = np.exp(-np.arange(count) * np.log(1e4) / (count - 1))
    signal = np.concatenate([np.sin(position * frequency), np.cos(position * frequency)])
    return np.pad(signal, (0, size % 2))


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("kind", ["alone", "constant", "offset"])
def test_positional_encoding(kind, size):
    class Encoded(sl.Step):
        def __init__(self):
            super().__init__()
            self.encoding = memory.PositionalEncoding(size)
            self.index = memory.StepIndex()

        def step(self, x, offset):
            if kind == "alone":
                return torch.cat([x, self.encoding()], -1)
            position = torch.full_like(offset, 5) if kind == "constant" else self.index() + offset
            return torch.cat([x, self.encoding.at(position)], -1)

    x, offset = torch.randn(STEPS, BATCH, 2, requires_grad=True), torch.randint(0, 9, (STEPS, BATCH))
    step = Encoded()
    y, _ = sl.Loop(step)(x, offset, lengths=LENGTHS)
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            position = {"alone": t, "constant": 5, "offset": t + int(offset[t, b])}[kind]
            expected = torch.tensor(tensor2tensor(position, size), dtype=torch.float32)
            torch.testing.assert_close(y[t, b, 2:], expected, rtol=1e-5, atol=1e-5)
    agree(step, x, offset, lengths=LENGTHS)


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_self_attention_with_key_shift():
    """QKV per head, q scaled before both products; r is not per head, and the distance is clipped."""
    heads, key, value, clip = 2, 4, 6, 2
    attention = memory.CausalSelfAttention(heads, key_size=key, value_size=value, relative=clip).double()
    qkv = torch.randn(5, 2 * key + value, dtype=torch.float64)
    x = torch.randn(STEPS, BATCH, 5, dtype=torch.float64)

    class PerHead(sl.Step):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def step(self, x):
            parts = (x @ qkv).unflatten(-1, (heads, -1)).split([key // heads, key // heads, value // heads], -1)
            return self.attention(*[part.flatten(-2) for part in parts])

    y, _ = sl.Loop(PerHead())(x, lengths=LENGTHS)
    table = attention.relative_keys.detach().cpu().numpy()
    for b, length in enumerate(LENGTHS):
        split = (x[:length, b] @ qkv).reshape(int(length), heads, -1).cpu().numpy()
        q, k, v = np.split(split, [key // heads, 2 * (key // heads)], -1)
        q = q * (key // heads) ** -0.5
        for t in range(length):
            shift = table[np.clip(np.arange(t + 1) - t, -clip, clip) + clip]
            weights = softmax(np.einsum("hk,shk->hs", q[t], k[: t + 1]) + np.einsum("hk,sk->hs", q[t], shift))
            expected = np.einsum("hs,shv->hv", weights, v[: t + 1]).reshape(-1)
            torch.testing.assert_close(y[t, b].detach(), torch.tensor(expected))


def test_self_attention_over_a_history_with_relative_positions():
    """The same from its parts: CumConcat, relative positions, dot, softmax."""
    attention = memory.CausalSelfAttention(1, key_size=4, value_size=3, relative=2).double()

    class Parts(sl.Step):
        def __init__(self):
            super().__init__()
            self.keys, self.values = memory.History(), memory.History()
            self.positions = memory.RelativePositions(2)
            self.table = attention.relative_keys

        def step(self, q, k, v):
            past, shift = self.keys(k), self.table[self.positions()]
            q = q * 4**-0.5
            scores = torch.einsum("bk,bsk->bs", q, past.values) + torch.einsum("bk,bsk->bs", q, shift)
            weights = scores.masked_fill(~past.mask, float("-inf")).softmax(-1)
            return torch.einsum("bs,bsv->bv", weights, self.values(v).values)

    xs = [torch.randn(STEPS, BATCH, n, dtype=torch.float64, requires_grad=True) for n in (4, 4, 3)]
    parts = Parts()
    y, _ = sl.Loop(parts)(*xs, lengths=LENGTHS)
    torch.testing.assert_close(y, attention(*xs, lengths=LENGTHS)[0])
    agree(parts, *xs, backend="auto", lengths=LENGTHS)


@pytest.mark.parametrize("pooling", ["max", "average", "weighted"])
def test_two_d_lstm_pools_padded_positions_as_zeros(pooling):
    """The peer's max and weighted see the zeros behind a source; from pooling=None they are a line of torch."""
    lengths = torch.tensor([4, 2, 1])

    class Pooled(sl.Step):
        def __init__(self):
            super().__init__()
            self.lstm = memory.TwoDLSTM(5, 3, 4, pooling=None, bias=False)
            self.weight = torch.nn.Parameter(torch.randn(3, 4))

        def step(self, target, source, source_lengths):
            h = self.lstm(target, source=source, source_lengths=source_lengths)  # (B, S, H)
            if pooling == "max":
                return h.amax(1)
            if pooling == "average":
                return h.sum(1) / source_lengths.unsqueeze(-1)
            return torch.einsum("bs,bsn->bn", torch.einsum("bf,fn,bsn->bs", target, self.weight, h).softmax(-1), h)

    step = Pooled().double()
    target = torch.randn(STEPS, BATCH, 3, dtype=torch.float64, requires_grad=True)
    source = torch.randn(BATCH, 4, 5, dtype=torch.float64, requires_grad=True)
    given = {"source": source, "source_lengths": lengths}
    y, _ = sl.Loop(step)(target, **given)
    grid, _ = step.lstm(target, **given)
    assert not grid[:, 1, 2:].any()
    h, weight = grid.detach().cpu().numpy(), step.weight.detach().cpu().numpy()
    if pooling == "max":
        expected = h.max(2)
    elif pooling == "average":
        expected = h.sum(2) / lengths.cpu().numpy()[:, None]
    else:
        energies = np.einsum("tbf,fn,tbsn->tbs", target.detach().cpu().numpy(), weight, h)
        expected = np.einsum("tbs,tbsn->tbn", softmax(energies), h)
    torch.testing.assert_close(y.detach(), torch.tensor(expected))
    agree(step, target, backend="auto", **given)


def test_inner_recurrence_in_both_directions():
    """RecLayer with direction -1, and both concatenated, over a window inside of a loop."""

    class Both(sl.Step):
        def __init__(self):
            super().__init__()
            self.window = memory.Window(3)
            self.forwards = memory.SequenceRNN(sl.nn.LSTMCell(2, 3))
            self.backwards = memory.SequenceRNN(sl.nn.LSTMCell(2, 3), reverse=True)

        def step(self, x):
            frames = self.window(x)
            return torch.cat([self.forwards(frames), self.backwards(frames)], -1)

    step = Both()
    x = torch.randn(STEPS, BATCH, 2, requires_grad=True)
    y, _ = sl.Loop(step)(x, lengths=LENGTHS)
    reference = torch.nn.LSTM(2, 3, bidirectional=True)
    with torch.no_grad():
        for name, value in (*step.forwards.loop.step.named_parameters(),):
            getattr(reference, f"{name}_l0").copy_(value)
        for name, value in (*step.backwards.loop.step.named_parameters(),):
            getattr(reference, f"{name}_l0_reverse").copy_(value)
    padded = torch.cat([torch.zeros(3, BATCH, 2), x.detach()])
    for t in range(STEPS):
        valid = t < LENGTHS
        expected, _ = reference(padded[t : t + 4])
        torch.testing.assert_close(y[t, valid], expected.transpose(0, 1)[valid])
    agree(step, x, lengths=LENGTHS)


def test_running_sums_from_the_end():
    """CumsumLayer(reverse=True), which the peer has outside of loops only."""
    x = torch.randn(STEPS, BATCH, 2)
    y, _ = sl.Loop(memory.CumSum(), reverse=True)(x, lengths=LENGTHS)
    for b, length in enumerate(LENGTHS):
        expected = np.cumsum(x[:length, b].cpu().numpy()[::-1], 0)[::-1].copy()
        torch.testing.assert_close(y[:length, b], torch.tensor(expected))
        assert not y[length:, b].any()
