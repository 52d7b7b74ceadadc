"""Two processes with half of the batch each (DistributedDataParallel, gloo) get the gradients of one with all of it."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
from torch import nn

import steploop as sl

if not (hasattr(os, "fork") and torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("gloo and os.fork are needed", allow_module_level=True)

T, B, INPUT, H = 6, 4, 3, 5
LENGTHS = torch.tensor([6, 1, 3, 5])


class Model(nn.Module):
    def __init__(self, backend: str):
        super().__init__()
        torch.manual_seed(0)
        self.loop = sl.Loop(sl.nn.Stack(sl.nn.GRUCell(INPUT, H), nn.Linear(H, 2)), backend=backend)
        self.layers = sl.nn.Layers(
            sl.nn.Bidirectional(sl.nn.RNNCell(2, H), sl.nn.RNNCell(2, H), backend=backend), backend=backend
        )

    def forward(self, xs, lengths):
        outputs, _ = self.loop(xs, lengths=lengths)
        return self.layers(outputs, lengths=lengths)[0]


def gradients(model: nn.Module, xs: torch.Tensor, lengths: torch.Tensor, share: float) -> list[torch.Tensor]:
    """Of the mean over rows of each row's sum; share: how much of the batch these rows are."""
    model.zero_grad()
    (model(xs, lengths).square().sum() / (B * share)).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def in_process(rank: int, folder: str, backend: str, xs: torch.Tensor) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(os.path.join(folder, "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    model = nn.parallel.DistributedDataParallel(Model(backend))
    found = []
    for batch in xs:  # the second call goes a shorter way than the first
        rows = slice(rank, None, 2)
        found.append(gradients(model, batch[:, rows], LENGTHS[rows], 0.5))
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", ["eager"])
def test_gradients_are_those_of_the_joint_batch(backend, tmp_path):
    xs = torch.randn(2, T, B, INPUT, generator=torch.Generator().manual_seed(1))
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            code = 1
            try:
                in_process(rank, str(tmp_path), backend, xs)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    model = Model("reference")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for number, batch in enumerate(xs):
        expected = gradients(model, batch, LENGTHS, 1.0)
        for found in ranks:
            torch.testing.assert_close(found[number], expected, rtol=1e-4, atol=1e-6)
