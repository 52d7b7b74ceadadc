"""The plain Python loop over a step: the meaning of a Loop, which every other backend is tested against.

Real time is walked in running order. At each step the step runs on the valid rows alone, so that what
stands at a masked step is never read, in values or in gradients. Everything is plain torch, so autograd
differentiates it as it stands, any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..compiler.program import Call, Program, Result
from ..errors import StepError, message
from ..marks import valid_at, wide
from ..tree import Structure, flatten_like, unflatten


def run(program: Program, call: Call) -> Result:
    """Run `program` over the sequence of `call`, one step after the other."""
    return Run(program, call).all_steps()


class Run:
    def __init__(self, program: Program, call: Call) -> None:
        self.program = program
        self.call = call
        self.xs = [x.unbind(0) for x in call.xs]
        self.states = list(call.initial)
        self.valid: Any = valid_steps(call)  # (T, B) bool on the CPU, None where all are
        if call.until is not None:
            batch: Any = call.batch
            everything = torch.ones(call.steps, batch, dtype=torch.bool, device="cpu")
            self.valid = everything if self.valid is None else self.valid.clone()  # it is written into
        self.on_all_rows = False
        self.seen_xs: Any = None  # a list of tensors, once a step has run
        self.structure: Structure | None = None
        self.t = 0

    def all_steps(self) -> Result:
        steps = range(self.call.steps)
        outputs: dict[int, list[Tensor]] = {}
        last: list[Tensor] | None = None
        for t in reversed(steps) if self.call.reverse else steps:
            self.t = t
            if self.call.until is not None:
                self._leave_out_ended(t)
                if not self.valid[t:].any():
                    break
            rows = self._rows(t)
            if rows is None:
                outputs[t] = last = self._full_step(t)
            elif rows.numel():
                outputs[t] = last = self._spread(self._some_rows(t, rows), rows, last)
            elif last is not None:
                outputs[t] = self._absent(last)
        return self._result(outputs)

    def failing_row(self) -> int | None:
        """After an error at step t: the first row that fails there when it runs alone."""
        valid = self._rows(self.t)
        for row in range(self.call.batch or 0) if valid is None else valid.tolist():
            try:
                self._some_rows(self.t, torch.tensor([row], device=self.call.device))
            except RuntimeError:
                return row
            except Exception:  # it needs all rows
                return None
        return None

    # one step

    def _leave_out_ended(self, t: int) -> None:
        """A row that has ended takes no step from t on, up to a reset of it."""
        until: Any = self.call.until
        ended = self.states[until].detach().cpu()
        if self.call.resets is None:
            self.valid[t:] &= ~ended
        else:
            again = (self.call.resets.cpu() & self.valid)[t:].cumsum(0) > 0
            self.valid[t:] &= again | ~ended

    def _rows(self, t: int) -> Tensor | None:
        """The rows for which step t is valid; None where all are."""
        if self.valid is None or bool(self.valid[t].all()):
            return None
        return self.valid[t].nonzero()[:, 0].to(self.call.device)

    def _full_step(self, t: int) -> list[Tensor]:
        xs = [x[t] for x in self.xs]
        if self.valid is not None:
            self._remember(xs, None)
        outputs, self.states = self._step(xs, self.call.constants, self._reset(t, None, self.states))
        return outputs

    def _some_rows(self, t: int, rows: Tensor) -> list[Tensor]:
        """The outputs of the rows `rows` of step t, (len(rows), ...); the other rows' states stay."""
        xs = [x[t].index_select(0, rows) for x in self.xs]
        self._remember(xs, rows)
        before = [s.index_select(0, rows) for s in self.states]
        before = self._reset(t, rows, before)
        outputs, after = self._step_on(rows, xs, before)
        self.states = [s.index_copy(0, rows, n) for s, n in zip(self.states, after, strict=True)]
        return outputs

    def _step_on(self, rows: Tensor, xs: list[Tensor], before: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if not self.on_all_rows:
            constants = [
                c.index_select(0, rows) if batched else c
                for c, batched in zip(self.call.constants, self.program.constant_batched, strict=True)
            ]
            try:
                return self._step(xs, constants, before)
            except Exception:
                # A closure or the code may fix B. If it does not, the same error comes again below.
                self.on_all_rows = True
        all_xs = [seen.index_copy(0, rows, x) for seen, x in zip(self.seen_xs, xs, strict=True)]
        everywhere = [s.index_copy(0, rows, b) for s, b in zip(self.states, before, strict=True)]
        outputs, after = self._step(all_xs, self.call.constants, everywhere)
        return [o.index_select(0, rows) for o in outputs], [n.index_select(0, rows) for n in after]

    def _step(
        self, xs: Sequence[Tensor], constants: Sequence[Tensor], before: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        # clones: what a step writes in place into its arguments is its own business
        outputs, nexts = self.program.run(_clones(xs), _clones(constants), _clones(before))
        return self._in_order(outputs), nexts

    def _in_order(self, outputs: list[Tensor]) -> list[Tensor]:
        """The output leaves in the order of the first step's, whose structure all steps must have."""
        structure = self.program.out_spec
        if self.structure is None:
            self.structure = structure
        if structure == self.structure:
            return outputs
        try:
            leaves = flatten_like(unflatten(outputs, structure), self.structure)
        except ValueError:
            leaves = []
        same = len(leaves) == len(self.structure.leaves) and all(
            isinstance(leaf, Tensor) == self.structure.is_tensor(i) for i, leaf in enumerate(leaves)
        )
        if not same:
            raise StepError(
                message(
                    "What the step returns changes from one step to another.",
                    expected=repr(self.structure),
                    found=repr(structure),
                    fix="return the same structure at every step",
                )
            )
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def _remember(self, xs: list[Tensor], rows: Tensor | None) -> None:
        """Keep each row's latest valid x: what stands in for a masked row where the step needs all rows."""
        with torch.no_grad():
            if rows is None:
                self.seen_xs = [x.detach() for x in xs]
            elif self.seen_xs is None:
                batch: Any = self.call.batch
                self.seen_xs = [x[:1].expand(batch, *x.shape[1:]).index_copy(0, rows, x).detach() for x in xs]
            else:
                self.seen_xs = [seen.index_copy(0, rows, x).detach() for seen, x in zip(self.seen_xs, xs, strict=True)]

    def _reset(self, t: int, rows: Tensor | None, states: list[Tensor]) -> list[Tensor]:
        if self.call.resets is None:
            return states
        reset = self.call.resets[t].to(self.call.device)
        targets: Any = self.call.reset_to
        if rows is not None:
            reset = reset.index_select(0, rows)
            targets = [target.index_select(0, rows) for target in targets]
        return [
            torch.where(wide(reset, s), target, s)
            for s, target in zip(states, targets, strict=True)
        ]

    # outputs

    def _spread(self, some: list[Tensor], rows: Tensor, last: list[Tensor] | None) -> list[Tensor]:
        """Outputs of some rows to (B, ...): the others get zeros, or what they had before."""
        if last is None or self.call.on_masked == "zero":
            batch: Any = self.call.batch
            last = [o.new_zeros((batch, *o.shape[1:])) for o in some]
        return [whole.index_copy(0, rows, o) for whole, o in zip(last, some, strict=True)]

    def _absent(self, last: list[Tensor]) -> list[Tensor]:
        return last if self.call.on_masked == "repeat" else [torch.zeros_like(o) for o in last]

    def _result(self, outputs: dict[int, list[Tensor]]) -> Result:
        steps, taken = self.call.steps, None
        if self.call.until is not None:
            steps = last_of(self.valid)
            taken = self.valid[:steps].to(self.call.device)
        if not outputs:
            return self._nothing_ran(steps, taken)
        some = next(iter(outputs.values()))
        # steps before the first valid one had no known structure yet
        missing = [torch.zeros_like(o) for o in some] if len(outputs) < steps else []
        at = [outputs.get(t, missing) for t in range(steps)]
        stacked = [torch.stack([step[i] for step in at]) for i in range(len(some))]
        return Result(stacked, self.states, self.structure, taken)

    def _nothing_ran(self, steps: int, taken: Tensor | None) -> Result:
        """No step is valid: the outputs' structure comes from one step on zeros, whose values are dropped."""
        call = self.call
        xs = [x.new_zeros(x.shape[1:]) for x in call.xs]
        with torch.no_grad():
            outputs, _ = self._step(xs, call.constants, call.initial)
        empty = [o.new_zeros((steps, *o.shape)) for o in outputs]
        return Result(empty, _clones(call.initial), self.structure, taken)


def _clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def last_of(taken: Tensor) -> int:
    """How many steps there are up to the last that any row took. taken: (T, B) bool."""
    found = taken.any(1).nonzero()
    return int(found[-1]) + 1 if len(found) else 0


def valid_steps(call: Call) -> Tensor | None:
    """(T, B) bool on the CPU, True where a step is valid; None where all are."""
    return valid_at(call.steps, call.lengths, call.mask)
