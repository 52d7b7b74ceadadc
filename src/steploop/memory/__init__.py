"""Operations that remember. Each is a Step with states and, beside it, the same thing for a whole sequence.

Options are arguments of the constructor; sequences are called positionally, constants by keyword. Alone,
`op(xs, lengths=..., resets=..., state=...)` runs a whole sequence; inside a step, `self.op(x)` runs one step.
"""

from .base import Memory, cleaned, final, is_valid
from .causal_conv1d import CausalConv1d
from .causal_self_attention import CausalSelfAttention
from .choice import Choice
from .cumulative import CumLogSumExp, CumMax, CumProd, CumSum
from .delay import Delay
from .edit_distance import EditDistance
from .history import History, Past, RelativePositions
from .masked import Masked, MaskedFrom, Unmask, compact, masked_from, unmask
from .ngram_scorer import NGramScorer
from .positional_encoding import PositionalEncoding
from .sequence_rnn import SequenceRNN
from .step_index import StepIndex
from .two_d_lstm import TwoDLSTM
from .window import Window

__all__ = [
    "CausalConv1d",
    "CausalSelfAttention",
    "Choice",
    "CumLogSumExp",
    "CumMax",
    "CumProd",
    "CumSum",
    "Delay",
    "EditDistance",
    "History",
    "Masked",
    "MaskedFrom",
    "Memory",
    "NGramScorer",
    "Past",
    "PositionalEncoding",
    "RelativePositions",
    "SequenceRNN",
    "StepIndex",
    "TwoDLSTM",
    "Unmask",
    "Window",
    "cleaned",
    "compact",
    "final",
    "is_valid",
    "masked_from",
    "unmask",
]
