"""Masked: a Step that runs at some steps only; and `compact`, `unmask`, `masked_from` for sequences of some steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InputError, StepError, describe, message
from ..frame import running
from ..marks import wide
from ..signature import signature_of
from ..state import State
from ..step import Step, states_below, survey
from ..tree import flatten, unflatten
from .base import Memory, _to_front, check_mask, final, is_valid, latest_reset, rows_at, run_child


class Masked(Memory):
    """Where `where` is True: one step of the child. Elsewhere: its states and its output stay as they were.

    RETURNN's MaskedComputationLayer; its output repeats, as after UnmaskLayer. Before the first True the
    output is `initial`. Whole sequence: the kept steps moved together (T' = the most of any row), the child's
    own whole sequence over them, its outputs spread back.

    step:     the child, any Step; it is `masked.cell`, its states are "cell.<name>".
    initial:  a number, or a tensor that broadcasts to one row's output; a list of them, one for each tensor
              the child returns, where it returns several.

    masked(*xs, where=mask, **constants): xs and constants are the child's, mask (B,) bool; alone, over a
    whole sequence, mask is (T, B) like the xs. mask may also be the last positional argument. Where
    `lengths` or a mask of the loop leave a step out, the child leaves it out too.

    Raises StepError for a child that is no Step, InputError for a mask that is not (B,) bool.
    """

    def __init__(self, step: Step, initial: Any = 0.0) -> None:
        super().__init__()
        if not isinstance(step, Step):
            raise StepError(
                message("Masked wraps a Step.", expected="sl.memory.Masked(cell)", found=describe(step))
            )
        self.cell = step
        self.initial = initial if isinstance(initial, (list, tuple)) else None
        self.held = State(..., init=self.initial[0] if self.initial else initial)
        self._one_for_all = 0.0 if isinstance(initial, Tensor) else initial

    @property
    def child(self) -> Step:
        """The Step that is masked."""
        return self.cell

    def sequences_of(
        self, xs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A whole sequence's `where=` has a slice per step: it becomes the last sequence."""
        if "where" not in named:
            return xs, named
        return (*xs, named["where"]), {name: value for name, value in named.items() if name != "where"}

    def check(self, *xs: Any, where: Tensor | None = None, **constants: Any) -> None:
        check_mask("Masked", "where", where if where is not None or not xs else xs[-1])
        _taken(self.cell, constants)

    def step(self, *xs: Any, where: Tensor | None = None, **constants: Any) -> Any:
        self.check(*xs, where=where, **constants)
        *inside, mask = xs if where is None else (*xs, where)
        frame: Any = running()
        y = self.cell(*inside, **_taken(self.cell, constants))
        for _, state in states_below(self.cell):
            if not (state.unsized and frame.prev[state] is None):  # a State no step came by
                state.rewrite(torch.where(wide(mask, state.prev), state.latest, state.prev))
        leaves, structure = flatten(y)
        kept = []
        for state, new in zip(self._held(len(leaves)), leaves, strict=True):
            held = state.sized(*new.shape[1:], like=new)
            state.next = torch.where(wide(mask, new), new, held)
            kept.append(state.next)
        return unflatten(kept, structure)

    def _held(self, count: int) -> list[State]:
        """One State per tensor that the child returns; the first step to run tells how many."""
        frame: Any = running()
        held: dict[str, Any] = self._modules
        states = [self.held]
        for i in range(1, count):
            name = f"held{i}"
            if name not in held and frame.sizing is not None:
                init = self.initial[i] if self.initial else self._one_for_all
                setattr(self, name, State(..., init=init))
            if frame.sizing is not None and held[name] not in frame.names:
                frame.sizing.add(frame, held[name], name)
            states.append(held[name])
        return states[:count]

    def sequence(
        self, xs: tuple[Any, ...], constants: dict[str, Any], state: dict[str, Tensor], reset_to: dict[str, Tensor],
        lengths: Tensor | None, resets: Tensor | None,
    ) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
        *inside, where = xs
        steps, batch = where.shape
        plan = _Kept(where, lengths, resets)
        y, after = run_child(
            self.cell,
            tuple(pytree.tree_map_only(Tensor, lambda x: rows_at(x, plan.order), x) for x in inside),
            _taken(self.cell, constants),
            _below(state),
            _below(reset_to),
            plan.count,
            plan.child_resets,
            batch,
            len(plan.order),
        )
        if resets is not None:
            ended = plan.reset_after
            fresh = _below(reset_to)
            after = {n: torch.where(wide(ended, v), fresh[n], v) for n, v in after.items()}
        states = {f"cell.{name}": value for name, value in after.items()}
        leaves, structure = flatten(y)
        spread = []
        for i, leaf in enumerate(leaves):
            name = f"held{i or ''}"
            spread.append(plan.spread(leaf, state[name], reset_to[name]))
            states[name] = final(spread[-1], state[name], lengths)
        states.update({name: value for name, value in state.items() if name not in states})
        return unflatten(spread, structure), states


class _Kept:
    """Which steps of (T, B) are kept, and where each goes.

    order: (T', B) the times of the kept steps.  count: (B,) how many.  child_resets: (T', B) or None.
    """

    def __init__(self, where: Tensor, lengths: Tensor | None, resets: Tensor | None) -> None:
        steps, batch = where.shape
        kept = where & is_valid(lengths, steps, batch, where.device)
        self.count = kept.sum(0)
        self.rank = kept.cumsum(0) - 1
        self.order = _to_front(kept, False, int(self.count.max()) if batch else 1)
        self.child_resets = self.latest = None
        if resets is None:
            return
        self.latest = latest_reset(resets, lengths)
        before = torch.cat([torch.full_like(self.order[:1], -1), self.order[:-1]])
        self.child_resets = rows_at(self.latest, self.order) > before
        last = rows_at(self.order, (self.count - 1).clamp(min=0)[None])[0]
        self.reset_after = self.latest[-1] > torch.where(self.count > 0, last, -1)

    def spread(self, y: Tensor, held: Tensor, fresh: Tensor) -> Tensor:
        """y (T', B, ...) at the kept steps and after them; what was held before the first."""
        index = self.rank.clamp(min=0)
        there = self.rank >= 0
        earlier = held.unsqueeze(0)
        if self.latest is not None:
            latest = self.latest[:-1]
            there = there & (rows_at(self.order, index) >= latest)
            earlier = torch.where(wide(latest >= 0, y), fresh, held)
        placed = rows_at(y, index)
        return torch.where(wide(there, placed), placed, earlier)


def _below(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("cell."): v for name, v in states.items() if name.startswith("cell.")}


def _taken(cell: Step, constants: dict[str, Any]) -> dict[str, Any]:
    """The constants that the child's step takes; StepError for one that nothing below takes."""
    begins = [signature_of(step, "begin") for step in survey(cell).begins]
    for name in constants:
        if not signature_of(cell).takes(name) and not any(begin.takes(name) for begin in begins):
            raise StepError(
                message(
                    f"Masked got a constant that its child does not take: `{name}`.",
                    expected=f"a name that the step of {type(cell).__name__} takes, or where=",
                    found=f"`{name}=`",
                    fix=f"add {name} to the arguments of its step, or leave it out",
                )
            )
    return {name: value for name, value in constants.items() if signature_of(cell).takes(name)}


class _Same(Step):
    def step(self, x: Any) -> Any:
        return x


class Unmask(Masked):
    """Repeats the latest y for which `where` was True, `init` before the first. RETURNN's UnmaskLayer in a
    loop.

    unmask(y, where=mask): y (B, ...), a value for every step, of which only those at True are looked at. For
    a sequence that is already moved together see the function `unmask`.
    """

    def __init__(self, init: Any = 0.0) -> None:
        super().__init__(_Same(), init)


def unmask(y: Any, mask: Tensor, init: Any = 0.0, lengths: Tensor | None = None) -> Any:
    """Spread a sequence of kept steps back: y[cumsum(mask) - 1], `init` before the first True.

    y:       (T', B, ...), or a pytree: values for the True steps of `mask`, in their order.
    mask:    (T, B) bool.  init: a number or a tensor that broadcasts to (B, ...).
    lengths: (B,) the rows' lengths in T: what `mask` says beyond them counts not.
    Returns (T, B, ...).

    Inside a step, where `y` is the output of `Masked` at this step, (B, ...), and `mask` is (B,), there is
    nothing left to do: Masked repeats its latest output by itself. There it returns y, and `init` is Masked's
    own `initial=`.
    Raises InputError for a mask that is not bool, StepError for an `init` inside a step.
    """
    if running() is not None and mask.dim() == 1:
        check_mask("unmask", "mask", mask)
        if isinstance(init, Tensor) or init != 0:
            raise StepError(
                message(
                    "unmask was given `init` inside a step.",
                    expected="the output of a Masked, which already repeats, before its first True too",
                    found=f"init={describe(init)}",
                    fix="sl.memory.Masked(cell, initial=...), or an sl.memory.Unmask(init=...)",
                )
            )
        return y
    check_mask("unmask", "mask", mask.flatten() if isinstance(mask, Tensor) and mask.dim() == 2 else mask)
    kept = mask & is_valid(lengths, mask.shape[0], mask.shape[1], mask.device)
    rank = kept.cumsum(0) - 1

    def spread(leaf: Tensor) -> Tensor:
        if len(leaf) == 0:
            leaf = leaf.new_zeros((1, *leaf.shape[1:]))
        placed = rows_at(leaf, rank.clamp(min=0, max=len(leaf) - 1))
        before = torch.as_tensor(init, dtype=leaf.dtype, device=leaf.device)
        return torch.where(wide(rank >= 0, placed), placed, before)

    return pytree.tree_map_only(Tensor, spread, y)


def compact(xs: Any, where: Tensor, lengths: Tensor | None = None) -> Any:
    """The steps of a sequence where `where` is True, moved together: the inverse of `unmask`.

    xs:      (T, B, ...), or a pytree of such tensors.
    where:   (T, B) bool.  lengths: (B,) the rows' lengths in T: what `where` says beyond them counts not.
    Returns (T', B, ...), T' the most True steps of any row, which are `where.sum(0)`; zeros after each row's last.
    Raises InputError for a mask that is not (T, B) bool.
    """
    if not isinstance(where, Tensor) or where.dtype != torch.bool or where.dim() != 2:
        raise InputError(
            message(
                "compact: `where` says for every step and row whether it is kept.",
                expected="(T, B) bool",
                found=describe(where),
                fix="where=where.bool()" if isinstance(where, Tensor) else "where=mask",
            )
        )
    kept = where & is_valid(lengths, where.shape[0], where.shape[1], where.device)
    count = kept.sum(0)
    longest = int(count.max()) if count.numel() else 0
    order = _to_front(kept, False, longest)[:longest]
    there = torch.arange(longest, device=where.device)[:, None] < count

    def moved(x: Tensor) -> Tensor:
        if x.shape[:2] != where.shape:
            raise InputError(
                message(
                    "compact: xs and `where` have the same T and B.",
                    expected=f"({where.shape[0]}, {where.shape[1]}, ...)",
                    found=describe(x),
                )
            )
        placed = rows_at(x, order)
        return torch.where(wide(there, placed), placed, torch.zeros_like(placed))

    return pytree.tree_map_only(Tensor, moved, xs)


def masked_from(
    step: Step, compact: Any, mask: Tensor, init: Any = 0.0, lengths: Tensor | None = None, **constants: Any
) -> Any:
    """A Step over a sequence that holds the True steps of `mask` only, spread back: RETURNN's `masked_from`.

    compact: (T', B, ...), one value for every True of `mask` (T, B), in order; other arguments as for
    `unmask`. The same as `Masked(step)(x, where=mask)` if compact is x without the other steps. In a step:
    `MaskedFrom`.
    """
    kept = mask & is_valid(lengths, mask.shape[0], mask.shape[1], mask.device)
    y, _ = step(compact, lengths=kept.sum(0).clamp(max=len(pytree.tree_leaves(compact)[0])), **constants)
    return unmask(y, mask, init, lengths)


class MaskedFrom(Step):
    """Masked, reading its input from a sequence that holds the True steps only.

    masked_from(where=mask, source=compact): mask (B,) (alone: (T, B)), compact (B, T', ...), a constant. At
    the n-th True of a row its child sees compact[:, n].
    """

    def __init__(self, step: Step, initial: Any = 0.0) -> None:
        super().__init__()
        self.masked = Masked(step, initial)
        self.taken = State(init=0, dtype=torch.int64)

    def sequences_of(
        self, xs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As for Masked."""
        return self.masked.sequences_of(xs, named)

    def step(self, where: Tensor, *, source: Tensor, **constants: Any) -> Any:
        check_mask("MaskedFrom", "where", where)
        index = self.taken.prev.clamp(max=source.shape[1] - 1)
        wanted = wide(index, source[:, 0]).unsqueeze(1).expand(-1, 1, *source.shape[2:])
        x = source.gather(1, wanted).squeeze(1)
        self.taken.next = self.taken.prev + where.to(torch.int64)
        return self.masked(x, where=where, **constants)
