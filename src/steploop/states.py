"""States: the values of every State of a loop, by path. Also the check of a `state=` that a caller gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import StateError, describe, describe_type, message
from .marks import wide


class States(dict[str, Tensor]):
    """A dict from a State's path ("h", "cell1.h") to its value (B, ...), as a Loop returns and takes it.

    It remembers what each state was before its first step, for `reset_`. All methods but `reset_` return a
    new States; tensors are never changed in place.
    """

    def __init__(self, values: Mapping[str, Tensor] | Any = (), own: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(values)
        self._own: dict[str, Tensor] = dict(own or {})
        self._steps: Tensor | Callable[[], Tensor | None] | None = None

    def count(self, steps: Tensor | Callable[[], Tensor | None] | None) -> None:
        """Say what `steps` is, or how it is found when it is asked for."""
        self._steps = steps

    @property
    def steps(self) -> Tensor | None:
        """(B,) int64: how many valid steps each row took in the call that gave these; None where no call did."""
        if callable(self._steps):
            self._steps = self._steps()
        return self._steps

    def detach(self) -> States:
        """The same values, cut from the autograd graph (truncated backpropagation)."""
        return self._map(Tensor.detach)

    def clone(self) -> States:
        """Copies of the values; gradients flow through."""
        return self._map(Tensor.clone)

    def to(self, *args: Any, **kwargs: Any) -> States:
        """As `Tensor.to`; a dtype is applied to floating values only, as `nn.Module.to` does."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def move(value: Tensor) -> Tensor:
            own = dtype if value.is_floating_point() or value.is_complex() else None
            return value.to(device, own if own is not None else value.dtype, non_blocking)

        return self._map(move)

    def select(self, index: Any) -> States:
        """The rows at `index`: a tensor or list of row numbers, a bool mask, a slice, or one number."""
        chosen = _row_index(index)
        selected = self._map(lambda value: value[_on_device(chosen, value)])
        if self.steps is not None:
            selected.count(self.steps[_on_device(chosen, self.steps)])
        return selected

    def reset_(self, rows: Any = None) -> States:
        """Put rows (as in `select`; None: all) back to the value before the first step. Returns self.

        That is each State's `init`, or what `begin` set, never a `state=` that was given. StateError if this
        States did not come from a loop.
        """
        missing = [name for name in self if name not in self._own]
        if missing:
            raise StateError(
                message(
                    f"These States do not know their own initial values: {', '.join(missing)}.",
                    expected="States that a Loop or Stream returned",
                    found="States made by hand" if not self._own else "States with added entries",
                    fix="take the `state` of `outputs, state = loop(xs)`",
                )
            )
        for name, value in self.items():
            chosen = chosen_rows(rows, value.shape[0], value.device)
            self[name] = torch.where(wide(chosen, value), self._own[name], value)
        return self

    def _map(self, function: Callable[[Tensor], Tensor]) -> States:
        mapped = States(
            {name: function(value) for name, value in self.items()},
            {name: function(value) for name, value in self._own.items()},
        )
        mapped.count(self._steps)
        return mapped

    def __copy__(self) -> States:
        return self.copy()

    def copy(self) -> States:
        """A shallow copy: another dict, the same tensors."""
        copied = States(self, self._own)
        copied.count(self._steps)
        return copied

    def __reduce__(self) -> Any:
        return (_restored, (dict(self), self._own, self.steps))


def _restored(values: dict[str, Tensor], own: dict[str, Tensor], steps: Tensor | None) -> States:
    states = States(values, own)
    states.count(steps)
    return states


def _flatten_states(states: States) -> tuple[list[Tensor], Any]:
    return [*states.values(), *states._own.values()], (list(states), list(states._own))


def _unflatten_states(values: Any, context: Any) -> States:
    names, own = context
    tensors = list(values)
    return States(zip(names, tensors, strict=False), dict(zip(own, tensors[len(names) :], strict=True)))


# torch.load(weights_only=True) makes them of dicts of tensors.
torch.serialization.add_safe_globals([States, _restored])


