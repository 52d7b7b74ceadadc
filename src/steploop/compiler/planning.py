"""What a call would do, without doing it: its Plan, with times where it is profiled."""

from __future__ import annotations

import torch
from torch import Tensor

from ..view.plan_table import counted
from . import capture_store
from .capture import Capture
from .execute import Executable
from .invocation import Invocation
from .ir.graph import op_name
from .masking import masked_call
from .pipeline import batch_guessed, invocation_of, needs_masks, needs_of, run, tensors_of
from .plan import Plan, describe
from .profile import timed
from .program import Call, Program, name_of
from .stages import as_text, recorded_stages


def plan(program: Program, call: Call, *, backend: str = "auto", save: str = "auto") -> Plan:
    """What `run` would do. The backward plan is there when anything that the call reads requires a gradient."""
    return _planned(program, call, backend, save)[0]


def profile(program: Program, call: Call, *, backend: str = "auto", save: str = "auto") -> Plan:
    """The plan of a call with what its pieces took, forward and backward."""
    found, executables, tensors = _planned(program, call, backend, save)
    timed(found, executables, tensors, lambda: run(program, call, backend=backend, save=save))
    return found


def _planned(program: Program, call: Call, backend: str, save: str) -> tuple[Plan, list[Executable], list[Tensor]]:
    """A call's plan, what runs it (forward, and backward where there is one), and the tensors that it reads."""
    program, call = batch_guessed(program, call)
    with torch.enable_grad():
        capture, dependencies = capture_store.find(program, call)
        if needs_masks(program, call, capture):
            program, call, _ = masked_call(program, call)
            return _planned(program, call, backend, save)
        tensors = tensors_of(call, capture, dependencies)
        training = any(t.requires_grad for t in tensors)
        if training:
            capture, dependencies = capture_store.with_gradient(program, call, capture, dependencies)
            if needs_masks(program, call, capture):
                program, call, _ = masked_call(program, call)
                return _planned(program, call, backend, save)
            tensors = tensors_of(call, capture, dependencies, joint=True)
        invocation = invocation_of(capture, call, backend, save, training, False, tensors)
    name = name_of(program)
    notes = [*_inlined_notes(capture), *_saved_note(invocation)]
    executables = [invocation.forward.executable]
    forward = describe(executables[0], f"{name} forward", notes)
    if training:
        needs = needs_of(invocation.layout, tensors)
        executables.append(invocation.lowered.backward(needs, call.resets is not None).executable)
        forward.backward = describe(executables[1], f"{name} backward")
    forward.again = lambda: _stages(program, call, backend, save)
    return forward, executables, tensors


def _stages(program: Program, call: Call, backend: str, save: str) -> str:
    """The texts of all stages: the call is planned once more, from the capture on."""
    with recorded_stages() as found:
        plan(program, call, backend=backend, save=save)
    return as_text(found)


def _inlined_notes(capture: Capture) -> list[str]:
    return [f"{name} runs step by step: what it reads depends on what it gives" for name in capture.forward.inlined]


def _saved_note(invocation: Invocation) -> list[str]:
    if invocation.lowered.saving is None:
        return []
    joint = invocation.trace.graph
    names = invocation.program.state_names
    nodes = invocation.lowered.saving.nodes
    kept = [f"state {names[joint.nexts.index(n)]}" for n in nodes if n in joint.nexts]
    others = [n.args[0] if op_name(n) == "getitem" else n for n in nodes if n not in joint.nexts]
    kept += [counted(map(op_name, others))] if others else []
    notes = [f"kept for the backward: {', '.join(kept) or 'nothing but the inputs'}"]
    if again := invocation.lowered.saving.again:
        made = [f"state {names[joint.nexts.index(n)]}" if n in joint.nexts else op_name(n) for n in again]
        notes.append(f"made again for the backward, some steps at a time: {', '.join(made)}")
    return notes
