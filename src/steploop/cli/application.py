"""The commands, under their names. Each has a file of its own."""

from __future__ import annotations

import typer

from .charlm import compare, train_charlm
from .convert import convert_tf1
from .doctor import doctor
from .explain import explain
from .sample import sample


def application() -> typer.Typer:
    app = typer.Typer(
        help="Write one time step in plain PyTorch; run the whole sequence at once.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    recipes = typer.Typer(help="Train a model.", no_args_is_help=True)
    recipes.callback()(lambda: None)  # keeps `charlm` a command of its own while it is the only one
    recipes.command("charlm")(train_charlm)
    app.add_typer(recipes, name="train")
    conversions = typer.Typer(help="Convert checkpoints of other frameworks.", no_args_is_help=True)
    conversions.callback()(lambda: None)
    conversions.command("tf1")(convert_tf1)
    app.add_typer(conversions, name="convert")
    for command in (sample, compare, explain, doctor):
        app.command()(command)
    return app
