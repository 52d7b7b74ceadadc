"""Pytrees as a flat list of tensors plus a hashable Structure that holds everything else.

`torch.utils._pytree` makes a leaf of whatever it does not know, None and numbers too. Here only tensors
are leaves: the rest (None, numbers, strings, any other object) is part of the structure, so that it can
be part of what a capture depends on, and comes back unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class _TensorHere:
    """Marks a tensor's place among a Structure's leaves."""

    def __repr__(self) -> str:
        return "*"


_TENSOR = _TensorHere()
_STATIC = "any value"
# Leaves that can't change and are told apart by what they are.
_VALUES = frozenset({_TensorHere, type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.Size})


class Structure:
    """Everything of a pytree but its tensors. Equal and hashable; 1, 1.0 and True differ.

    Leaves that are plain values count by what they are, all others by their identity: an object may change.
    shape: the same without the values of leaves that an object or a float is.
    """

    __slots__ = ("spec", "leaves", "key", "shape", "count", "_hash")

    def __init__(self, spec: pytree.TreeSpec, leaves: Iterable[Any]) -> None:
        self.spec = spec
        self.leaves = list(leaves)
        self.key = tuple(_leaf_key(leaf) for leaf in self.leaves)
        self.shape = (spec, tuple(k if type(leaf) in _VALUES else _STATIC for k, leaf in zip(self.key, self.leaves)))
        self.count = sum(leaf is _TENSOR for leaf in self.leaves)
        self._hash = hash((self.key, spec))

    def statics(self, root: str) -> list[tuple[list[Any], int, str]]:
        """(leaves, index, name) of every leaf that `shape` leaves out."""
        places = [i for i, leaf in enumerate(self.leaves) if type(leaf) not in _VALUES]
        names = self.leaf_names(root) if places else []
        return [(self.leaves, i, names[i]) for i in places]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Structure) and self.key == other.key and self.spec == other.spec

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return repr(pytree.tree_unflatten(list(self.leaves), self.spec))

    def names(self, root: str) -> list[str]:
        """A name for every tensor: root, root[0], root['key'], root.field."""
        return [name for i, name in enumerate(_leaf_names(self.spec, root)) if self.leaves[i] is _TENSOR]

    def leaf_names(self, root: str) -> list[str]:
        """A name for every leaf, tensor or not."""
        return list(_leaf_names(self.spec, root))

    def is_tensor(self, index: int) -> bool:
        """Whether leaf number `index` is a tensor."""
        return self.leaves[index] is _TENSOR

    def same_static(self, index: int, leaf: Any) -> bool:
        """Whether `leaf` is what this structure holds, not a tensor, as leaf number `index`."""
        return not isinstance(leaf, Tensor) and _static_key(self.leaves[index]) == _static_key(leaf)


@functools.lru_cache(maxsize=256)
def _leaf_names(spec: pytree.TreeSpec, root: str) -> tuple[str, ...]:
    # (Of the spec alone: with the leaves, the table would keep a user's objects alive, a model among them.)
    # numbered leaves: a leaf of the real tree may itself look like a container to pytree's path functions
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    return tuple(root + pytree.keystr(path) for path, _ in with_paths(tree)[0])


def with_paths(tree: Any) -> tuple[list[tuple[Any, Any]], pytree.TreeSpec]:
    """`pytree.tree_flatten_with_path`; where a class was registered without names, leaves are numbered."""
    try:
        return pytree.tree_flatten_with_path(tree)
    except ValueError:
        leaves, spec = pytree.tree_flatten(tree)
        return [((pytree.SequenceKey(i),), leaf) for i, leaf in enumerate(leaves)], spec


def _leaf_key(leaf: Any) -> Any:
    """What a leaf counts as. The Structure keeps it alive, so an id stays its own."""
    if type(leaf) in _VALUES:
        return (type(leaf), leaf)
    return (float, leaf.hex()) if type(leaf) is float else (type(leaf), id(leaf))


def _static_key(leaf: Any) -> Any:
    if isinstance(leaf, float):
        return (float, leaf.hex())  # -0.0 and 0.0 differ, nan equals nan
    try:
        hash(leaf)
    except TypeError:
        return (type(leaf), id(leaf))
    return (type(leaf), leaf)


_LEAF = Structure(pytree.tree_flatten(0)[1], (_TENSOR,))
_PLAIN: dict[int, Structure] = {}


def flatten(tree: Any) -> tuple[list[Tensor], Structure]:
    """The tensors of a pytree in order, and the rest of it."""
    if isinstance(tree, Tensor):
        return [tree], _LEAF
    leaves, spec = pytree.tree_flatten(tree)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, Structure(spec, [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def flatten_arguments(arguments: tuple[Any, ...]) -> tuple[list[Tensor], Structure]:
    """As `flatten` of a tuple; fast where all of its entries are tensors."""
    for argument in arguments:
        if not isinstance(argument, Tensor):
            return flatten(arguments)
    count = len(arguments)
    structure = _PLAIN.get(count)
    if structure is None:
        structure = _PLAIN[count] = flatten(arguments)[1]
    return list(arguments), structure


def unflatten(tensors: Iterable[object], structure: Structure) -> Any:
    """The pytree again, with new containers and other tensors."""
    if structure is _LEAF:
        (tensor,) = tensors
        return tensor
    values: Iterator[object] = iter(tensors)
    leaves = [next(values) if leaf is _TENSOR else leaf for leaf in structure.leaves]
    return pytree.tree_unflatten(leaves, structure.spec)


def flatten_like(tree: Any, structure: Structure) -> list[Any]:
    """All leaves of `tree` (not only tensors), in the order of `structure`, whatever the order of dict keys.

    Raises ValueError where the containers differ. A container where `structure` has a leaf is returned as is.
    """
    return structure.spec.flatten_up_to(tree)
