"""Sequence-to-sequence models. `legacy`: tf.contrib.legacy_seq2seq; `tf_cells`: TF1's cells, as Steps."""

from . import legacy, tf_cells

__all__ = ["legacy", "tf_cells"]
