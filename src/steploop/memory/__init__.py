"""Operations that remember. Each is a Step with states and, beside it, the same thing for a whole sequence.

Options are arguments of the constructor; sequences are called positionally, constants by keyword. Alone,
`op(xs, lengths=..., resets=..., state=...)` runs a whole sequence; inside a step, `self.op(x)` runs one step.
"""

from .base import Memory
from .cumulative import CumLogSumExp, CumMax, CumProd, CumSum
from .delay import Delay
from .step_index import StepIndex
from .window import Window

__all__ = [
    "CumLogSumExp",
    "CumMax",
    "CumProd",
    "CumSum",
    "Delay",
    "Memory",
    "StepIndex",
    "Window",
]
