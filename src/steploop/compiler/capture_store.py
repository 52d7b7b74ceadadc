"""Captures that are kept, and when one may be used again.

A capture belongs to a step (or a function's code), to what the step depended on, to the settings of torch, and to the
shapes of its inputs. The batch size is free; another axis becomes free when a second size of it is seen, so a new size
captures anew at most once per axis. Sizes 0 and 1 are cases of their own on every axis, as they are for torch.
"""

from __future__ import annotations

import os
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import UnsupportedError, message, warn
from . import making, making_joint
from .ambient import ambient
from .capture import Capture, ProgramFacts, hint, is_batch, lock, same_float, symbol_values
from .dependencies import Dependencies
from .few_rows import same_for_few
from .free_numbers import NotFree
from .memory_operator import all_step_by_step
from .passes.manager import find_mixing
from .patience import long_part
from .program import Call, Program, name_of, roots_of
from .reads import EVERYTHING, Reads, kind_of_file, trusted
from .stages import aside, looking
from .trace import Leaf, Signature
from .trace_step import FixedBatch
from .walk import Number

_CHECK = os.environ.get("STEPLOOP_CHECK", "") not in ("", "0")
MOST = 64  # captures that are kept of one step for inputs of one kind
MANY = 3  # captures because of a changed value, after which a warning says so

_TORCH = ("aten", "prims")  # namespaces of operations
_BY_ROOT: weakref.WeakKeyDictionary[Any, dict[Hashable, list[Capture]]] = weakref.WeakKeyDictionary()
_OTHERS: dict[Hashable, list[Capture]] = {}
captured = 0  # how many captures were made in this process; tests look at it


def walk_of(program: Program, reads: Reads) -> Dependencies:
    """The walk for what a capture has read, kept on the Program: in a table it would keep its own key alive."""
    walks = program.kept.walks
    walk = walks.get(reads)
    if walk is None or not walk.unchanged():
        with lock, _disable_current_modes():  # (while a step is traced, symbols stand in the places of floats)
            walk = walks[reads] = Dependencies(roots_of(program), reads)
            walk.program = program
    walk.reads = reads
    return walk


def everything_of(program: Program) -> Hashable:
    """All that a step can reach, read or not, as one key; for what is learned before a step was captured."""
    walk = walk_of(program, EVERYTHING)
    return walk.key, tuple(number.value for number in walk.floats)


def find(
    program: Program, call: Call, before_making: Callable[[], None] | None = None
) -> tuple[Capture, Dependencies]:
    """The capture for a call, made now if there is none. before_making: called before it is made."""
    settings = (ambient(), symbolic_axes(program, call)) if all_step_by_step() else ambient()
    shapes = _quick_key(call)
    quick = program.kept.quick
    # (a capture gets another key when its gradient turns out to read more, maybe that of another step)
    if quick is not None and quick[0] == (settings, shapes) and quick[3] is quick[1].key and quick[2].unchanged():
        _, capture, dependencies, _ = quick
    else:
        with lock:
            capture, dependencies = _find(program, call, settings, before_making)
        program.kept.quick = (settings, shapes), capture, dependencies, capture.key
    if _CHECK:
        check_kept(program, call, capture, dependencies)
    if capture.forward.fixes:
        _check_rows_stay(program, call, "computes")
    return capture, dependencies


def with_gradient(
    program: Program, call: Call, capture: Capture, dependencies: Dependencies
) -> tuple[Capture, Dependencies]:
    """A capture with its gradient, and the walk that goes with it.

    Another capture, for the call's number of rows alone, where the gradient computes with that. UnsupportedError where
    the number of rows differs from step to step, too.
    """
    try:
        return capture, making_joint.with_joint(capture, dependencies, call)
    except FixedBatch:
        if find_mixing(capture.forward.graph):
            _check_rows_stay(program, call, "lets rows see each other, and its gradient computes")
        capture, dependencies = find_fixed(program, call)
        return capture, making_joint.with_joint(capture, dependencies, call)
    except NotFree as error:
        capture, dependencies = _find_with_numbers(program, call, capture, dependencies, error.paths)
        return with_gradient(program, call, capture, dependencies)


