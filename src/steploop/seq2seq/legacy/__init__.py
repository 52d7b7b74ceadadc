"""tf.contrib.legacy_seq2seq, on Step and Loop: one definition for any length, nothing unrolled.

    rnn_decoder                 RNNDecoder
    basic_rnn_seq2seq           BasicRNNSeq2Seq
    tied_rnn_seq2seq            TiedRNNSeq2Seq
    embedding_rnn_decoder       EmbeddingRNNDecoder
    embedding_rnn_seq2seq       EmbeddingRNNSeq2Seq
    embedding_tied_rnn_seq2seq  EmbeddingTiedRNNSeq2Seq
    attention_decoder           AttentionDecoder
    embedding_attention_decoder EmbeddingAttentionDecoder
    embedding_attention_seq2seq EmbeddingAttentionSeq2Seq
    one2many_rnn_seq2seq        One2ManyRNNSeq2Seq
    model_with_buckets          ModelWithBuckets
    sequence_loss_by_example, sequence_loss, _extract_argmax_and_embed: functions of the same name

A constructor takes TF's arguments by TF's names, without the inputs; calling the module takes those. Checkpoints
of TF1 fill a model by `load_tf_variables`; `from_tf_variables` makes the model that a checkpoint is of. The code
that was read: tensorflow/contrib/legacy_seq2seq/python/ops/seq2seq.py of TF 1.15.
"""

from ..losses import sequence_loss, sequence_loss_by_example
from .attention import AttentionDecoder, EmbeddingAttentionDecoder
from .decoders import EmbeddingRNNDecoder, RNNDecoder
from .feeding import extract_argmax_and_embed
from .from_checkpoint import from_tf_variables
from .model_with_buckets import ModelWithBuckets
from .models import (
    BasicRNNSeq2Seq,
    EmbeddingAttentionSeq2Seq,
    EmbeddingRNNSeq2Seq,
    EmbeddingTiedRNNSeq2Seq,
    TiedRNNSeq2Seq,
)
from .one2many import One2ManyRNNSeq2Seq

__all__ = [
    "AttentionDecoder",
    "BasicRNNSeq2Seq",
    "EmbeddingAttentionDecoder",
    "EmbeddingAttentionSeq2Seq",
    "EmbeddingRNNDecoder",
    "EmbeddingRNNSeq2Seq",
    "EmbeddingTiedRNNSeq2Seq",
    "ModelWithBuckets",
    "One2ManyRNNSeq2Seq",
    "RNNDecoder",
    "TiedRNNSeq2Seq",
    "extract_argmax_and_embed",
    "from_tf_variables",
    "sequence_loss",
    "sequence_loss_by_example",
]
