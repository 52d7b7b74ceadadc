"""The checks on what a call is given: sequences, constants, lengths, mask and resets.

Nothing here reads a shape as a Python integer, so that a loop can run inside a step that is being captured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import torchscript
from .errors import InputError, describe, message
from .kinds import refuse_layout
from .step import Unbatched
from .tree import Structure, flatten, flatten_arguments


def sequences(xs: tuple[Any, ...]) -> tuple[list[Tensor], Structure]:
    """The positional arguments' tensors. InputError for an array, or a PackedSequence in a pytree."""
    tensors, structure = flatten_arguments(xs)
    check_plain(structure, "a sequence")
    for tensor in tensors:
        if tensor.is_nested:
            refuse_layout(tensor, "x")
    if len(tensors) > len(xs):
        _no_nested_packed(xs)
    return tensors, structure


def check_plain(structure: Structure, what: str) -> None:
    """InputError if there is a NumPy array where a tensor should be; it would be taken for a fixed value.

    what: "a sequence", or "a constant": then it is named.
    """
    if structure.count == len(structure.leaves):
        return
    for i, leaf in enumerate(structure.leaves):
        torchscript.refuse_proxy(leaf)
        if hasattr(leaf, "__array__") and not isinstance(leaf, (Tensor, bool, int, float)):
            raise InputError(
                message(
                    f"A NumPy array was given as {what}{_named(structure, i) if what == 'a constant' else ''}.",
                    expected="a tensor",
                    found=describe(leaf),
                    fix="torch.as_tensor(array)",
                )
            )


def _named(structure: Structure, leaf: int) -> str:
    """ " `memory['keys']`", the name of a leaf among constants."""
    name = structure.leaf_names("")[leaf][2:].replace("']", "", 1)
    return f" `{name}`"


def _no_nested_packed(xs: tuple[Any, ...]) -> None:
    stack = list(xs)
    while stack:
        item = stack.pop()
        if isinstance(item, PackedSequence):
            raise InputError(
                message(
                    "A PackedSequence stands inside a tuple, list or dict.",
                    expected="PackedSequences as positional arguments of their own",
                    fix="loop(packed_a, packed_b)",
                )
            )
        stack.extend(item.values() if isinstance(item, dict) else item if isinstance(item, (tuple, list)) else ())


def constant_leaves(constants: dict[str, Any]) -> tuple[list[Tensor], Structure, list[bool], dict[str, Any]]:
    """(tensors, structure, whether each is batched, the constants without their `unbatched` marks)."""
    if not constants:
        return [], _NO_CONSTANTS, [], constants
    batched: list[bool] = []
    plain: dict[str, Any] = {}
    for name in sorted(constants):
        plain[name] = _without_marks(constants[name], name, batched)
    tensors, structure = flatten(plain)
    check_plain(structure, "a constant")
    return tensors, structure, batched, plain


_NO_CONSTANTS = flatten({})[1]


def _without_marks(value: Any, name: str, batched: list[bool]) -> Any:
    if isinstance(value, Tensor):
        batched.append(True)
        return value
    if isinstance(value, Unbatched):
        batched.extend([False] * len(flatten(value.tree)[0]))
        return value.tree
    leaves, spec = pytree.tree_flatten(value)
    return pytree.tree_unflatten([_leaf_without_mark(leaf, name, batched) for leaf in leaves], spec)


def _leaf_without_mark(leaf: Any, name: str, batched: list[bool]) -> Any:
    return _without_marks(leaf, name, batched) if isinstance(leaf, (Tensor, Unbatched)) else leaf


def time_and_batch(xs: list[Tensor], names: list[str], batch_first: bool) -> tuple[Any, Any]:
    """T and B of time-major sequences; (None, None) without any. InputError where they differ."""
    first = None
    for x, name in zip(xs, names, strict=False):
        if x.dim() < 2:
            axes = "(B, T, ...)" if batch_first else "(T, B, ...)"
            raise InputError(
                message(
                    f"The sequence {name} has no time and batch axes.",
                    expected=f"{axes}, at least two axes",
                    found=describe(x),
                    fix="x.unsqueeze(1) adds a batch axis of one row"
                    if x.dim() == 1
                    else "a value that is the same at every step is a constant: pass it by keyword",
                )
            )
        if first is None:
            first = x
        elif x.shape[0] != first.shape[0] or x.shape[1] != first.shape[1]:
            raise InputError(
                message(
                    f"The sequences {names[0]} and {name} differ in time or batch.",
                    expected=f"T={first.shape[0]}, B={first.shape[1]} as {names[0]}",
                    found=f"T={x.shape[0]}, B={x.shape[1]}",
                    fix="what is the same at every step is a constant: pass it by keyword",
                )
            )
    return (None, None) if first is None else (first.shape[0], first.shape[1])


