"""Memory that is used again: only when nobody can read it any more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steploop.compiler import blocks
from steploop.compiler.blocks import Block, Blocks, empty

SHAPE = (600, 1000)  # above blocks.LEAST
pytestmark = pytest.mark.skipif(blocks._ALONE is None, reason="this torch does not count references to memory")


@pytest.fixture(autouse=True)
def own_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "_blocks", Blocks(64 << 20))


def held_by(kind):
    """A tensor's address, and something that still refers to its memory."""
    tensor = empty(SHAPE, torch.float32)
    return tensor.data_ptr(), {
        "tensor": lambda: tensor, "view": lambda: tensor[3:, ::2], "array": lambda: tensor.numpy(),
        "storage": tensor.untyped_storage, "detached": tensor.detach, "bits": lambda: tensor.view(torch.int32),
        "dlpack": lambda: np.from_dlpack(tensor),
    }[kind]()  # fmt: skip


@pytest.mark.parametrize("kind", ["tensor", "view", "array", "storage", "detached", "bits", "dlpack"])
def test_memory_that_is_referred_to_stays(kind):
    address, held = held_by(kind)
    other = empty(SHAPE, torch.float32)
    assert other.data_ptr() != address
    del held
    assert empty(SHAPE, torch.float32).data_ptr() == address


def test_another_shape_and_dtype_of_about_the_size():
    address = empty(SHAPE, torch.float32).data_ptr()
    other = empty((290, 1000), torch.float64)
    assert other.data_ptr() == address and other.shape == (290, 1000) and other.is_contiguous()
    assert empty((100, 1000), torch.float64).data_ptr() != address


def test_shared_memory_is_not_used_again():
    tensor = empty(SHAPE, torch.float32).share_memory_()
    address = tensor.data_ptr()
    del tensor
    assert empty(SHAPE, torch.float32).data_ptr() != address


def test_resized_memory_is_not_used_again():
    tensor = empty(SHAPE, torch.float32)
    tensor.untyped_storage().resize_(16)
    del tensor
    assert empty(SHAPE, torch.float32).untyped_storage().nbytes() >= 600 * 1000 * 4


def test_no_more_than_the_limit_is_kept():
    kept = Blocks(3 << 20)
    for _ in range(5):
        kept.add(Block(torch.empty(1 << 18)))  # 1 MB each
    assert sum(b.size for b in kept.blocks if b.free()) <= 3 << 20


def test_what_is_kept_goes_on_request():
    empty(SHAPE, torch.float32)
    blocks.release()
    assert not blocks._blocks.blocks


def test_outputs_of_calls_are_not_overwritten():
    import steploop as sl

    layer = sl.nn.LSTM(8, 64)
    x = torch.randn(300, 32, 8)
    first, _ = layer(x)
    copy = first.detach().clone()
    for _ in range(3):
        second, _ = layer(-x)
        second.sum().backward()
    assert torch.equal(first, copy)
