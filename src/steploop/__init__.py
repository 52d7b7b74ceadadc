"""steploop: write one time step in plain PyTorch; run the whole sequence at once."""

from . import memory, nn
from .errors import (
    BuildError,
    CarryError,
    DataError,
    InputError,
    MismatchError,
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

__version__ = "0.1.0"
