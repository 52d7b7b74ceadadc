"""The commands, under their names. Each has a file of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from .bench import bench
from .cache import cache
from .charlm import compare, train_charlm
from .convert import convert_tf1
from .doctor import doctor
from .explain import explain
from .g2p import evaluate_g2p, g2p, train_g2p
from .sample import sample
from .verify import verify


def application() -> typer.Typer:
    app = typer.Typer(
        help="Write one time step in plain PyTorch; run the whole sequence at once.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback(help=app.info.help)(_program)
    recipes = typer.Typer(help="Train a model.", no_args_is_help=True)
    recipes.command("charlm")(train_charlm)
    recipes.command("g2p")(train_g2p)
    app.add_typer(recipes, name="train")
    evaluations = typer.Typer(help="Tell how good a model is.", no_args_is_help=True)
    evaluations.callback()(lambda: None)  # keeps `g2p` a command of its own while it is the only one
    evaluations.command("g2p")(evaluate_g2p)
    app.add_typer(evaluations, name="evaluate")
    conversions = typer.Typer(help="Convert checkpoints of other frameworks.", no_args_is_help=True)
    conversions.callback()(lambda: None)
    conversions.command("tf1")(convert_tf1)
    app.add_typer(conversions, name="convert")
    for command in (sample, compare, g2p, explain, verify, bench, cache, doctor):
        app.command()(command)
    return app


def _tell_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"steploop {__version__}")
        raise typer.Exit()


def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands before the commands; --version is all of it."""
