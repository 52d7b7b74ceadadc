"""Two cells over the same sequence, one in each direction (Schuster & Paliwal 1997)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from .. import torchscript
from ..errors import InputError, StateError, StepError, describe, message
from ..frame import running
from ..loop import Loop
from ..states import States
from ..step import Step
from ..tracebacks import ends_at_the_call


class Bidirectional(nn.Module):
    """A layer over whole sequences: one Loop forwards, one in reverse, their features concatenated.

    outputs, state = layer(xs, ..., state=None, lengths=None, mask=None, resets=None, ...): the arguments and
    results of `sl.Loop`. outputs[t] = cat([forward output at t, backward output at t], -1), leaf by leaf;
    a PackedSequence gives PackedSequences. The backward cell starts at each row's last valid step, so its last
    output is the one at t = 0: `last_output` gives what each direction ended with.
    state: an sl.States with both cells' states, "forward.h" and "backward.h".

    It is not a Step: the backward cell has to see the end of a sequence first. Inside a step it is an inner
    sequence.
    The loops are the children "forward_loop" and "backward_loop". batch_first, backend, save: as for sl.Loop.

    Raises InputError where the two cells' outputs cannot be joined; StateError for a wrong state; StepError inside a
    step for an input (B, features), which is no sequence.
    """

    if TYPE_CHECKING:
        # As type checkers see it: torch's own __call__ gives Any.
        def __call__(self, *xs: Any, **arguments: Any) -> tuple[Any, States]: ...

    def __init__(
        self,
        forward_cell: Step,
        backward_cell: Step,
        batch_first: bool = False,
        backend: str = "auto",
        save: str = "auto",
    ) -> None:
        super().__init__()
        self.batch_first = batch_first
        options: dict[str, Any] = {"batch_first": batch_first, "backend": backend, "save": save}
        self.forward_loop = Loop(forward_cell, **options)
        self.backward_loop = Loop(backward_cell, reverse=True, **options)

    __call__ = ends_at_the_call(nn.Module.__call__)

    def forward(self, *xs: Any, state: States | None = None, **arguments: Any) -> tuple[Any, States]:
        if running() is not None:
            _check_inner(xs)
        given = self._split(state)
        left, left_state = self.forward_loop(*xs, state=given["forward"], **arguments)
        right, right_state = self.backward_loop(*xs, state=given["backward"], **arguments)
        return _concatenate(left, right), _joined(left_state, right_state)

    def last_output(self, *xs: Any, state: States | None = None, **arguments: Any) -> tuple[Any, States]:
        """As a call, but with each direction's output at its own last step alone, (B, ..., features): the forward
        cell's at the row's last valid step, the backward cell's at its first. Zeros where a row has no step.

        As Keras's Bidirectional (`return_sequences=False`) and RETURNN's `get_last_hidden_state` of each direction.
        """
        given = self._split(state)
        left, left_state = self.forward_loop.last_output(*xs, state=given["forward"], **arguments)
        right, right_state = self.backward_loop.last_output(*xs, state=given["backward"], **arguments)
        return _concatenate(left, right, leading=1), _joined(left_state, right_state)

    def _split(self, state: Any) -> dict[str, States | None]:
        """The states of each direction, under their names in its own Loop."""
        torchscript.refuse_proxy(state)
        if state is None:
            return {"forward": None, "backward": None}
        if not isinstance(state, Mapping):
            raise StateError(message("Bidirectional: `state` is not a dictionary of states.", found=describe(state)))
        parts: dict[str, dict[str, Tensor]] = {"forward": {}, "backward": {}}
        for name, value in state.items():
            direction, dot, path = name.partition(".")
            if direction not in parts or not dot:
                raise StateError(
                    message(
                        "Bidirectional: a given state belongs to neither direction.",
                        expected="names forward.<state> and backward.<state>",
                        found=repr(name),
                        fix="pass the state that an earlier call of this layer returned",
                    )
                )
            parts[direction][path] = value
        return {direction: States(part) for direction, part in parts.items()}


def _check_inner(xs: tuple[Any, ...]) -> None:
    """StepError for one step's slice (B, features), which would be read as a sequence of B steps."""
    for x in xs:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() < 3:
            raise StepError(
                message(
                    "A Bidirectional was called inside a step with one step of a sequence: it reads whole sequences.",
                    expected="an inner sequence of this step, (S, B, features)",
                    found=describe(x),
                    fix="run it over the whole sequence before the loop: ys, _ = layer(xs);  loop(ys)",
                )
            )


def _prefixed(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in values.items()}


def _joined(left: States, right: States) -> States:
    values = _prefixed("forward.", left) | _prefixed("backward.", right)
    states = States(values, _prefixed("forward.", left._own) | _prefixed("backward.", right._own))
    states.count(lambda: left.steps)
    return states


def _concatenate(left: Any, right: Any, leading: int = 2) -> Any:
    """leading: how many axes stand before those of a row's output."""

    def is_packed(value: Any) -> bool:
        return isinstance(value, PackedSequence)

    lefts, structure = pytree.tree_flatten(left, is_leaf=is_packed)
    rights, other = pytree.tree_flatten(right, is_leaf=is_packed)
    if structure != other:
        raise InputError(
            message(
                "Bidirectional: the outputs of the two cells are not alike.",
                expected=f"forward cell: {structure}",
                found=f"backward cell: {other}",
            )
        )
    return pytree.tree_unflatten([_join(a, b, leading) for a, b in zip(lefts, rights, strict=True)], structure)


def _join(a: Any, b: Any, leading: int) -> Any:
    if isinstance(a, PackedSequence):
        return a._replace(data=_join(a.data, b.data, leading=1))
    if not isinstance(a, Tensor):
        return a
    if a.dim() <= leading or a.shape[:-1] != b.shape[:-1]:
        raise InputError(
            message(
                "Bidirectional: the outputs of the two cells cannot be joined on their last axis.",
                expected=f"forward cell: {describe(a)}",
                found=f"backward cell: {describe(b)}",
                fix=f"both must be ({'T, ' * (leading - 1)}B, ..., features), equal but for the features",
            )
        )
    return torch.cat([a, b], dim=-1)
