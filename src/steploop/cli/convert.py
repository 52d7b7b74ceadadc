"""`steploop convert tf1`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert_tf1(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT.npz", help="Arrays by TF1 name.")],
    to: Annotated[Path, typer.Option(help="The safetensors file to write: a model's state_dict.")],
    function: Annotated[str | None, typer.Option(help="TF's function, where its scope is not among the names.")] = None,
    scope: Annotated[str | None, typer.Option(help="The scope of the variables, if not the function's.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help='Names to leave out, "*/Adam*". Repeatable.')] = None,
) -> None:
    """A checkpoint of a tf.contrib.legacy_seq2seq model as the state_dict of a model of steploop.seq2seq.legacy.

    The file holds every variable under its name: numpy.savez(FILE, **{name: reader.get_tensor(name)}).
    """
    from ..seq2seq.tf_checkpoint import read, rows_of, save

    kept, left_out = read(checkpoint, ignore or [])
    model = save(kept, to, function, scope)
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"TF1 variables below {model.scope}")
    for heading in ("variable", "shape", "parameter"):
        table.add_column(heading, overflow="fold")
    for name, shape, parameter in rows_of(model):
        table.add_row(name.removeprefix(f"{model.scope}/"), shape, parameter)
    for name in left_out:
        table.add_row(name, "", "(left out)")
    console = Console()
    console.print(table)
    console.print(f"{type(model).__name__}, {len(kept)} variables: {to}", highlight=False, soft_wrap=True)
