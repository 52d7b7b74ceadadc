"""scan: a function instead of a class, with `jax.lax.scan`'s contract; and `plan` for both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from . import dispatch, torchscript
from .compiler.program import Call, Program, Result, StepOutput
from .devices import check_call, explained
from .errors import CarryError, InputError, StepError, defined_at, describe, describe_type, message
from .frame import run_in
from .inputs import check_plain, checked_lengths, checked_mask
from .loop import Loop
from .step import Step
from .tracebacks import ends_at_the_call
from .tree import Structure, flatten, flatten_like, unflatten

Carry = TypeVar("Carry")
X = TypeVar("X")
Y = TypeVar("Y")


@ends_at_the_call
def scan(
    fn: Callable[[Carry, X], tuple[Carry, Y]],
    init: Carry,
    xs: X,
    *,
    length: int | None = None,
    reverse: bool = False,
    lengths: Any = None,
    mask: Any = None,
    resets: Any = None,
    backend: str = "auto",
) -> tuple[Carry, Y]:
    """carry, ys = scan(fn, init, xs): run `carry, y = fn(carry, x)` over axis 0 of xs.

    fn:      takes the carry and one slice of xs, returns (carry, y). May close over tensors and modules;
             gradients flow to them. What it writes in place is never seen outside.
    init:    the first carry, a pytree of tensors. None and Python numbers in it pass through unchanged.
    xs:      a pytree of tensors (T, ...), or None: then `length=` gives T and fn gets None.
    reverse: from the last step to the first; ys[t] still belongs to xs[t].
    lengths, mask, resets: as in `sl.Loop`: (B,) ints, (T, B) bool, (T, B) bool. With any of them, every
             tensor of init and y is (B, ...) and of xs (T, B, ...); ys are zero at masked steps; resets
             return to `init`.

    Returns the last carry and the ys stacked on axis 0. T = 0 returns init and empty ys of one step's
    structure.
    Raises CarryError where the carry changes shape, dtype or structure; InputError; UnsupportedError.
    Contract: https://docs.jax.dev/en/latest/_autosummary/jax.lax.scan.html
    """
    options = dict(length=length, reverse=reverse, lengths=lengths, mask=mask, resets=resets)
    if torch.compiler.is_dynamo_compiling():
        return _outside_dynamo(fn, init, xs, backend, options)
    return _scan(fn, init, xs, backend, options)


def _scan(fn: Any, init: Any, xs: Any, backend: str, options: dict[str, Any]) -> tuple[Any, Any]:
    dispatch.checked_backend(backend)
    torchscript.refuse(backend)
    prepared = prepare_scan(fn, init, xs, **options)
    with explained(fn, init, xs):
        return prepared.finish(dispatch.run(prepared.program, prepared.call, backend))


_outside_dynamo = _disable_dynamo(_scan)  # a scan is compiled already; its capture is none of dynamo's business


@ends_at_the_call
def plan(what: Any, *arguments: Any, **options: Any) -> Any:
    """The Plan by which a call runs: `plan(fn, init, xs, ...)` for scan, `plan(loop, xs, ...)` else."""
    if isinstance(what, Step):
        return what.whole_sequence().plan(*arguments, **options)
    if isinstance(what, Loop):
        return what.plan(*arguments, **options)
    if isinstance(what, (type, nn.Module)) or not callable(what) or len(arguments) < 2:
        raise InputError(
            message(
                "sl.plan takes a Loop or a Step with the inputs of a call, or what sl.scan takes.",
                expected="sl.plan(loop, xs, ...) or sl.plan(fn, init, xs, ...)",
                found=f"the class {what.__name__}" if isinstance(what, type) else f"{describe(what)} and "
                f"{len(arguments)} argument(s)",
                fix=f"sl.plan({what.__name__}(...), xs)" if isinstance(what, type) else "sl.plan(fn, init, xs)",
            )
        )
    backend = dispatch.checked_backend(options.pop("backend", "auto"))
    prepared = prepare_scan(what, *arguments, **options)
    with explained(what, arguments):
        return dispatch.plan(prepared.program, prepared.call, backend)


@dataclass(eq=False)
class PreparedScan:
    """A checked call of scan, and what is needed to give its result back in the caller's form."""

    program: Program
    call: Call
    carry: Structure

    def finish(self, result: Result) -> tuple[Any, Any]:
        """(carry, ys) as the caller sees them."""
        structure = result.out_spec if result.out_spec is not None else self.program.out_spec
        return unflatten(result.states, self.carry), unflatten(result.outputs, structure)


