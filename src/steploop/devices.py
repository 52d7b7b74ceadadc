"""On which devices the tensors of a call are: all on one, or an InputError that names them and says what to type.

`lengths`, `mask` and `resets` may be anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .closed_over import trainable
from .compiler.program import Call, Program
from .errors import InputError, StepError, SteploopError, message, raised_at
from .tree import flatten

# What torch says where an operation gets tensors of several devices: its kernels, its fake tensors, cuDNN.
_MIXED = re.compile(r"(on|at) the same device|same device as|two different devices|is not on the expected device")


def check_call(program: Program, call: Call) -> None:
    """InputError unless sequences, states and constants with a batch axis are on one device."""
    device = None
    for tensor in (*call.xs, *call.initial):
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            _refuse_call(program, call)
    for tensor, batched in zip(call.constants, program.constant_batched, strict=True):
        if batched and device is not None and tensor.device != device:
            _refuse_call(program, call)


def _refuse_call(program: Program, call: Call) -> None:
    named = [*zip(program.x_names, call.xs), *zip(program.state_names, call.initial)]
    named += [(n, c) for n, c, b in zip(program.constant_names, call.constants, program.constant_batched) if b]
    weights = next(program.root.parameters(), None) if isinstance(program.root, nn.Module) else None
    wanted = (named[0][1] if weights is None else weights).device
    other = next(n for n, tensor in named if tensor.device != wanted)
    what = f'state.to("{wanted}")' if other in program.state_names else f'{other}.to("{wanted}")'
    raise InputError(
        message(
            "The tensors of this call are on several devices.",
            expected="sequences, constants and states on one device (lengths, mask and resets may be on any)",
            found=", ".join(f"{n} on {tensor.device}" for n, tensor in named),
            fix=what,
        )
    )


class explained:
    """`with explained(root, *given):` torch's error about several devices becomes an InputError that names them.

    root: the module or function that runs. given: what the caller gave it.
    Only torch knows which tensors may meet (a number on the CPU may meet anything), so it is torch that looks.
    """

    def __init__(self, root: Any, *given: Any) -> None:
        self.root, self.given = root, given

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        ours = isinstance(error, SteploopError) and not isinstance(error, StepError)
        if isinstance(error, (RuntimeError, StepError)) and not ours and _MIXED.search(str(error)):
            raise InputError(self._text(error)) from error

    def _text(self, error: BaseException) -> str:
        given = _devices(flatten(self.given)[0])
        own = _devices(_reached(self.root))
        found = f"the call's tensors on {given or 'none'}, its parameters and what it closes over on {own or 'none'}"
        fix = "create tensors in the step with device=x.device, and move what it closes over there"
        if given and own and given != own:
            whose = "step" if isinstance(self.root, nn.Module) else "module"
            fix = f'{whose}.to("{given}"), or x.to("{own}")' if "," not in given + own else f'everything to("{given}")'
        return message(
            "The step brings tensors of several devices together.",
            expected="the step's parameters, buffers and other tensors on the device of what it is given",
            found=found,
            at=raised_at(error.__cause__ or error) or None,
            fix=fix,
        )


def _reached(root: Any) -> list[Tensor]:
    found = [tensor for _, tensor in trainable(root)]
    return [*found, *root.parameters(), *root.buffers()] if isinstance(root, nn.Module) else found


def _devices(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({str(t.device) for t in tensors}))
