"""The step of the README. Its plan:  steploop explain examples/tagger.py"""

import torch
from torch import nn

import steploop as sl


class Tagger(sl.Step):
    """A plain recurrent layer and the scores of a tag for each step.

    step: x (B, inputs) -> (B, tags). The product of the concatenation is ONE matrix here; only its half that
    meets the state needs to be in the loop.
    """

    def __init__(self, inputs: int, units: int, tags: int):
        super().__init__()
        self.mix, self.head = nn.Linear(inputs + units, units), nn.Linear(units, tags)
        self.h = sl.State(units)

    def step(self, x):
        self.h.next = torch.tanh(self.mix(torch.cat([x, self.h.prev], -1)))
        return self.head(self.h.next)


def example():
    """What `steploop explain` runs: the step and its inputs, (T, B, inputs)."""
    return Tagger(8, 32, 5), torch.randn(100, 4, 8)


if __name__ == "__main__":
    step, xs = example()
    loop = sl.Loop(step)
    scores, state = loop(xs, lengths=torch.tensor([100, 60, 7, 0]))
    print(loop.plan(xs))
    print("scores", tuple(scores.shape), "state h", tuple(state["h"].shape))
