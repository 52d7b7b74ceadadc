"""A Step inside a search: it runs on all hypotheses of all rows at once, B * K rows in all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InputError, message
from ..frame import Frame, run_in, running
from ..marks import wide
from ..nn._constants import constants_for
from ..state import State
from ..step import Step, survey


@dataclass
class Copies:
    """What holds the States of `step` K times in the loop that is running: (B, K, ...), histories (B, room, K, ...).

    The step itself sees rows (B * K, ...), those of one row beside each other, and knows nothing of it.
    """

    step: Step
    count: int

    def __post_init__(self) -> None:
        found = survey(self.step)
        self.states, self.names = found.states, found.names
        self.frame = cast(Frame, running())
        self.after: dict[State, Tensor] = {}

    def run(self, *xs: Any, constants: dict[str, Any]) -> Any:
        """One step; xs (B * K, ...). constants: the loop's, of which the step gets those that it takes."""
        own = constants_for(self.step, constants)
        inner = Frame(
            {state: f"{self.frame.names[state]}" for state in self.states},
            {state: self._flat(state, cast(Tensor, self.frame.prev[state])) for state in self.states},
            "step",
        )
        inner.inlined = True
        with run_in(inner):
            output = self.step(*xs, **{name: self._spread(value, name) for name, value in own.items()})
        self.after = {s: self._back(s, v) for s, v in zip(self.states, inner.nexts(self.states), strict=True)}
        return output

    def keep(self, where: Tensor) -> None:
        """Put States back to what they were before the step where (B, K) says so."""
        for state in self.states:
            before = cast(Tensor, self.frame.prev[state])
            self.after[state] = torch.where(self._wide(where, state, before), before, self.after[state])

    def write(self, parent: Tensor | None) -> None:
        """Make the States those of the hypotheses `parent` (B, K), each among its row's; None: as they are."""
        for state in self.states:
            value = self.after[state]
            if parent is not None:
                index = self._wide(parent, state, value).expand(value.shape)
                value = value.gather(self._axis(state), index)
            self.frame.next[state] = value

    def _axis(self, state: State) -> int:
        return 2 if state.grows_with is not None else 1

    def _flat(self, state: State, value: Tensor) -> Tensor:
        return value.movedim(self._axis(state), 1).flatten(0, 1)

    def _back(self, state: State, value: Tensor) -> Tensor:
        like = cast(Tensor, self.frame.prev[state])
        wide = value.reshape(like.shape[0], self.count, *value.shape[1:])
        return wide.movedim(1, self._axis(state))

    def _wide(self, mark: Tensor, state: State, value: Tensor) -> Tensor:
        """(B, K) with as many axes as the State's value."""
        if self._axis(state) == 2:
            return wide(mark.unsqueeze(1), value)
        return wide(mark, value)

    def _spread(self, tree: Any, name: str) -> Any:
        """A constant for all hypotheses; one without B first is the same for all as it is."""
        flags = self.frame.batched.get(name, True)
        if isinstance(flags, bool):
            flags = pytree.tree_map(lambda _: flags, tree)
        return pytree.tree_map(lambda leaf, batched: spread(leaf, self.count) if batched is True else leaf, tree, flags)


def spread(tree: Any, count: int) -> Any:
    """Tensors (B, ...) as (B * K, ...), each row K times."""

    def one(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or count == 1:
            return tensor
        return tensor.unsqueeze(1).expand(tensor.shape[0], count, *tensor.shape[1:]).flatten(0, 1)

    return pytree.tree_map(one, tree)


def picked(output: Any, which: Any) -> Tensor:
    """The part of a model's output that a key, an index or a function names; None: the output itself."""
    if which is None:
        return output
    if callable(which):
        return which(output)
    there = (
        list(output) if isinstance(output, dict) else range(len(output)) if isinstance(output, (tuple, list)) else ()
    )
    if which not in there:
        raise InputError(
            message(
                f"The model's output has no {which!r}.",
                expected=", ".join(map(repr, there)) or "no key or index: the output is no tree",
                found=repr(which),
                fix="a key of a dict, an index of a tuple, or a function of the output",
            )
        )
    return output[which]
