"""A checked call, and how its result goes back to the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .compiler.program import Call, Program, Result
from .marks import valid_at
from .packed import pack
from .states import States
from .tree import unflatten


@dataclass(eq=False)
class Prepared:
    """A checked call, and what is needed to give its result back in the caller's form."""

    program: Program
    call: Call
    names: list[str]
    own: list[Tensor | None]
    batch_first: bool
    packed: PackedSequence | None

    def finish(self, result: Result) -> tuple[Any, States]:
        """(outputs, States) as the caller sees them."""
        outputs: list[Any] = result.outputs
        if self.packed is not None:
            missing = self.call.steps - (0 if result.taken is None else len(result.taken))
            if result.taken is not None and missing:  # what the caller packed is as long as it was
                outputs = [torch.cat([o, o.new_zeros(missing, *o.shape[1:])]) for o in outputs]
            lengths: Any = self.call.lengths
            outputs = [pack(output, self.packed, lengths.cpu()) for output in outputs]
        elif self.batch_first:
            outputs = [output.transpose(0, 1) for output in outputs]
        structure = result.out_spec if result.out_spec is not None else self.program.out_spec
        states = self.states(result.states)
        states.count(_count_of(self.call, result))
        return unflatten(outputs, structure), states

    def states(self, values: list[Tensor]) -> States:
        """States of these values that remember their own initial values."""
        own = {name: value for name, value in zip(self.names, self.own, strict=True) if value is not None}
        return States(zip(self.names, values, strict=True), own)


def _count_of(call: Call, result: Result) -> Callable[[], Tensor]:
    """Gives (B,) int64, the steps of a call that were valid for each row; few callers ask."""
    marks = [None if m is None else m.clone() for m in (call.lengths, call.mask)]  # the caller may write into them
    steps, taken = call.steps, result.taken
    batch: Any = call.batch
    device = result.states[0].device if result.states else None

    def count() -> Tensor:
        valid = valid_at(steps, *marks) if taken is None else taken
        if valid is None:
            return torch.full((batch,), steps, dtype=torch.int64, device=device)
        return valid.sum(0).to(device)

    return count
