"""Dropout: the share that is dropped, fresh masks, one mask per sequence, eval mode, seeds."""

import pytest
import torch

import steploop as sl
from steploop.nn.dropout import hashed_mask

T, B, F = 6, 50, 40


def run(dropout, x=None, **call):
    x = torch.ones(T, B, F) if x is None else x
    return sl.Loop(dropout, backend="reference")(x, **call)


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0])
def test_values_and_share(p, same):
    outputs, _ = run(sl.nn.Dropout(p, same_mask_every_step=same))
    kept = outputs != 0
    if p < 1.0:
        torch.testing.assert_close(outputs[kept], torch.full_like(outputs[kept], 1 / (1 - p)))
    # B * F independent draws at least
    deviation = (p * (1 - p) / (B * F)) ** 0.5
    assert abs(1 - kept.double().mean().item() - p) <= 4 * deviation


@pytest.mark.parametrize("same", [False, True])
def test_eval_mode_is_the_identity(same):
    x = torch.randn(T, B, F)
    dropout = sl.nn.Dropout(0.5, same_mask_every_step=same).eval()
    assert torch.equal(run(dropout, x)[0], x)


def test_a_fresh_mask_at_every_step():
    kept = run(sl.nn.Dropout(0.5))[0] != 0
    for t in range(1, T):
        assert 0.4 < (kept[t] == kept[0]).double().mean() < 0.6


class TestOneMaskPerSequence:
    def dropout(self, p=0.5):
        return sl.nn.Dropout(p, same_mask_every_step=True)

    def test_same_at_every_step_and_another_in_every_row(self):
        kept = run(self.dropout())[0] != 0
        assert (kept == kept[0]).all()
        agreement = (kept[0].unsqueeze(0) == kept[0].unsqueeze(1)).double().mean(-1)
        off_diagonal = agreement[~torch.eye(B, dtype=torch.bool)]
        assert off_diagonal.max() < 0.9 and abs(off_diagonal.mean() - 0.5) < 0.02

    def test_another_mask_in_another_call(self):
        dropout = self.dropout()
        assert not torch.equal(run(dropout)[0], run(dropout)[0])

    def test_reproducible_for_a_seed(self):
        torch.manual_seed(3)
        first, _ = run(self.dropout())
        torch.manual_seed(3)
        assert torch.equal(run(self.dropout())[0], first)

    def test_the_returned_state_carries_the_mask_on(self):
        dropout = self.dropout()
        first, state = run(dropout)
        assert torch.equal(run(dropout, state=state)[0], first)

    def test_a_reset_draws_a_new_mask(self):
        resets = torch.zeros(T, B, dtype=torch.bool)
        resets[3, :25] = True
        kept = run(self.dropout(), resets=resets)[0] != 0
        assert (kept[:3] == kept[0]).all() and (kept[3:] == kept[3]).all()
        assert torch.equal(kept[3, 25:], kept[0, 25:])
        assert 0.4 < (kept[3, :25] == kept[0, :25]).double().mean() < 0.6

    def test_masked_steps_change_nothing(self):
        mask = torch.rand(T, B) < 0.5
        outputs, state = run(self.dropout(), mask=mask)
        for b in range(B):
            rows = (outputs[:, b] != 0)[mask[:, b]]
            assert (rows == rows[:1]).all()
            assert (state["seed"][b] != 0) == mask[:, b].any()

    def test_any_feature_shape_and_dtype(self):
        for shape, dtype in [((), torch.float32), ((4, 5), torch.float64), ((8,), torch.bfloat16)]:
            outputs, _ = run(self.dropout(), torch.ones(T, B, *shape, dtype=dtype))
            assert outputs.shape == (T, B, *shape) and outputs.dtype == dtype
            assert (outputs == outputs[0]).all() and (outputs == 0).any() and (outputs != 0).any()

    def test_gradients_follow_the_mask(self):
        x = torch.randn(T, B, F, requires_grad=True)
        outputs, _ = run(self.dropout(0.3), x)
        outputs.sum().backward()
        torch.testing.assert_close(x.grad, (outputs != 0) / 0.7)

    def test_two_of_them_are_independent(self):
        stack = sl.nn.Stack(self.dropout(), self.dropout())
        share = (run(stack)[0] == 0).double().mean().item()
        assert abs(share - 0.75) < 0.05


def test_the_hash_is_as_good_as_random():
    """Features, and rows with neighbouring seeds, are uncorrelated; shares are right everywhere."""
    seeds = torch.cat([torch.arange(1, 2001), torch.arange(1, 2001) << 31]).unsqueeze(1)
    kept = hashed_mask(seeds, (50,), 0.7).double()
    assert (kept.mean(0) - 0.7).abs().max() < 4.5 * (0.21 / 4000) ** 0.5
    assert (kept.mean(1) - 0.7).abs().max() < 4.5 * (0.21 / 50) ** 0.5
    for table in (kept.T, kept[:50]):
        correlation = torch.corrcoef(table) - torch.eye(50)
        assert abs(correlation.std().item() * table.shape[1] ** 0.5 - 1) < 0.12


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_p_is_a_probability(p):
    with pytest.raises(ValueError, match=rf"probability in \[0, 1\], got {p}"):
        sl.nn.Dropout(p)
