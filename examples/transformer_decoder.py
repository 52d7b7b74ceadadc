"""A transformer decoder of two blocks, written as one step.

Its plan:  steploop explain examples/transformer_decoder.py

The same step runs three ways: over a whole sequence (each attention is one call), one token at a time in a
stream (each step looks at a preallocated history, so step t costs O(t)), and in a loop that feeds it its own
choices.
"""

import torch
from torch import nn
from torch.nn import functional as F

import steploop as sl


class Block(sl.Step):
    """x + attention(norm(x)), then x + feed-forward(norm(x)).  x (B, size) -> (B, size)."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(size), nn.LayerNorm(size)])
        self.attention = sl.memory.CausalSelfAttention(heads, size, output_size=size, rope=True)
        self.grow, self.shrink = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def step(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.shrink(F.gelu(self.grow(self.norms[1](x))))


class Decoder(sl.Step):
    """Scores of the next token: token (B,) -> (B, vocabulary)."""

    def __init__(self, vocabulary: int, size: int = 32, heads: int = 4, blocks: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.blocks = nn.ModuleList([Block(size, heads) for _ in range(blocks)])
        self.norm, self.out = nn.LayerNorm(size), nn.Linear(size, vocabulary)

    def step(self, token):
        x = self.embedding(token)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


class Speaker(sl.Step):
    """A decoder that goes on from its own choices: () -> scores (B, vocabulary), label (B,)."""

    def __init__(self, decoder: Decoder, start: int = 0):
        super().__init__()
        self.decoder, self.choice = decoder, sl.memory.Choice(start)

    def step(self, target=None):
        scores = self.decoder(self.choice.previous())
        return scores, self.choice(scores, target)


def three_ways(decoder: Decoder, steps: int = 24, batch: int = 2):
    """The same scores (T, B, vocabulary): in a loop over its own choices, for all steps, in a stream."""
    with torch.no_grad():
        (spoken, labels), _ = Speaker(decoder)(steps=steps, batch_size=batch)
        tokens = torch.cat([torch.zeros_like(labels[:1]), labels[:-1]])
        whole, _ = decoder(tokens)
        stream = sl.Loop(decoder).stream(batch)
        streamed = torch.stack([stream(token) for token in tokens])
    return spoken, whole, streamed


def example():
    """What `steploop explain` runs: the step and its inputs, (T, B)."""
    return Decoder(50), torch.randint(0, 50, (20, 4))


if __name__ == "__main__":
    torch.manual_seed(0)
    spoken, whole, streamed = three_ways(Decoder(50))
    print("in a loop against the whole sequence:", (spoken - whole).abs().max().item())
    print("in a stream against the whole sequence:", (streamed - whole).abs().max().item())
