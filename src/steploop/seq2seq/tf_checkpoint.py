"""A TF1 checkpoint's arrays in a file, and the state_dict of the model they make. For `steploop convert tf1`."""

from __future__ import annotations

import fnmatch
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError
from .legacy.decoders import Model
from .legacy.from_checkpoint import ANY_PROJECTION, from_tf_variables


def read(path: Path, ignore: Sequence[str] = ()) -> tuple[dict[str, np.ndarray], list[str]]:
    """(arrays by name, names that were left out). ignore: patterns of names, as in a shell.

    Raises DataError for a file that is not there, or holds no named arrays.
    """
    if not path.is_file():
        raise DataError(f"No such file: {path}")
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("one array without a name")
        with archive:
            found = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} holds no arrays by name: {error}\n"
            "  expected: an .npz file, numpy.savez(path, **{name: reader.get_tensor(name) for name in names})"
        ) from None
    left_out = [name for name in found if any(fnmatch.fnmatch(name, pattern) for pattern in ignore)]
    return {name: value for name, value in found.items() if name not in left_out}, left_out


def save(variables: Mapping[str, np.ndarray], to: Path, function: str | None, scope: str | None) -> Model:
    """Write the state_dict of the model that the variables make, and return the model."""
    from safetensors.torch import save_file

    model = from_tf_variables(variables, function, scope, output_projection=ANY_PROJECTION)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    part = to.with_name(to.name + ".part")
    save_file(tensors, part, {"format": "pt", "model": type(model).__name__, "scope": model.scope})
    part.replace(to)
    return model


def rows_of(model: Model) -> Iterator[tuple[str, str, str]]:
    """(TF1 name, shape, parameter) of every variable."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for variable in model.tf_variables(model.scope):
        part = variable.view(variable.parameter.detach()).numel() < variable.parameter.numel()
        parameter = names[id(variable.parameter)] + (" (a part)" if part else "")
        yield variable.name, " x ".join(map(str, variable.shape)), parameter
