"""model_with_buckets: one model over several bucket sizes, and their losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ...errors import InputError, describe, message
from ..losses import SoftmaxLoss, sequence_loss, sequence_loss_by_example


class ModelWithBuckets(nn.Module):
    """tf.contrib.legacy_seq2seq.model_with_buckets.

    buckets: pairs (encoder size, decoder size), the last one the largest.
    seq2seq: a model or function (encoder_inputs, decoder_inputs) -> (outputs, state). All buckets share it, and
        nothing is built for a bucket: a Loop runs any length.
    softmax_loss_function: see sequence_loss.
    per_example_loss: losses are (B,), one for each example, instead of their mean.

    model(encoder_inputs, decoder_inputs, targets, weights, bucket=None) -> (outputs, losses): lists with one entry
    per bucket, of the first steps of what is given. bucket: only this one is computed (what a TF1 program
    does when it fetches one bucket's loss); the lists then have one entry.

    Raises InputError (a ValueError) for inputs shorter than the last bucket, and for malformed buckets.
    """

    def __init__(
        self,
        buckets: Sequence[tuple[int, int]],
        seq2seq: Callable[[Any, Any], tuple[Any, Any]],
        softmax_loss_function: SoftmaxLoss | None = None,
        per_example_loss: bool = False,
    ) -> None:
        super().__init__()
        self.buckets = checked_buckets(buckets)
        self.seq2seq = seq2seq
        self.softmax_loss_function = softmax_loss_function
        self.per_example_loss = per_example_loss

    def forward(
        self,
        encoder_inputs: Any,
        decoder_inputs: Any,
        targets: Any,
        weights: Any,
        *,
        bucket: int | None = None,
    ) -> tuple[list[Any], list[Tensor]]:
        largest = self.buckets[-1 if bucket is None else bucket]
        given = {"encoder_inputs": encoder_inputs, "targets": targets, "weights": weights}
        for name, value in given.items():
            least = largest[0] if name == "encoder_inputs" else largest[1]
            if len(value) < least:
                raise InputError(
                    message(
                        f"{name} is shorter than the {'last ' if bucket is None else ''}bucket {largest}.",
                        expected=f"{least} steps or more",
                        found=f"{len(value)} steps",
                        fix="pad it, or call model(..., bucket=k) with the bucket that the batch is for",
                    )
                )
        loss = sequence_loss_by_example if self.per_example_loss else sequence_loss
        outputs, losses = [], []
        for source, target in self.buckets if bucket is None else [largest]:
            output, _ = self.seq2seq(encoder_inputs[:source], decoder_inputs[:target])
            outputs.append(output)
            losses.append(
                loss(
                    output,
                    targets[:target],
                    weights[:target],
                    softmax_loss_function=self.softmax_loss_function,
                )
            )
        return outputs, losses

    def extra_repr(self) -> str:
        return f"buckets={self.buckets}"


def checked_buckets(buckets: Any) -> list[tuple[int, int]]:
    """Pairs of whole numbers. InputError for anything else."""
    pairs = [tuple(bucket) for bucket in buckets] if isinstance(buckets, (list, tuple)) else []
    if pairs and all(len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair) for pair in pairs):
        return pairs
    raise InputError(
        message(
            "buckets are pairs of sizes.",
            expected="[(5, 10), (10, 15), ...]: encoder and decoder steps",
            found=describe(buckets) if not pairs else repr(buckets),
        )
    )
