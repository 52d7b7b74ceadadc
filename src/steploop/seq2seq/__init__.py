"""Sequence-to-sequence models, their losses and their data.

legacy: tf.contrib.legacy_seq2seq.  tf_cells: TF1's cells, as Steps.  losses: of a sequence.
buckets, samplers: batches of unequal lengths.  lnlstm: OpenAI Baselines' LSTMs with masks.
"""

from . import buckets, legacy, lnlstm, losses, samplers, tf_cells

__all__ = ["buckets", "legacy", "lnlstm", "losses", "samplers", "tf_cells"]
