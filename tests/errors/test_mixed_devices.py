"""Tensors of several devices in one call are refused by name. (Fake tensors say that they are on a GPU.)"""

from __future__ import annotations

import re
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import steploop as sl


@contextmanager
def refused(*parts):
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(sl.InputError) as error:
            yield
    for part in parts:
        assert re.search(part, str(error.value)), str(error.value)


def cuda(*shape):
    return torch.empty(*shape, device="cuda")


class Cell(sl.Step):
    def __init__(self):
        super().__init__()
        self.h, self.mix = sl.State(4), nn.Linear(3, 4)

    def step(self, x, *, bias=None):
        self.h.next = torch.tanh(self.mix(x) + self.h.prev)
        return self.h.next if bias is None else self.h.next + bias


@pytest.mark.parametrize("backend", ["reference", "eager", "auto"])
def test_weights_elsewhere(backend):
    fix = r'step.to\("cuda:0"\), or x.to\("cpu"\)'
    with refused("tensors on cuda:0", "closes over on cpu", r"test_mixed_devices.py:\d+", fix):
        sl.Loop(Cell(), backend=backend)(cuda(5, 2, 3))


def test_a_state_elsewhere():
    with refused("x on cpu, h on cuda:0", r'fix: +state.to\("cpu"\)'):
        sl.Loop(Cell())(torch.empty(5, 2, 3), state={"h": cuda(2, 4)})


def test_a_constant_elsewhere():
    with refused("x on cpu, h on cpu, bias on cuda:0", r'fix: +bias.to\("cpu"\)'):
        sl.Loop(Cell())(torch.empty(5, 2, 3), bias=cuda(2, 4))


def test_a_sequence_elsewhere():
    with refused(r"\['a'\] on cpu, x\['b'\] on cuda:0", r'fix: +x.*.to\("cpu"\)'):
        sl.scan(lambda c, x: (c, x["a"] + x["b"]), torch.zeros(2), {"a": torch.empty(3, 2), "b": cuda(3, 2)})


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_what_the_step_makes_itself_elsewhere(backend):
    def step(c, x):
        return c + x * torch.ones(2), c

    with refused(r"device=x.device", rf"test_mixed_devices.py:{step.__code__.co_firstlineno + 1}"):
        sl.scan(step, cuda(2), cuda(3, 2), backend=backend)


def test_a_stream_elsewhere():
    with refused("x on cuda:0, h on cpu", r'x.to\("cpu"\)'):
        sl.Loop(Cell()).stream(2)(cuda(2, 3))


def test_a_plan_elsewhere():
    with refused("several devices"):
        sl.Loop(Cell()).plan(cuda(5, 2, 3))


def test_other_errors_of_torch_stay_as_they_are():
    with pytest.raises(RuntimeError, match="size of tensor"):
        sl.scan(lambda c, x: (c, c + torch.ones(5)), torch.zeros(2), torch.zeros(3, 2), backend="reference")
