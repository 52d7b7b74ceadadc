"""Reinforcement learning with a memory: an agent is shown a cue, and must act on it some steps later.

    python examples/recall.py

Episodes of 3 to 6 steps follow each other in a row. While it acts, the policy runs as a stream, one step at a time; for
the loss the same policy runs over the whole piece at once. `resets` is True at the first step of an episode in both.
A2C: policy gradient with a value as the baseline (Mnih et al. 2016).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steploop as sl

CUES = 2


class Recall:
    """`rows` environments side by side. Seen (rows, CUES + 1): the cue at the first step; 1 in the last entry: act."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.left = torch.zeros(rows, dtype=torch.int64)  # steps to come in the episode; 0: it is over
        self.cue = torch.zeros(rows, dtype=torch.int64)

    def observe(self) -> tuple[Tensor, Tensor]:
        """What is seen, and which rows begin an episode (rows,) bool."""
        first = self.left == 0
        self.left = torch.where(first, torch.randint(3, 7, (self.rows,)), self.left)
        self.cue = torch.where(first, torch.randint(CUES, (self.rows,)), self.cue)
        shown = F.one_hot(self.cue, CUES) * first[:, None]
        return torch.cat([shown, (self.left == 1)[:, None]], 1).float(), first

    def act(self, action: Tensor) -> Tensor:
        """The reward (rows,): 1 or -1 where it was asked for, else 0."""
        asked = self.left == 1
        self.left = self.left - 1
        return torch.where(asked, 2.0 * (action == self.cue) - 1.0, 0.0)


class Policy(sl.Step):
    """Logits of the actions (B, CUES) and the value (B,)."""

    def __init__(self, units: int = 16) -> None:
        super().__init__()
        self.cell = sl.nn.GRUCell(CUES + 1, units)
        self.actor, self.critic = nn.Linear(units, CUES), nn.Linear(units, 1)

    def step(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(seen)
        return self.actor(h), self.critic(h).squeeze(-1)


def rollout(stream: sl.Stream, world: Recall, steps: int) -> list[Tensor]:
    """(seen, first, action, reward), each (steps, rows, ...)."""
    found = []
    for _ in range(steps):
        seen, first = world.observe()
        logits, _ = stream(seen, resets=first)
        action = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
        found.append((seen, first, action, world.act(action)))
    return [torch.stack(column) for column in zip(*found, strict=True)]


def returns(reward: Tensor, first: Tensor, discount: float = 0.9) -> Tensor:
    """Discounted rewards to come, within the episode: itself a loop, backwards in time. All (T, B)."""
    last = torch.cat([first[1:], torch.ones_like(first[:1])])  # the next step belongs to another episode

    def step(later: Tensor, now: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        gained, ends = now
        total = gained + discount * torch.where(ends, 0.0, later)
        return total, total

    return sl.scan(step, torch.zeros_like(reward[0]), (reward, last), reverse=True)[1]


def train(updates: int, rows: int = 32, steps: int = 24) -> list[float]:
    """The share of right answers in each update."""
    policy, world = Policy(), Recall(rows)
    loop, optimizer, right = sl.Loop(policy), torch.optim.Adam(policy.parameters(), 0.01), []
    stream = loop.stream(rows)
    for _ in range(updates):
        start = stream.state
        with torch.no_grad():
            seen, first, action, reward = rollout(stream, world, steps)
        (logits, value), _ = loop(seen, resets=first, state=start)
        target = returns(reward, first)
        gain = -F.cross_entropy(logits.flatten(0, 1), action.flatten(), reduction="none").view_as(value)
        surprise = target - value
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        loss = (surprise**2 - surprise.detach() * gain - 0.01 * entropy).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append((reward[reward != 0] > 0).float().mean().item())
    return right


def example() -> tuple[sl.Step, Tensor]:
    """What `steploop explain` runs: the step and its inputs."""
    return Policy(), torch.randn(24, 32, CUES + 1)


if __name__ == "__main__":
    torch.manual_seed(0)
    right = train(150)
    print(f"right answers: {sum(right[:10]) / 10:.0%} at first, {sum(right[-10:]) / 10:.0%} at the end")
