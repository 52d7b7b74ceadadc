"""The steps of test_stages_golden.py. Their line numbers stand in the golden texts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import steploop as sl


class LSTM(sl.Step):
    """One weight for the input and the state together, as many write it."""

    def __init__(self):
        super().__init__()
        self.gates = nn.Linear(3 + 4, 16)
        self.h, self.c = sl.State(4), sl.State(4)

    def step(self, x):
        i, f, g, o = self.gates(torch.cat([x, self.h.prev], 1)).chunk(4, 1)
        self.c.next = torch.sigmoid(f) * self.c.prev + torch.sigmoid(i) * torch.tanh(g)
        self.h.next = torch.sigmoid(o) * torch.tanh(self.c.next)
        return self.h.next


class Decoder(sl.Step):
    """Attention over a memory, whose keys are the same at every step."""

    def __init__(self):
        super().__init__()
        self.key, self.query, self.mix = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(5 + 4, 4)
        self.h = sl.State(4)

    def step(self, x, memory):
        energy = torch.tanh(self.key(memory) + self.query(self.h.prev)[:, None]).sum(2)
        context = torch.bmm(energy.softmax(1)[:, None], memory)[:, 0]
        self.h.next = torch.tanh(self.mix(torch.cat([context, x], 1)))
        return self.h.next


class TwoLoops(sl.Step):
    """The second loop reads the first one's state of the step before."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.low, self.high = sl.State(4), sl.State(4)

    def step(self, x):
        self.low.next = torch.tanh(self.a(self.low.prev) + x)
        self.high.next = torch.tanh(self.b(self.high.prev) + F.relu(self.low.prev))
        return self.high.next
