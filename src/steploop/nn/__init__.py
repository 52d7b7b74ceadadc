"""Cells and layers. Each is an ordinary Step (or is run by one): nothing here has a fast path of its own.

Cells, one file each: RNNCell, LSTMCell, GRUCell, LayerNormLSTMCell.  Around cells: Stack, Residual, Dropout,
Zoneout, Bidirectional.  Over whole sequences, one above the other: Layers.  Drop-ins for torch.nn's layers: RNN, LSTM,
GRU.  Over a memory: `attention`, a package of its own; masked_softmax and the like look at the valid entries of an
inner axis.  convert: weights of other frameworks.
"""

from . import attention, convert
from .bidirectional import Bidirectional
from .dropout import Dropout
from .gru import GRUCell
from .layer_norm_lstm import LayerNormLSTMCell
from .layers import Layers
from .lstm import LSTMCell
from .masks import length_mask, masked_max, masked_mean, masked_softmax, masked_sum
from .residual import Residual
from .rnn import RNNCell
from .stack import Stack
from .torch_layers import GRU, LSTM, RNN
from .zoneout import Zoneout

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Bidirectional",
    "Dropout",
    "GRUCell",
    "LSTMCell",
    "LayerNormLSTMCell",
    "Layers",
    "RNNCell",
    "Residual",
    "Stack",
    "Zoneout",
    "attention",
    "convert",
    "length_mask",
    "masked_max",
    "masked_mean",
    "masked_softmax",
    "masked_sum",
]
