"""steploop: write one time step in plain PyTorch; run the whole sequence at once."""

from . import memory, nn
from .compiler import operators as _operators  # noqa: F401 (a saved program names them)
from .errors import (
    BuildError,
    CarryError,
    DataError,
    InputError,
    MismatchError,
    OutsideError,
    StateError,
    StepError,
    SteploopError,
    UnsupportedError,
)
from .loop import Loop
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
    "InputError",
    "Loop",
    "MismatchError",
    "OutsideError",
    "Report",
    "State",
    "StateError",
    "States",
    "Step",
    "StepError",
    "SteploopError",
    "Stream",
    "UnsupportedError",
    "memory",
    "nn",
    "plan",
    "scan",
    "share",
    "unbatched",
    "verify",
]
