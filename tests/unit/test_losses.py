"""sequence_loss and sequence_loss_by_example: TF's numbers and conventions, and errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import steploop as sl
from steploop.seq2seq.losses import sequence_loss, sequence_loss_by_example


def given():
    """Of TF's own kernel test: 3 steps, logits i + 0.5, targets i, weights 1."""
    logits = [torch.full((2, 5), i + 0.5) for i in range(3)]
    return logits, [torch.full((2,), i, dtype=torch.int32) for i in range(3)], [torch.ones(2)] * 3


def test_the_numbers_of_tfs_kernel_test():
    assert sequence_loss(*given()).item() == pytest.approx(1.60944, abs=1e-5)
    per_example = sequence_loss_by_example(*given(), average_across_timesteps=False)
    assert per_example.tolist() == pytest.approx([4.828314] * 2, abs=1e-5)
    neither = sequence_loss(*given(), average_across_timesteps=False, average_across_batch=False)
    assert neither.item() == pytest.approx(9.656628, abs=1e-5)
    by_batch = sequence_loss(*given(), average_across_timesteps=False)
    assert by_batch.item() == pytest.approx(4.828314, abs=1e-5)


def test_lists_and_tensors_are_the_same():
    listed = given()
    tensors = [torch.stack(part) for part in listed]
    assert torch.equal(sequence_loss(*listed), sequence_loss(*tensors))


def test_a_mean_of_means_not_of_tokens_and_zero_without_weight():
    logits, targets = torch.randn(4, 3, 5, requires_grad=True), torch.randint(5, (4, 3))
    weights = torch.tensor([[1.0, 1, 0], [1, 0, 0], [1, 0, 0], [0.5, 0, 0]])
    ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").reshape(4, 3)
    expected = [(ce[:, 0] * weights[:, 0]).sum() / 3.5, ce[0, 1], torch.tensor(0.0)]
    found = sequence_loss_by_example(logits, targets, weights)
    torch.testing.assert_close(found, torch.stack(expected))
    torch.testing.assert_close(sequence_loss(logits, targets, weights), torch.stack(expected).sum() / 3)
    sequence_loss(logits, targets, weights).backward()
    assert logits.grad.isfinite().all() and not logits.grad[:, 2].any()


def test_a_function_of_ones_own_gets_its_arguments_by_name():
    seen = {}

    def loss(labels, logits):
        seen.update(labels=labels, logits=logits)
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)

    logits, targets, weights = given()
    found = sequence_loss(logits, targets, weights, softmax_loss_function=loss)
    assert seen["logits"].shape == (6, 5) and seen["labels"].tolist() == [0, 0, 1, 1, 2, 2]
    assert found.item() == pytest.approx(1.60944, abs=1e-5)
    with pytest.raises(sl.InputError, match="one loss per row"):
        sequence_loss(logits, targets, weights, softmax_loss_function=lambda labels, logits: logits.sum())


def test_errors():
    logits, targets, weights = given()
    for short in ((logits[:2], targets, weights), (logits, targets[:2], weights), (logits, targets, weights[:1])):
        with pytest.raises(ValueError, match="same number of steps"):
            sequence_loss(*short)
    with pytest.raises(sl.InputError, match="empty list"):
        sequence_loss([], [], [])
    with pytest.raises(sl.InputError, match=r"logits \(T, B, V\)"):
        sequence_loss(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2))