def check_constants(tensors: list[Tensor], batched: list[bool], structure: Structure, batch: Any) -> None:
    """InputError where a constant that is not marked `unbatched` does not have B rows."""
    for i, (tensor, has_rows) in enumerate(zip(tensors, batched, strict=True)):
        if has_rows and (tensor.dim() == 0 or tensor.shape[0] != batch):
            name = structure.names("")[i][2:].replace("']", "", 1)
            raise InputError(
                message(
                    f"The constant `{name}` does not have B first.",
                    expected=f"({batch}, ...)",
                    found=describe(tensor),
                    fix=f"if every row sees all of it: sl.unbatched({name}) in the place of {name}"
                    if "[" in name
                    else f"if every row sees all of it: {name}=sl.unbatched({name})",
                )
            )


def checked_lengths(lengths: Any, steps: Any, batch: Any) -> Tensor:
    """(B,) int64, each 0 <= l <= T."""
    if not isinstance(lengths, Tensor):
        lengths = _as_tensor(lengths, "lengths")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise InputError(
            message(
                "`lengths` are integers.",
                expected=f"({batch},) int64",
                found=describe(lengths),
                fix="lengths.long(), or mask= for a (T, B) bool mask",
            )
        )
    if lengths.dim() != 1 or lengths.shape[0] != batch:
        raise InputError(
            message(
                "`lengths` has one entry per row.",
                expected=f"({batch},) int64",
                found=describe(lengths),
                fix="one length for each of the B rows, in the order of the batch",
            )
        )
    if batch and _values_known(lengths):
        low, high = (int(v) for v in lengths.detach().aminmax())
        if low < 0 or high > steps:
            raise InputError(
                message(
                    "`lengths` are not all between 0 and T.",
                    expected=f"0 <= length <= {steps}",
                    found=f"smallest {low}, largest {high}",
                    fix="check which axis of xs is time (batch_first=True?), or lengths.clamp(0, T)",
                )
            )
    return lengths.to(torch.int64)


def checked_mask(mask: Any, name: str, steps: Any, batch: Any, batch_first: bool) -> Tensor:
    """(T, B) bool, from what the caller gave: (B, T) if batch_first."""
    if not isinstance(mask, Tensor):
        mask = _as_tensor(mask, name)
    wanted = f"({batch}, {steps}) bool" if batch_first else f"({steps}, {batch}) bool"
    if mask.dtype != torch.bool:
        raise InputError(
            message(
                f"`{name}` is boolean: True = {'valid' if name == 'mask' else 'reset before this step'}.",
                expected=wanted,
                found=describe(mask),
                fix=f"{name}.bool()",
            )
        )
    turned = mask.transpose(0, 1) if batch_first and mask.dim() == 2 else mask
    if turned.dim() != 2 or turned.shape[0] != steps or turned.shape[1] != batch:
        swapped = mask.dim() == 2 and turned.shape[0] == batch and turned.shape[1] == steps
        other = "batch_first=True" if not batch_first else "batch_first=False"
        raise InputError(
            message(
                f"`{name}` has one entry per {'row and step' if batch_first else 'step and row'}.",
                expected=wanted,
                found=describe(mask),
                fix=f"{name}.T (this loop has batch_first={batch_first}; or make it with {other})"
                if swapped
                else f"give {name} the time and batch sizes of xs",
            )
        )
    return turned


def _as_tensor(values: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(values, device=None if isinstance(values, Tensor) else "cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            message(f"`{name}` is not a tensor.", expected="a tensor", found=describe(values), fix=str(error))
        ) from None


def _values_known(tensor: Tensor) -> bool:
    """Whether a tensor's values may be looked at: not while a step around this loop is being captured."""
    return tensor.device.type != "meta" and type(tensor) is Tensor and _get_current_dispatch_mode() is None
