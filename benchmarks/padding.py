"""Buckets, padding to the longest, and ragged loops on one data set: seconds and padding.

    python -m benchmarks.padding [--examples 2048] [--rounds 5]

The data: lines of Shakespeare's plays; a model reads a line, character by character, and is trained to give the
next. Every way sees the same examples once a round, forward and backward, and the ways take turns. `padding` is the
share of characters that a way computes and that are none.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steploop.recipes import texts
from steploop.seq2seq.buckets import bucket_by_length, lengths_of, pad_to_longest
from steploop.seq2seq.legacy import EmbeddingAttentionSeq2Seq, sequence_loss
from steploop.seq2seq.samplers import LengthBatchSampler
from steploop.seq2seq.tf_cells import GRUCell

SYMBOLS, GO, PAD = 256, 1, 0
BUCKETS = [(10, 10), (20, 20), (30, 30), (40, 40), (50, 50), (80, 80)]
Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Way:
    """name; batches(epoch) -> (source, target) as Padded; ragged: whether the loops are told the lengths."""

    name: str
    batches: Any
    ragged: bool


def dataset_of(text: str, count: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of lines that follow each other, as bytes, each of at most 80."""
    lines = [torch.tensor(list(line.strip().encode())) for line in text.splitlines()]
    pairs = [(a, b) for a, b in zip(lines, lines[1:]) if 0 < len(a) <= 80 and 0 < len(b) <= 79]
    chosen = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:count].tolist()
    end = torch.tensor([10])
    return [(pairs[k][0], torch.cat([pairs[k][1], end])) for k in chosen]


def ways_of(dataset: Sequence[Any], batch_size: int) -> list[Way]:
    """The ways that are compared."""
    buckets = bucket_by_length(dataset, BUCKETS, pad=PAD)
    in_buckets = buckets.sampler(batch_size)
    by_length = LengthBatchSampler(lengths_of(dataset), batch_size)
    at_random = LengthBatchSampler(lengths_of(dataset), batch_size, pool=1)

    def batches(sampler: Any, collate: Any) -> Any:
        def of(epoch: int) -> Iterator[Batch]:
            sampler.set_epoch(epoch)
            return (collate([dataset[k] for k in batch]) for batch in sampler)

        return of

    return [
        Way(f"{len(BUCKETS)} buckets", batches(in_buckets, buckets.collate), False),
        Way("padded to the longest, random batches", batches(at_random, pad_to_longest), False),
        Way("padded to the longest, batches by length", batches(by_length, pad_to_longest), False),
        Way("ragged loops, random batches", batches(at_random, pad_to_longest), True),
        Way("ragged loops, batches by length", batches(by_length, pad_to_longest), True),
    ]


def train(model: EmbeddingAttentionSeq2Seq, batch: Batch, ragged: bool) -> Tensor:
    """One forward and backward pass; the loss."""
    source, target = batch
    given = torch.cat([torch.full_like(target.values[:1], GO), target.values[:-1]])
    lengths = {"encoder_lengths": source.lengths, "decoder_lengths": target.lengths} if ragged else {}
    outputs, _ = model(source.values, given, **lengths)
    weights = (torch.arange(len(given))[:, None] < target.lengths).float()
    loss = sequence_loss(outputs, target.values, weights)
    model.zero_grad(set_to_none=True)
    loss.backward()
    return loss


def padding_of(way: Way, epoch: int) -> float:
    """The share of what a way computes that is padding."""
    if way.ragged:
        return 0.0
    filled = total = 0
    for batch in way.batches(epoch):
        for padded in batch:
            filled += int(padded.lengths.sum())
            total += padded.values.numel()
    return 1 - filled / total


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dataset = dataset_of(texts.shakespeare(), options.examples)
    ways = ways_of(dataset, options.batch)
    units = options.units
    model = EmbeddingAttentionSeq2Seq(GRUCell(units), SYMBOLS, SYMBOLS, units // 2)
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for epoch in range(options.rounds + 1):  # the first one builds what is built once, and is not counted
        for way in ways if epoch % 2 else ways[::-1]:
            prepared = list(way.batches(epoch))
            began = time.perf_counter()
            for batch in prepared:
                train(model, batch, way.ragged)
            if epoch:
                seconds[way.name].append(time.perf_counter() - began)
    first = seconds[ways[0].name]
    print("| | padding | seconds for all examples | of buckets |\n|---|---:|---:|---:|")
    for way in ways:
        times = seconds[way.name]
        ratio = statistics.median(t / f for t, f in zip(times, first))
        share = padding_of(way, 1)
        print(f"| {way.name} | {100 * share:.1f} % | {statistics.median(times):.1f} | {ratio:.2f}x |")


if __name__ == "__main__":
    main()
