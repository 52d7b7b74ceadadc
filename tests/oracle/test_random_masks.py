"""Dropout and zoneout in training, under every backend: the masks are read off the outputs, and a plain loop
with these masks gives the same values and gradients. So the backward uses the forward's random numbers."""

import pytest
import torch
from compiled_backends import COMPILED, may_decline

import steploop as sl

T, B, INPUT, H = 7, 5, 4, 6


class Watched(sl.Step):
    """A fresh mask, a mask per sequence and a zoned LSTM; everything on the way is returned."""

    def __init__(self):
        super().__init__()
        self.fresh = sl.nn.Dropout(0.3)
        self.same = sl.nn.Dropout(0.4, same_mask_every_step=True)
        self.zoned = sl.nn.Zoneout(sl.nn.LSTMCell(INPUT, H), {"h": 0.3, "c": 0.5})

    def step(self, x):
        fresh = self.fresh(x)
        same = self.same(fresh)
        y = self.zoned(same)
        cell = self.zoned.cell
        return {"fresh": fresh, "same": same, "y": y, "h": cell.h.latest, "c": cell.c.latest}


def make_step():
    torch.manual_seed(8)
    return Watched().double()


def replayed(step, x, seen, valid, resets):
    """h and c (T, B, H) of a plain loop with the masks that `seen` shows, zero at masked steps."""
    cell = step.zoned.cell
    zeros = h = c = torch.zeros(B, H, dtype=x.dtype)
    rows = {"h": [], "c": []}
    last = {"h": zeros, "c": zeros}
    for t in range(T):
        on, fresh_start = valid[t].unsqueeze(1), resets[t].unsqueeze(1)
        h0, c0 = (torch.where(fresh_start, zeros, v) for v in (h, c))
        before = {name: torch.where(fresh_start, zeros, v) for name, v in last.items()}
        inputs = torch.where(seen["same"][t] != 0, x[t] / 0.7 / 0.6, 0.0)
        new_h, new_c = torch.lstm_cell(
            inputs, (h0, c0), cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
        )
        # an entry that did not move was kept: a new value equal to the old one has probability zero
        new_h = torch.where(seen["h"][t] == before["h"], h0, new_h)
        new_c = torch.where(seen["c"][t] == before["c"], c0, new_c)
        h, c = torch.where(on, new_h, h), torch.where(on, new_c, c)
        last = {name: torch.where(on, seen[name][t].detach(), v) for name, v in last.items()}
        rows["h"].append(torch.where(on, h, zeros))
        rows["c"].append(torch.where(on, c, zeros))
    return {name: torch.stack(values) for name, values in rows.items()}


def run(step, backend, x, **call):
    with may_decline(backend):
        return sl.Loop(step, backend=backend)(x, **call)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("backend", ["reference", "auto", *COMPILED])
class TestMasksAreTheForwardsInTheBackward:
    def call(self, ragged):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(T, B, INPUT, dtype=torch.float64, generator=generator).requires_grad_()
        valid, resets = torch.ones(T, B, dtype=torch.bool), torch.zeros(T, B, dtype=torch.bool)
        if ragged:
            valid = torch.rand(T, B, generator=generator) < 0.8
            resets = torch.rand(T, B, generator=generator) < 0.2
        return x, valid, resets

    def test_values_and_gradients(self, backend, ragged):
        step = make_step()
        x, valid, resets = self.call(ragged)
        seen, state = run(step, backend, x, mask=valid, resets=resets)
        expected = replayed(step, x, seen, valid, resets)
        torch.testing.assert_close(seen["y"], expected["h"])
        torch.testing.assert_close(seen["c"], expected["c"])
        leaves = [x, *step.parameters()]
        cotangent = torch.randn(T, B, H, dtype=x.dtype)
        actual = torch.autograd.grad([seen["y"], seen["c"]], leaves, [cotangent, cotangent.flip(0)])
        wanted = torch.autograd.grad([expected["h"], expected["c"]], leaves, [cotangent, cotangent.flip(0)])
        torch.testing.assert_close(actual, wanted)
        assert all(g.abs().sum() > 0 for g in actual)

    def test_masks_are_random_where_they_should_be(self, backend, ragged):
        step = make_step()
        x, valid, resets = self.call(ragged)
        torch.manual_seed(0)
        seen, state = run(step, backend, x, mask=valid, resets=resets)
        torch.manual_seed(0)
        again, _ = run(step, backend, x, mask=valid, resets=resets)
        for name, value in seen.items():
            assert torch.equal(value, again[name]), f"{name} is not reproducible"
        other, _ = run(step, backend, x, mask=valid, resets=resets)
        for name in seen:
            assert not torch.equal(seen[name], other[name]), f"{name} is the same at every call"
        dropped = seen["fresh"] == 0
        assert not (dropped[valid] == dropped[valid][0]).all()
        # where the fresh mask lets an input through, the one mask of the sequence decides
        kept, known = seen["same"] != 0, (seen["fresh"] != 0) & valid.unsqueeze(-1)
        for b in range(B):
            starts = [0, *resets[:, b].nonzero().flatten().tolist(), T]
            for a, z in zip(starts, starts[1:], strict=False):
                part, of = kept[a:z, b], known[a:z, b]
                for feature in range(INPUT):
                    values = part[of[:, feature], feature]
                    assert values.numel() == 0 or (values == values[0]).all()


@pytest.mark.parametrize("backend", ["reference", "auto", *COMPILED])
def test_probabilities_and_modes_changed_later_are_seen(backend):
    """Nothing of an earlier call is stale: p, train and eval."""
    x = torch.ones(T, 40, INPUT)
    dropout = sl.nn.Dropout(0.0, same_mask_every_step=True)
    zoneout = sl.nn.Zoneout(sl.nn.RNNCell(INPUT, H), 0.0)
    loop = sl.Loop(sl.nn.Stack(dropout, zoneout), backend=backend)

    def outputs():
        with may_decline(backend):
            return loop(x)[0]

    plain = outputs()
    dropout.p = 1.0
    torch.testing.assert_close(outputs(), loop(torch.zeros_like(x))[0])
    dropout.p, zoneout.p = 0.0, 1.0
    assert (outputs() == 0).all()
    loop.eval()
    assert (outputs() == 0).all()
    zoneout.p = {"h": 0.5}
    torch.testing.assert_close(outputs()[0], plain[0] / 2)
    zoneout.p["h"] = 0.25
    torch.testing.assert_close(outputs()[0], plain[0] * 0.75)
    dropout.p = 0.5
    torch.testing.assert_close(outputs()[0], plain[0] * 0.75)
    loop.train()
    assert (outputs()[0] != outputs()[0]).any()
