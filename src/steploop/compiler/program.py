"""What the front end hands to the compiler: a step as a flat function, and one call of it.

Everything user-facing (pytrees, PackedSequence, batch_first, state dictionaries, names of arguments) is
gone here. A `Program` is the step itself and lives as long as the module or function it came from; a
`Call` is one run of it over a sequence. Every backend, the plain loop included, takes exactly these two.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

StepOutput = tuple[list[Tensor], list[Tensor]]


@dataclass(eq=False)
class Program:
    """One step as a function of flat lists of tensors.

    run(xs, constants, prevs) -> (outputs, nexts)
        xs:        one slice per sequence leaf, (B, ...) each (any shape when `batched` is False)
        constants: the same tensors at every step, (B, ...) where `constant_batched` says so
        prevs:     the states before the step, (B, ...) each
        outputs:   leaves of what the step returned, (B, ...) each
        nexts:     the states after the step, in the order and with the shapes and dtypes of `prevs`
      It must be callable with fake tensors whose B is symbolic and must not keep anything from a call
      except `out_spec`.

    root: the module or function where the search for closed-over tensors and Python values begins.
    key: the structure of what it is given, hashable; Python values in it by their places alone.
    statics: (list, index, name) of those Python values: what stands there belongs to what the step depends on.
    state_names: the path of every state, for messages and plans.
    x_names, constant_names: names of the leaves, for messages and plans.
    batched: True: axis 0 of every x, state and output is B. False: nothing is known of a batch axis.
    out_spec: the structure of what the step returned, set by every `run`; opaque to the compiler.
    ends: which state, (B,) bool, ends a row: where it is set, no state changes any more, and what the step gives is of
        no interest.
    stands_alone: it is the root's own step and nothing more, so that the root may run it in another form.
    kept: what is kept between its calls.
    """

    run: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], StepOutput]
    root: Any
    key: Hashable
    state_names: list[str]
    x_names: list[str]
    constant_names: list[str]
    constant_batched: list[bool]
    batched: bool = True
    statics: list[tuple[list[Any], int, str]] = field(default_factory=list)
    out_spec: Any = None
    ends: int | None = None
    stands_alone: bool = True
    kept: Kept = field(init=False, default_factory=lambda: Kept())


@dataclass(eq=False)
class Kept:
    """What is kept of a Program between its calls.

    quick: the last call's capture, with all that tells whether the next may use it (`capture_store.find`).
    walks: walks over what it depends on, by what they follow (`capture_store.walk_of`).
    rowwise: the same program with a batch axis, which a scan may turn out to have (`pipeline.batch_guessed`).
    masked: with masks as a part of the step (`masking`), by its numbers of sequences, constants and states.
    until: with rows frozen that have ended, by the state that ends them (`until.freezing`).
    stops: by backend, whether its loop looks itself whether any row is left (`dispatch`).
    """

    quick: tuple[Any, ...] | None = None
    walks: dict[Any, Any] = field(default_factory=dict)
    rowwise: Program | None = None
    masked: dict[tuple[int, int, int], Program] = field(default_factory=dict)
    until: dict[int, Program] = field(default_factory=dict)
    stops: dict[str, bool] = field(default_factory=dict)


def roots_of(program: Program) -> list[tuple[Any, str, Any, Any]]:
    """Where the walk over what a step depends on begins: (value, path, what holds it, where in that)."""
    return [(program.root, "", None, None), *((held[i], name, held, i) for held, i, name in program.statics)]


def name_of(program: Program) -> str:
    """What a person calls a step: its class or its function."""
    return getattr(program.root, "__name__", None) or type(program.root).__name__.lstrip("_")


@dataclass(eq=False)
class Call:
    """One run of a Program over a sequence. All sequences are time-major.

    xs: (T, B, ...) each.  constants: as in Program.  initial: the state before the first step, (B, ...) each.
    reset_to: what a reset returns each state to, (B, ...) each; None exactly when `resets` is None.
    lengths: (B,) int64 or None.  mask: (T, B) bool, True = valid, or None.  resets: (T, B) bool or None.
    All three are already checked; they may live on any device.
    steps: T.  batch: B, None when the program is not batched.
    reverse: run from each row's last valid step to its first.
    on_masked: "zero" or "repeat", what outputs are at masked steps.
    until: which state, (B,) bool, ends a row: the row takes no step after the one that set it. None: all steps run.
    held: for calls that are pieces of one: what is the same at every step, kept from piece to piece. Between two of
        them neither the constants nor anything else that the step reads may change. None: the call is whole.
    """

    xs: list[Tensor]
    constants: list[Tensor]
    initial: list[Tensor]
    steps: int
    batch: int | None
    reset_to: list[Tensor] | None = None
    lengths: Tensor | None = None
    mask: Tensor | None = None
    resets: Tensor | None = None
    reverse: bool = False
    on_masked: str = "zero"
    until: int | None = None
    held: dict[Any, Any] | None = None

    @property
    def device(self) -> torch.device:
        """That of its tensors; the CPU where it has none."""
        tensors = (*self.xs, *self.initial, *self.constants)
        return next((t.device for t in tensors), torch.device("cpu"))


@dataclass(eq=False)
class Result:
    """outputs: (T, B, ...) per output leaf.  states: (B, ...) per state, after each row's last valid step.

    taken: (T, B) bool, which steps each row took; set where `until` was, and T is then the last of them.
    """

    outputs: list[Tensor]
    states: list[Tensor]
    out_spec: Any = field(default=None)
    taken: Tensor | None = None
