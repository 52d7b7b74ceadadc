"""Adds the gradient to a capture: traces the step together with it, and checks that both are of one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .capture import Capture, hint, lock, symbol_values
from .dependencies import Dependencies
from .free_numbers import FreeNumber, NotFree
from .making import checked, read_by, settle, settled_floats, side_effect_of, snapshot
from .memory_operator import calls_in, tracing
from .passes.histories import use_whole_histories
from .passes.manager import find_mixing, simplify
from .patience import long_part
from .program import Call, Program, name_of, roots_of
from .recorder import Recorder
from .trace import Observed, Trace
from .trace_step import FixedBatch, trace_joint
from .two_runs import check_same


def with_joint(capture: Capture, dependencies: Dependencies, call: Call) -> Dependencies:
    """Captures the gradient too, if it has not been. Gives the walk that the captured tensors are found in.

    FixedBatch where the gradient holds for another number of rows than the call's. NotFree where floats that are inputs
    of the capture can be none of its gradient.
    """
    with lock:
        if capture.joint is not None:
            return dependencies
        if capture.no_joint:
            raise FixedBatch("the gradient computes with the number of rows")
        if capture.not_free:
            raise NotFree(set(capture.not_free))
        with long_part(f"capturing {name_of(dependencies.program)} with its gradient"):
            return _add_joint(capture, dependencies, call)


def _check_holds(capture: Capture, joint: Trace, call: Call, dependencies: Dependencies) -> None:
    """FixedBatch where a gradient that was traced for any number of rows does not hold for the call's."""
    if not capture.symbolic:
        return
    if hint(call.batch) in (0, 1):  # torch takes these for cases of their own, and most steps don't
        holds = not joint.fixes
    else:
        sizes = {k: hint(v) for k, v in symbol_values(joint, call).items()}
        holds = joint.holds_for(sizes, dependencies.float_values())
    if not holds:
        raise FixedBatch("the gradient computes with the number of rows")


def _add_joint(capture: Capture, dependencies: Dependencies, call: Call) -> Dependencies:
    program = dependencies.program
    tensors = [t for t, s in zip(capture.tensors(dependencies), capture.slots) if not isinstance(s, FreeNumber)]
    free = capture.free(dependencies)
    before, recorder, seed = snapshot(program), Recorder(), torch.initial_seed()
    try:
        joint = _joint(capture, program, tensors, set(capture.inline), Observed(recorder, free))
        opaque = {id(call.op) for call in calls_in(joint.graph.graph)}
        if opaque and find_mixing(joint.graph):
            # Where gradients mix rows, everything may have to be one loop.
            joint = _joint(capture, program, tensors, opaque | set(capture.inline), Observed(recorder, free))
        _check_holds(capture, joint, call, dependencies)
    except Exception as error:
        capture.no_joint = isinstance(error, FixedBatch)
        with _disable_current_modes():
            before.restore()
        if isinstance(error, NotFree):
            capture.not_free = frozenset(error.paths)
        elif free and not capture.no_joint:  # the step may do with a float what no symbol can do
            capture.not_free = frozenset(number.path for number in free)
            raise NotFree(set(capture.not_free)) from error
        raise
    with _disable_current_modes():
        if changed := checked(before, recorder, seed):
            before.restore()
            if not capture.by_tracing.issuperset(changed):
                raise side_effect_of(changed)
    check_same(capture.forward, joint)
    joint.keep_alive.extend(use_whole_histories(joint.graph))
    return _with_more_reads(capture, dependencies, joint, recorder)


def _joint(
    capture: Capture, program: Program, tensors: list[Tensor], inline: set[int], observed: Observed
) -> Trace:
    if capture.symbolic:
        with tracing(inline) as memory:
            joint = trace_joint(program, capture.signature, True, capture.forward.graph, tensors, observed)
        joint.keep_alive.extend(memory.calls)
    else:  # as in `_fixed_trace`
        joint = trace_joint(program, capture.signature, False, capture.forward.graph, tensors, observed)
    simplify(joint.graph)
    return joint


def _with_more_reads(
    capture: Capture, dependencies: Dependencies, joint: Trace, recorder: Recorder
) -> Dependencies:
    """With a gradient the step may have read more than without: the capture is described anew by all of it."""
    old = capture.reads
    walk = read_by(dependencies.program, recorder, [old])
    if not walk.reads.within(old):
        reads = walk.reads.joined(old)
        with _disable_current_modes():
            walk = Dependencies(roots_of(dependencies.program), reads)
        walk.program = dependencies.program
        free = capture.free(dependencies)
        capture.earlier[old] = capture.slots
        capture.slots = _renumbered(capture.slots, dependencies, walk)
        capture.forward.tensors = cast("list[Any]", capture.slots)
        capture.reads, capture.key, capture.facts = reads, walk.key, walk.facts
        capture.floats, capture.pinned = settled_floats(walk, free), walk.pinned
        walk.program.kept.walks[reads] = walk
        walk.program.kept.quick = None
    else:
        walk = dependencies
    capture.joint = joint
    capture.joint_slots = settle(joint, walk)
    return walk


def _renumbered(slots: Sequence[Any], old: Dependencies, new: Dependencies) -> list[Any]:
    number = {id(t): i for i, t in enumerate(new.tensors)}
    found = [old.tensors[s] if isinstance(s, int) else s for s in slots]
    return [s if isinstance(s, FreeNumber) else number.get(id(s), s) for s in found]
