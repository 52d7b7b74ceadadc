"""The command line: `steploop train`, `sample`, `compare`, `convert`, `explain`, `verify`, `bench`, `cache`, `doctor`.

One file per command; application.py lists them. What a command needs is imported inside it: `steploop --help` answers
at once, and typer is all that the commands need that train nothing.

Exit codes: 0, done; 1, `verify` found a difference; 2, something that the user can mend, told in one message.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..errors import SteploopError
from .messages import complain, of_a_file, packages_missing


def main(arguments: Sequence[str] | None = None) -> None:
    """The program `steploop`. Exit code 2 with a message, not a traceback, for what the user can mend."""
    try:
        from .application import application

        application()(args=arguments, prog_name="steploop")
    except SteploopError as error:
        sys.exit(complain(str(error)))
    except ModuleNotFoundError as error:
        missing = packages_missing(error)
        if missing is None:
            raise
        sys.exit(complain(missing))
    except OSError as error:
        sys.exit(complain(of_a_file(error)))
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error):
            raise
        sys.exit(complain("A checkpoint could not be written.\n  fix:      free space where --out is, then --resume"))
