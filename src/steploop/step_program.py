"""A Step as a Program: the flat function that the compiler and every backend run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from .arguments import Arguments
from .compiler.program import Program, StepOutput
from .errors import StepError, describe, message
from .frame import Frame, run_in
from .signature import signature_of
from .states import States
from .step import Step, Survey
from .tree import Structure, flatten, unflatten

# Programs kept per Step. A step seen with more structures than this forgets the oldest.
_KEPT_PROGRAMS = 32


def program_of(step: Step, tree: Survey, arguments: Arguments) -> Program:
    """The Program of a Step for arguments of this structure; the same object at every call."""
    kept = step._kept.setdefault("programs", {})
    structures = arguments.x_structure, arguments.constant_structure
    rest = tuple(arguments.constant_batched), tuple(tree.names)
    key = (*structures, *rest)
    found = kept.get(key)
    if found is None or found.run.states != tree.states:
        if len(kept) >= _KEPT_PROGRAMS:
            kept.pop(next(iter(kept)))
        shapes = tuple(structure.shape for structure in structures)
        found = kept[key] = _make(step, tree, arguments, (*shapes, *rest))
    return found


def _make(step: Step, tree: Survey, arguments: Arguments, key: Any) -> Program:
    x_names, constant_names = _names(step, arguments)
    batched = unflatten(arguments.constant_batched, arguments.constant_structure)
    run = StepFunction(step, tree, arguments.x_structure, arguments.constant_structure, batched)
    program = Program(
        run=run,
        root=step,
        key=key,
        state_names=list(tree.names),
        x_names=x_names,
        constant_names=constant_names,
        constant_batched=list(arguments.constant_batched),
        statics=[*arguments.x_structure.statics("x"), *arguments.constant_structure.statics("")],
    )
    run.program = program
    return program


def _names(step: Step, arguments: Arguments) -> tuple[list[str], list[str]]:
    """Readable names: an argument's own name, with [0] or ['key'] where it is a pytree."""
    given = signature_of(step).positional
    names = []
    for name in arguments.x_structure.names(""):
        number, _, rest = name[1:].partition("]")
        position = int(number)
        names.append((given[position] if position < len(given) else f"x{position}") + rest)
    constants = []
    for name in arguments.constant_structure.names(""):
        key, _, rest = name[2:].partition("']")
        constants.append(key + rest)
    return names, constants


class StepFunction:
    """run(xs, constants, prevs) -> (outputs, nexts): one call of a Step inside a Frame of its own."""

    def __init__(
        self, step: Step, tree: Survey, x_structure: Structure, constant_structure: Structure,
        batched: dict[str, Any],
    ) -> None:  # fmt: skip
        self.step = step
        self.states = list(tree.states)
        self.names = dict(zip(tree.states, tree.names, strict=True))
        self.x_structure = x_structure
        self.constant_structure = constant_structure
        self.batched = batched
        self.program: Program | None = None

    def __call__(
        self, xs: Sequence[Tensor], constants: Sequence[Tensor], prevs: Sequence[Tensor]
    ) -> StepOutput:
        frame = Frame(self.names, dict(zip(self.states, prevs, strict=True)), "step")
        frame.batched = self.batched
        with run_in(frame):
            returned = self.step(
                *unflatten(xs, self.x_structure), **unflatten(constants, self.constant_structure)
            )
        if isinstance(returned, (tuple, list)) and any(isinstance(value, States) for value in returned):
            raise StepError(_returned_states(type(self.step).__name__))
        outputs, cast(Program, self.program).out_spec = flatten(returned)
        self._check_rows(outputs, [*xs, *prevs])
        return outputs, frame.nexts(self.states)

    def _check_rows(self, outputs: list[Tensor], batched: list[Tensor]) -> None:
        if not batched:
            return
        batch = batched[0].shape[0]
        for i, output in enumerate(outputs):
            if output.dim() == 0 or output.shape[0] != batch:
                name = cast(Program, self.program).out_spec.names("output")[i]
                raise StepError(
                    message(
                        f"{type(self.step).__name__}.step returned {name} without the batch axis first.",
                        expected=f"({batch}, ...)",
                        found=describe(output),
                        fix="return (B, ...) tensors: keep dim 0, and reduce over the batch after the loop",
                    )
                )


def _returned_states(owner: str) -> str:
    return message(
        f"{owner}.step returned an sl.States: a loop or a layer over whole sequences was called in it.",
        expected="tensors (B, ...), or trees of them",
        found="(outputs, States), which an inner sequence gives",
        fix="ys, _ = self.layer(x), for an inner sequence x (S, B, ...); a layer that is to read this step's own "
        "sequence stands before the loop: ys, _ = layer(xs);  loop(ys)",
    )