def _names_from(dumped: list[list[str]]) -> Any:
    names, own = dumped
    return list(names), list(own)


# The last three are for saved programs (torch.export) that take or give States.
pytree.register_pytree_node(
    States, _flatten_states, _unflatten_states, serialized_type_name="steploop.States",
    to_dumpable_context=list, from_dumpable_context=_names_from,
)  # fmt: skip


def _row_index(index: Any) -> Any:
    if isinstance(index, slice):
        return index
    if not isinstance(index, Tensor):
        index = torch.as_tensor(index, device="cpu")
        index = index if index.numel() else index.long()  # an empty list does not say its dtype
    return index.reshape(-1) if index.dim() == 0 else index


def _on_device(index: Any, value: Tensor) -> Any:
    return index.to(value.device) if isinstance(index, Tensor) else index


def chosen_rows(rows: Any, count: int, device: torch.device | str) -> Tensor:
    """(count,) bool: which rows are meant, as in `States.select`; None: all."""
    chosen = torch.full((count,), rows is None, device=device)
    if rows is not None:
        chosen[_on_device(_row_index(rows), chosen)] = True
    return chosen


def given_states(given: Any, names: Sequence[str], own: Sequence[Tensor | None], batch: Any) -> list[Tensor]:
    """The values of a caller's `state=` in the order of `names`.

    own: each State's own initial value, whose type the given one must have; None: any (B, ...).
    Raises StateError naming both sides.
    """
    if not isinstance(given, Mapping):
        raise StateError(
            message(
                "`state` is not a dictionary of states.",
                expected="an sl.States from an earlier call: " + (", ".join(names) or "(this step has no States)"),
                found=describe(given),
                fix="outputs, state = loop(xs); loop(more_xs, state=state)",
            )
        )
    if len(given) != len(names) or any(name not in given for name in names):
        _wrong_names(given, names)
    values = [given[name] for name in names]
    wrong = [i for i, value in enumerate(values) if not _fits(value, own[i], batch)]
    if wrong:
        _wrong_types(wrong, values, names, own, batch)
    return values


def _fits(value: Any, own: Tensor | None, batch: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    if own is None:
        return value.dim() > 0 and value.shape[0] == batch
    return value.dtype == own.dtype and value.shape == own.shape


def _wrong_names(given: Mapping[str, Any], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in given]
    unknown = [str(name) for name in given if name not in names]
    found = []
    if missing:
        found.append("missing " + ", ".join(f"'{n}'" for n in missing))
    if unknown:
        found.append("unknown " + ", ".join(f"'{n}'" for n in unknown))
    raise StateError(
        message(
            "`state` does not name the States of this step.",
            expected=", ".join(f"'{n}'" for n in names) or "no states",
            found="; ".join(found),
            fix="pass the state that this loop (or one with the same step) returned",
        )
    )


def _wrong_types(
    wrong: list[int], values: list[Any], names: Sequence[str], own: Sequence[Tensor | None], batch: Any
) -> None:
    expected = [describe_type(o.shape, o.dtype) if o is not None else f"a tensor ({batch}, ...)" for o in own]
    swapped = [
        (names[i], names[j])
        for i in wrong
        for j in wrong
        if i < j and _fits(values[i], own[j], batch) and _fits(values[j], own[i], batch)
    ]
    first, own_first = values[wrong[0]], own[wrong[0]]
    if swapped:
        fix = " and ".join(f"'{a}' and '{b}' look swapped" for a, b in swapped)
    elif isinstance(first, Tensor) and first.dim() and first.shape[0] != batch:
        fix = f"the batch has {batch} rows: state.select(rows) keeps some rows of a state"
    elif isinstance(first, Tensor) and own_first is not None and first.shape == own_first.shape:
        fix = f"state.to({own_first.dtype})"
    else:
        fix = "pass the state that this loop returned"
    raise StateError(
        message(
            "`state` has values of another type than the States of this step.",
            expected="; ".join(f"'{names[i]}' expects {expected[i]}" for i in wrong),
            found="; ".join(f"'{names[i]}' is {describe(values[i])}" for i in wrong),
            fix=fix,
        )
    )