def _check_rows_stay(program: Program, call: Call, what: str) -> None:
    """UnsupportedError where the number of rows that take part differs from step to step."""
    fewer = call.lengths is not None and bool((call.lengths < call.steps).any())
    if fewer or call.mask is not None and not bool(call.mask.all()):
        raise UnsupportedError(
            message(
                f"{name_of(program)} {what} with how many rows there are.",
                expected="the same rows at every step: no lengths and no mask",
                found="rows that take no part in some steps",
                fix='backend="reference" runs any step; or compute with a mask of your own inside the step',
            )
        )


def find_fixed(program: Program, call: Call) -> tuple[Capture, Dependencies]:
    """The capture for a call's number of rows alone: where a gradient computes with that number.

    They are kept by themselves. Calls without gradients have the capture for any number of rows.
    """
    return _find_apart(program, call, "fixed", [], fixed=True)


def _find_with_numbers(
    program: Program, call: Call, capture: Capture, dependencies: Dependencies, paths: set[str]
) -> tuple[Capture, Dependencies]:
    """A capture for what floats are in a call: those, by their paths, that can be no inputs of a gradient."""
    free = [number for number in capture.free(dependencies) if number.path not in paths]
    return _find_apart(program, call, ("numbers", frozenset(number.path for number in free)), free, fixed=False)


def _find_apart(
    program: Program, call: Call, kind: Hashable, free: list[Number], fixed: bool
) -> tuple[Capture, Dependencies]:
    """The capture for a call among those of a kind of its own, made now if there is none."""
    global captured
    with lock:
        signature = signature_of(program, call)
        family = (kind, program.key, program.batched, ambient(), _kinds(signature))
        known = [] if looking() else _store(program).setdefault(family, [])
        kept, alike, _ = _among(known, signature, call, program)
        if kept is not None:
            return kept
        captured += 1
        if not fixed:
            _free_axes(signature, alike)
        with long_part(f"capturing {name_of(program)}"):
            found = making.make(program, signature, call, [c.reads for c in known], free, fixed=fixed)
        if not alike and len(known) >= MANY - 1:
            _warn(program, known[-1], found[0])
        _keep(known, found[0])
        return found


def _among(
    known: list[Capture], signature: Signature, call: Call, program: Program
) -> tuple[tuple[Capture, Dependencies] | None, list[Capture], list[tuple[Capture, Dependencies]]]:
    """The newest capture that a call may use, those that differ in sizes at most, and those in sizes and floats."""
    alike: list[Capture] = []
    near: list[tuple[Capture, Dependencies]] = []
    for capture in reversed(known):
        dependencies = walk_of(program, capture.reads)
        if dependencies.key != capture.key:
            continue
        near.append((capture, dependencies))
        if capture.has_floats(dependencies):
            alike.append(capture)
            if _fits(capture, signature, call, program, dependencies):
                return (capture, dependencies), alike, near
    return None, alike, near


def _free_axes(signature: Signature, alike: list[Capture]) -> None:
    """Axes that captures of other sizes had free, or that differ from theirs, are free in the next."""
    more = (c.signature.dynamic | _differences(c.signature, signature) for c in alike)
    signature.dynamic = signature.dynamic.union(*more)


def checking() -> bool:
    """Whether kept captures are compared with new ones: STEPLOOP_CHECK=1."""
    return _CHECK


def check_kept(program: Program, call: Call, capture: Capture, dependencies: Dependencies) -> None:
    """Compares a kept capture with a new one, at its calls (and streamed steps) number 1, 2, 4, 8, ...: for tests.

    What is captured for it alone counts for nothing, and is no stage of the call.
    """
    global captured
    count = capture.made.calls = capture.made.calls + 1
    if count & (count - 1) == 0:
        before = captured
        try:
            with lock, aside():
                making.check_kept(program, call, capture, dependencies)
        finally:
            captured = before


def _quick_key(call: Call) -> Hashable:
    """Everything of a call's shapes; None where sizes are symbolic (they may not be compared)."""
    def key(t: Tensor) -> tuple[Any, ...]:
        return (tuple(map(hint, t.shape)), t.dtype, t.device)

    return (
        tuple((k[0][1:], *k[1:]) for k in map(key, call.xs)), tuple(map(key, call.constants)),
        tuple(map(key, call.initial)),
        None if call.batch is None else hint(call.batch),
    )  # fmt: skip