def prepare_scan(
    fn: Any,
    init: Any,
    xs: Any,
    *,
    length: Any = None,
    reverse: bool = False,
    lengths: Any = None,
    mask: Any = None,
    resets: Any = None,
) -> PreparedScan:
    """Everything checked and flat."""
    if not callable(fn):
        raise StepError(
            message("sl.scan takes a function.", expected="fn(carry, x) -> (carry, y)", found=describe(fn))
        )
    carries, carry_structure = flatten(init)
    check_plain(carry_structure, "the carry")
    tensors, x_structure = flatten(xs)
    check_plain(x_structure, "a sequence")
    steps = _steps(tensors, x_structure, length)
    batched = not (lengths is None and mask is None and resets is None)
    batch = None
    if batched:
        batch = _batch(lengths, mask, resets)
        _check_rows(carries, carry_structure.names("init"), 0, batch)
        _check_rows(tensors, x_structure.names("xs"), 1, batch)
    call = Call(
        xs=tensors,
        constants=[],
        initial=carries,
        steps=steps,
        batch=batch,
        reset_to=carries if resets is not None else None,
        lengths=None if lengths is None else checked_lengths(lengths, steps, batch),
        mask=None if mask is None else checked_mask(mask, "mask", steps, batch, False),
        resets=None if resets is None else checked_mask(resets, "resets", steps, batch, False),
        reverse=bool(reverse),
    )
    run = ScanFunction(fn, carry_structure, x_structure, batched)
    program = Program(
        run=run,
        root=fn,
        key=("scan", carry_structure.shape, x_structure.shape, batched),
        state_names=carry_structure.names("carry"),
        x_names=x_structure.names("x"),
        constant_names=[],
        constant_batched=[],
        batched=batched,
        statics=[*carry_structure.statics("carry"), *x_structure.statics("x")],
    )
    run.program = program
    check_call(program, call)
    return PreparedScan(program, call, carry_structure)


