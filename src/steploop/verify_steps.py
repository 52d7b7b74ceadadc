"""Steps that turn numbers into decisions, compared one by one: a rounding may send two runs apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .backends import reference
from .compare import Difference
from .compiler.program import Call, Program, Result
from .verify_runs import Run, differences, dtypes_of

Way = Callable[[Program, Call], Result]


class _DiscreteOps(TorchDispatchMode):
    """Notes whether an operation that turns numbers into decisions runs."""

    NAMES = frozenset(
        "argmax argmin topk sort argsort max min eq ne gt ge lt le round floor ceil trunc sign sgn heaviside "
        "multinomial bernoulli bucketize searchsorted floor_divide remainder fmod kthvalue mode median "
        "isnan nonzero masked_select unique cummax cummin one_hot largest_places".split()
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        to_integers = (
            name in ("_to_copy", "copy")
            and isinstance(result, Tensor)
            and not result.is_floating_point()
            and isinstance(args[-1], Tensor)
            and args[-1].is_floating_point()
        )
        self.found = self.found or name in self.NAMES or to_integers
        return result


def is_discrete(prepared: Any) -> bool:
    call = prepared.call
    if any(not (s.is_floating_point() or s.is_complex()) for s in call.initial):
        return True
    short = dataclasses.replace(call, steps=min(1, call.steps), xs=[x[:1] for x in call.xs])
    short = dataclasses.replace(short, lengths=None, mask=None, resets=None, reset_to=None)
    with torch.no_grad(), _DiscreteOps() as seen:
        outputs = reference.run(prepared.program, short).outputs
    return seen.found or any(not (o.is_floating_point() or o.is_complex()) for o in outputs)


def step_by_step(
    root: Any, ways: Sequence[Way], prepared: Any, parameters: list[tuple[str, Tensor]] | None
) -> list[Difference]:
    """Each step alone, both ways, from the state that the first way has reached. The worst per tensor."""
    worst: dict[tuple[str, str], Difference] = {}
    program, call = prepared.program, prepared.call
    states, dtypes = [state.detach() for state in call.initial], dtypes_of(root, call)
    for t in reversed(range(call.steps)) if call.reverse else range(call.steps):
        runs = []
        for run in ways:
            one, targets = _one_step(program, call, t, states)
            wanted = None if parameters is None else [*targets, *parameters]
            runs.append(Run.of(program, one, run, wanted))
        for difference in differences(runs[0], runs[1], dtypes):
            if difference.kind != "output":
                difference.name += f" after step {t}"
            elif difference.index:
                difference.index = (t, *difference.index[1:])
            key = (difference.kind, difference.name.split(" after")[0])
            if key not in worst or difference.badness > worst[key].badness:
                worst[key] = difference
        states = [state.detach() for _, state in runs[0].states]
    return list(worst.values())


def _one_step(
    program: Program, call: Call, t: int, states: list[Tensor]
) -> tuple[Call, list[tuple[str, Tensor]]]:
    targets: list[tuple[str, Tensor]] = []

    def leaf(tensor: Tensor, name: str) -> Tensor:
        tensor = tensor.detach().clone()
        if tensor.is_floating_point() or tensor.is_complex():
            targets.append((name, tensor.requires_grad_()))
        return tensor

    valid = reference.valid_steps(call)
    one = dataclasses.replace(
        call,
        steps=1,
        xs=[leaf(x[t : t + 1], f"xs ({name})") for x, name in zip(call.xs, program.x_names, strict=True)],
        constants=[leaf(c, name) for c, name in zip(call.constants, program.constant_names, strict=True)],
        initial=[leaf(s, f"state {name}") for s, name in zip(states, program.state_names, strict=True)],
        reset_to=None if call.reset_to is None else [target.detach() for target in call.reset_to],
        lengths=None,
        mask=None if valid is None else valid[t : t + 1],
        resets=None if call.resets is None else call.resets[t : t + 1],
        reverse=False,
    )
    return one, targets
