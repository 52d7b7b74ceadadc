"""steploop: write one time step in plain PyTorch; run the whole sequence at once."""

from . import memory, nn, search, seq2seq, view
from .compiler import operators as _operators  # noqa: F401 (a saved program names them)
from .errors import (
    BuildError,
    CarryError,
    DataError,
    DivisionError,
    InputError,
    MismatchError,
    OutsideError,
    SingularError,
    StateError,
    StepError,
    SteploopError,
    UnsupportedError,
)
from .loop import Loop
from .nn import length_mask
from .operation import register_operation
from .scan import plan, scan
from .share import share
from .state import State
from .states import States
from .step import Step, unbatched
from .stream import Stream
from .verify import Report, verify

__version__ = "0.1.0"

__all__ = [
    "BuildError",
    "CarryError",
    "DataError",
    "DivisionError",
    "InputError",
    "Loop",
    "MismatchError",
    "OutsideError",
    "SingularError",
    "Report",
    "State",
    "StateError",
    "States",
    "Step",
    "StepError",
    "SteploopError",
    "Stream",
    "UnsupportedError",
    "length_mask",
    "memory",
    "nn",
    "plan",
    "register_operation",
    "scan",
    "search",
    "seq2seq",
    "share",
    "unbatched",
    "verify",
    "view",
]


def __dir__() -> list[str]:
    """The public names: what `dir(steploop)` and completion show."""
    return sorted(__all__)