def _find(
    program: Program, call: Call, settings: Hashable, before_making: Callable[[], None] | None
) -> tuple[Capture, Dependencies]:
    global captured
    signature = signature_of(program, call)
    family = (program.key, program.batched, settings, _kinds(signature))
    known = [] if looking() else _store(program).setdefault(family, [])
    kept, alike, near = _among(known, signature, call, program)
    if kept is not None:
        return kept
    if (found := _of_an_equal_step(program, signature, call, family, known)) is not None:
        _keep(known, found[0])
        return found
    if before_making is not None:
        before_making()
    captured += 1
    _free_axes(signature, alike)
    if all_step_by_step():  # an exported program has no Python floats that could change
        near = []
    free = [] if not near else alike[0].free(near[0][1]) if alike else _changed_floats(*near[0])
    with long_part(f"capturing {name_of(program)}"):
        capture, dependencies = making.make(program, signature, call, [c.reads for c in known], free)
    if not alike and len(known) >= MANY - 1 and not all_step_by_step():
        _warn(program, known[-1], capture)
    _keep(known, capture)
    _offer(program, capture, dependencies, family)
    return capture, dependencies


def _keep(known: list[Capture], capture: Capture) -> None:
    known.append(capture)
    del known[:-MOST]


# Captures by the class of their step: one may serve another step of the class. They go when their steps go.
_BY_CLASS: weakref.WeakKeyDictionary[type, list[weakref.ref[Capture]]] = weakref.WeakKeyDictionary()


def _offer(program: Program, capture: Capture, dependencies: Dependencies, family: Hashable) -> None:
    if isinstance(program.root, nn.Module) and not all_step_by_step() and _serves_others(capture, dependencies):
        capture.family = family
        kept = _BY_CLASS.setdefault(type(program.root), [])
        kept[:] = [r for r in kept if r() is not None][1 - MOST :] + [weakref.ref(capture)]


def _serves_others(capture: Capture, dependencies: Dependencies) -> bool:
    """Whether a capture says all that its step is: nothing in it is that step's alone, and the step's code does not ask
    which of equal objects it has."""
    trace = capture.forward
    own = trace.keep_alive or capture.inline or capture.by_tracing or dependencies.caches
    own = own or any(isinstance(slot, Tensor) for slot in capture.slots)
    # (more may be known of a user's operation by then)
    own = own or any(getattr(n.target, "namespace", "aten") not in _TORCH for n in trace.graph.graph.nodes)
    structure = capture.out_spec
    if own or structure is None or structure.statics(""):
        return False
    codes = [c for c in dependencies.codes if not trusted(kind_of_file(c.co_filename))]
    return not any({"id", "hash"} & set(c.co_names) for c in codes)


def _of_an_equal_step(
    program: Program, signature: Signature, call: Call, family: Hashable, known: list[Capture]
) -> tuple[Capture, Dependencies] | None:
    """A capture of another step of the same class which holds for this one. known: those that this one has."""
    if looking() or all_step_by_step() or not isinstance(program.root, nn.Module):
        return None
    facts = ProgramFacts.of(program)
    for capture in [r() for r in reversed(_BY_CLASS.get(type(program.root), []))]:
        if capture is None or capture.family != family or capture.program != facts or capture in known:
            continue
        walked = capture.reads in program.kept.walks
        dependencies = walk_of(program, capture.reads)
        if dependencies.key == capture.key and capture.has_floats(dependencies):
            if _fits(capture, signature, call, program, dependencies):
                return capture, dependencies
        if not walked:
            program.kept.walks.pop(capture.reads, None)
    return None


def _changed_floats(capture: Capture, dependencies: Dependencies) -> list[Number]:
    """The floats that are to be inputs: those that are already, and those that are not what they were."""
    pairs = list(zip(capture.floats, dependencies.floats))
    paths = [number.path for _, number in pairs]
    return [
        n for known, n in pairs
        if n.hold is not None and paths.count(n.path) == 1 and (known is None or not same_float(known, n.value))
    ]  # fmt: skip