class ScanFunction:
    """run(xs, constants, prevs) -> (outputs, nexts): one call of a scan's function, and the checks on it."""

    def __init__(self, fn: Any, carry: Structure, x: Structure, batched: bool) -> None:
        self.fn = fn
        self.carry = carry
        self.x = x
        self.batched = batched
        self.program: Any = None  # the Program, set once it is made of this function

    def __call__(
        self, xs: Sequence[Tensor], constants: Sequence[Tensor], prevs: Sequence[Tensor]
    ) -> StepOutput:
        # frames outside are hidden: a Step called in here runs its own whole sequence
        with run_in(None):
            returned = self.fn(unflatten(prevs, self.carry), unflatten(xs, self.x))
        if not isinstance(returned, (tuple, list)) or len(returned) != 2:
            raise StepError(
                message(
                    "The function given to sl.scan does not return a pair.",
                    expected="(carry, y)",
                    found=f"a tuple of {len(returned)}"
                    if isinstance(returned, tuple)
                    else describe(returned),
                    at=defined_at(self.fn),
                    fix="return carry, y  (y may be None)",
                )
            )
        carry, y = returned
        nexts = self._checked_carry(carry, prevs)
        outputs, self.program.out_spec = flatten(y)
        if self.batched:
            batch = [*prevs, *xs][0].shape[0] if prevs or xs else None
            _check_rows(outputs, self.program.out_spec.names("y"), 0, batch)
        return outputs, nexts

    def _checked_carry(self, carry: Any, prevs: Sequence[Tensor]) -> list[Tensor]:
        try:
            leaves = flatten_like(carry, self.carry)
        except ValueError:
            raise CarryError(self._other_structure(carry)) from None
        before = iter(prevs)
        nexts = []
        for i, leaf in enumerate(leaves):
            if self.carry.is_tensor(i):
                prev = next(before)
                if not isinstance(leaf, Tensor) or leaf.dtype != prev.dtype or leaf.shape != prev.shape:
                    raise CarryError(self._other_type(i, prev, leaf))
                nexts.append(leaf)
            elif not self.carry.same_static(i, leaf):
                raise CarryError(self._other_static(i, leaf))
        return nexts

    def _other_structure(self, carry: Any) -> str:
        return message(
            "The carry that fn returns has another structure than the carry it took.",
            expected=repr(self.carry),
            found=repr(flatten(carry)[1]),
            at=defined_at(self.fn),
            fix="return the carry with the same tuples, lists and dict keys as init",
        )

    def _other_type(self, i: int, prev: Tensor, leaf: Any) -> str:
        name = self.carry.leaf_names("carry")[i]
        expected = describe_type(prev.shape, prev.dtype)
        if not isinstance(leaf, Tensor):
            fix = f"return a tensor of that type for {name} (torch.full_like for a number)"
        elif leaf.shape == prev.shape:
            fix = f"in fn: {name}.to({prev.dtype}), or start with init of dtype {leaf.dtype}"
        else:
            fix = f"start with init of shape {tuple(leaf.shape)}, or keep the shape of {name} in fn"
        return message(
            f"{name} changes type from one step to the next.",
            expected=f"{name}: {expected}, as in init",
            found=f"{name}: {describe(leaf)}",
            at=defined_at(self.fn),
            fix=fix,
        )

    def _other_static(self, i: int, leaf: Any) -> str:
        name = self.carry.leaf_names("carry")[i]
        return message(
            f"{name} is not a tensor in init, and fn changes it; only tensors can change from step to step.",
            expected=f"{name}: {describe(self.carry.leaves[i])}, as in init",
            found=f"{name}: {describe(leaf)}",
            at=defined_at(self.fn),
            fix=f"start {name} as a tensor: torch.tensor(...) or torch.zeros(...) in init",
        )


def _steps(tensors: list[Tensor], structure: Structure, length: Any) -> Any:
    if length is not None and (isinstance(length, bool) or not hasattr(length, "__index__") or length < 0):
        raise InputError(
            message("`length` is a number of steps.", expected="an int >= 0", found=describe(length))
        )
    steps = length
    first = "length="
    for i, tensor in enumerate(tensors):
        if tensor.dim() == 0 or (steps is not None and tensor.shape[0] != steps):
            name = structure.names("xs")[i]
            raise InputError(
                message(
                    f"{name} does not have T first.",
                    expected=f"({steps if steps is not None else 'T'}, ...), the T of {first}",
                    found=describe(tensor),
                    fix="xs has one slice per step on axis 0; close over what is the same at every step",
                )
            )
        if steps is None:
            steps, first = tensor.shape[0], structure.names("xs")[i]
    if steps is None:
        raise InputError(
            message(
                "Nothing tells how many steps to run: xs has no tensors.",
                expected="length=",
                fix="sl.scan(fn, init, None, length=10)",
            )
        )
    return steps


def _batch(lengths: Any, mask: Any, resets: Any) -> Any:
    for given, axis in ((lengths, 0), (mask, 1), (resets, 1)):
        shape = getattr(given, "shape", None)
        if shape is None and given is not None:
            return len(given) if axis == 0 else len(given[0])
        if shape is not None and len(shape) > axis:
            return shape[axis]
    raise InputError(
        message(
            "Nothing tells how many rows the batch has.",
            expected="lengths (B,), mask (T, B) or resets (T, B)",
            found=", ".join(describe(given) for given in (lengths, mask, resets) if given is not None),
        )
    )


def _check_rows(tensors: Sequence[Tensor], names: list[str], axis: int, batch: Any) -> None:
    for tensor, name in zip(tensors, names, strict=True):
        if tensor.dim() <= axis or tensor.shape[axis] != batch:
            raise InputError(
                message(
                    f"With lengths, mask or resets every tensor has a batch axis, and {name} does not fit.",
                    expected=f"({batch}, ...)" if axis == 0 else f"(T, {batch}, ...)",
                    found=describe(tensor),
                    fix="give it B rows (expand works), or close over it if it is the same at every step",
                )
            )