def _warn(program: Program, before: Capture, now: Capture) -> None:
    """Says that a step is captured again and again, and because of what."""
    old, new = dict(before.facts), dict(now.facts)
    paths = [path for path in new if not _equal(new[path], old.get(path, new[path]))]
    changed = [f"{path} ({old[path]!r}, then {new[path]!r})" for path in paths]
    what = ", ".join(changed[:3]) or "an object that it reads"
    warn(
        f"{name_of(program)} was captured again because something that it reads has changed: {what}. Each capture "
        "takes about as long as the first call did. Give the step what changes as a tensor (a sequence, a constant or "
        "a buffer), or do what depends on it outside the step."
    )


def _equal(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and repr(a) == repr(b))


def _store(program: Program) -> dict[Hashable, list[Capture]]:
    root = program.root
    if isinstance(root, types.FunctionType):
        return _BY_ROOT.setdefault(root.__code__, {})
    kept = getattr(root, "_kept", None)
    if isinstance(kept, dict):
        return kept.setdefault("captures", {})  # in the Step itself, so that they go when it goes
    if isinstance(root, nn.Module):
        return _BY_ROOT.setdefault(root, {})
    while len(_OTHERS) > 256:
        _OTHERS.pop(next(iter(_OTHERS)))
    return _OTHERS


def signature_of(program: Program, call: Call) -> Signature:
    def leaf(tensor: Tensor, batched: bool, per_step: bool) -> Leaf:
        shape = tuple(map(hint, tensor.shape[1:] if per_step else tensor.shape))
        return Leaf(shape, tensor.dtype, tensor.device, batched)

    batched = program.batched
    return Signature(
        [leaf(t, batched, True) for t in call.xs],
        [leaf(t, batched and b, False) for t, b in zip(call.constants, program.constant_batched)],
        [leaf(t, batched, False) for t in call.initial],
        hint(call.batch) if batched else None,
        symbolic_axes(program, call) if all_step_by_step() else frozenset(),
    )


def symbolic_axes(program: Program, call: Call) -> frozenset[tuple[str, int, int]]:
    """The axes besides the batch whose sizes another tracer keeps free; here they are so from the first capture on."""
    found: set[tuple[str, int, int]] = set()
    rows = [("x", [(x.shape[1:], program.batched) for x in call.xs]),
            ("constant", [(c.shape, b) for c, b in zip(call.constants, program.constant_batched)]),
            ("state", [(s.shape, program.batched) for s in call.initial])]  # fmt: skip
    for kind, tensors in rows:
        for i, (shape, batched) in enumerate(tensors):
            found.update((kind, i, d) for d, n in enumerate(shape)
                         if isinstance(n, torch.SymInt) and not (d == 0 and batched))  # fmt: skip
    return frozenset(found)


def _groups(signature: Signature) -> list[tuple[str, int, Leaf]]:
    groups = (("x", signature.xs), ("constant", signature.constants), ("state", signature.states))
    return [(kind, i, leaf) for kind, group in groups for i, leaf in enumerate(group)]


def _kinds(signature: Signature) -> Hashable:
    return tuple((k, len(leaf.shape), leaf.dtype, leaf.device, leaf.batched) for k, _, leaf in _groups(signature))


def _differences(a: Signature, b: Signature) -> set[tuple[str, int, int]]:
    found = set()
    for (kind, i, one), (_, _, two) in zip(_groups(a), _groups(b)):
        for dim, (m, n) in enumerate(zip(one.shape, two.shape)):
            if m != n and not (dim == 0 and one.batched):
                found.add((kind, i, dim))
    return found


def _fits(
    capture: Capture, signature: Signature, call: Call, program: Program, dependencies: Dependencies
) -> bool:
    if capture.batch is not None and capture.batch != signature.batch:
        return False
    if not _differences(capture.signature, signature) <= capture.free_axes():
        return False
    sizes = {k: hint(v) for k, v in symbol_values(capture.forward, call).items()}
    if any(size < 2 for name, size in sizes.items() if not is_batch(capture.forward, name)):
        return False
    if signature.batch in (0, 1) and capture.batch is None:
        fixed = capture.joint is not None and capture.joint.fixes
        if fixed or not same_for_few(capture, signature.batch, program, dependencies):
            return False
        likely = capture.signature.batch_hint
        sizes = {name: likely if is_batch(capture.forward, name) else size for name, size in sizes.items()}
    floats = dependencies.float_values()
    return all(t.holds_for(sizes, floats) for t in (capture.forward, capture.joint) if t is not None)
