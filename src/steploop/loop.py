"""Loop: a Step run over whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn.utils.rnn import PackedSequence

from . import dispatch, sizing, torchscript, tracked
from . import until as ending
from .arguments import check_on_masked, take_apart
from .call_sizes import CallSizes
from .compiler.program import Call
from .devices import check_call, explained
from .errors import InputError, StepError, UnsupportedError, describe, message
from .initial import require
from .inputs import (
    check_constants,
    checked_lengths,
    checked_mask,
    time_and_batch,
)
from .packed import last_of, unpack
from .prepared import Prepared
from .signature import signature_of
from .states import States, given_states
from .step import Step, Unbatched, survey
from .step_program import program_of
from .stream import Stream
from .tracebacks import ends_at_the_call
from .tree import flatten, unflatten

if TYPE_CHECKING:
    from typing_extensions import Self

Y = TypeVar("Y")  # what one step returns; a loop's outputs have the same structure, with T before B
Y_co = TypeVar("Y_co", covariant=True)


class _Steps(Protocol[Y_co]):
    """A Step, told by the type of what its `step` returns."""

    @property
    def step(self) -> Callable[..., Y_co]: ...


@_disable_dynamo
def _outside_dynamo(loop: Loop[Any], xs: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
    """A call under torch.compile: a Loop is compiled already, and its capture is none of dynamo's business."""
    return loop._run(xs, arguments)


@_disable_dynamo
def _stream_outside_dynamo(loop: Loop[Any], *arguments: Any) -> Stream[Any]:
    return Stream(loop, *arguments)


class Loop(nn.Module, Generic[Y]):
    """A Step over whole sequences; an nn.Module whose parameters are the Step's, under "step.".

    outputs, state = loop(xs, ..., state=None, lengths=None, mask=None, resets=None, steps=None,
                          batch_size=None, on_masked="zero", **constants)

    step:        the Step. Any number of Loops may be made of one.
    batch_first: xs, mask, resets and outputs are (B, T, ...) instead of (T, B, ...).
    reverse:     run from each row's last valid step to its first; outputs[t] still belongs to xs[t].
    backend:     "auto", "cpu", "eager" or "reference" (the plain Python loop).
    save:        what the forward keeps for the backward: "states", "all" or "auto": all; beyond 256 MB of values that
                 are as wide as matrices some steps of those, the others being made again; beyond 1 GB "states".
    until:       the path of a State (B,) bool that ends a row: it takes no step after the one that set it. The
                 loop ends when every row has; `steps=`, or the sequences, are the limit. Outputs are (T', B, ...),
                 T' the last step that any row took; where a row took none they are as at masked steps. A reset
                 starts a row that has ended again. Of PackedSequences the outputs are as long as those.

    Raises StepError for something that is not a well-formed Step, InputError for an unknown choice.
    """

    _holds_own_states = True  # a Loop inside a Step is an inner sequence: its States are not the outer loop's

    if TYPE_CHECKING:
        # As type checkers see it: torch's own __call__ gives Any.
        def __call__(self, *xs: Any, **arguments: Any) -> tuple[Y, States]: ...

    def __new__(cls, *_: Any, **__: Any) -> Self:
        loop = super().__new__(cls)
        tracked.register(loop)
        return loop

    def __init__(
        self,
        step: _Steps[Y],
        batch_first: bool = False,
        reverse: bool = False,
        backend: str = "auto",
        save: str = "auto",
        until: str | None = None,
    ) -> None:
        super().__init__()
        _check_step(step)
        if until is not None and reverse:
            raise UnsupportedError(
                message(
                    "A loop with reverse=True cannot end by itself: outputs belong to the steps counted from the end.",
                    expected="until= or reverse=True",
                    fix="flip the sequence: sl.Loop(step, until=...)(xs.flip(0))",
                )
            )
        self.step: Any = step
        self.batch_first = batch_first
        self.reverse = reverse
        self.backend = dispatch.checked_backend(backend)
        self.save = dispatch.checked_save(save)
        self.until = until

    __call__ = ends_at_the_call(nn.Module.__call__)

    def forward(self, *xs: Any, **arguments: Any) -> tuple[Y, States]:
        """Run the step over every step of `xs`.

        xs:        tensors or pytrees of tensors, (T, B, ...), or PackedSequences; one per positional
                   argument of the step. With none, `steps=` gives T, and `batch_size=` gives B where
                   nothing else does.
        state:     an sl.States from an earlier call, or a dict from path to tensor (B, ...).
        lengths:   (B,) integers, right padding.  mask: (T, B) bool, True = valid.  Both: AND.
        resets:    (T, B) bool, True = back to the States' own initial values before this step.
        on_masked: outputs at masked steps: "zero", or "repeat" for the last valid output.
        constants: the step's keyword arguments, (B, ...) unless wrapped in `sl.unbatched`.

        Returns (outputs, state): what the step returned, stacked over time; the States after the last valid
        step. `state.steps` (B,) int64 is how many steps each row took in this call.
        Raises InputError, StateError, StepError, UnsupportedError.
        """
        if torch.compiler.is_dynamo_compiling():
            if torch.compiler.is_exporting():
                return Loop._as_one_node(self, xs, arguments)
            return _outside_dynamo(self, xs, arguments)
        return self._run(xs, arguments)

    def _run(self, xs: tuple[Any, ...], arguments: dict[str, Any]) -> tuple[Any, States]:
        torchscript.refuse(self.backend)
        if type(xs) is not tuple:
            torchscript.refuse_proxy(xs)
        with explained(self.step, xs, arguments):
            prepared = self.prepare(*xs, **arguments)
            result = dispatch.run(prepared.program, prepared.call, self.backend, self.save)
            return prepared.finish(result)

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks for of every module."""
        raise torchscript.error()

    @staticmethod
    def _as_one_node(module: Loop[Any] | Step, xs: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
        """A call under torch.export.export(..., strict=True)."""
        from . import strict_export

        return strict_export.call(module, "_run_given", xs, _without_objects(arguments))

    def _run_given(self, *xs: Any, **arguments: Any) -> Any:
        return self._run(xs, _with_objects(arguments))

    @ends_at_the_call
    def last_output(self, *xs: Any, **arguments: Any) -> tuple[Y, States]:
        """As a call, but with each row's output at its last valid step alone: (B, ...), zeros where it has none.

        Last is last in running order: with reverse=True the output that belongs to the row's first valid step.
        (Keras: `return_sequences=False`.)
        """
        outputs, state = self(*xs, **arguments)
        lengths, mask = arguments.get("lengths"), arguments.get("mask")
        return last_of(outputs, lengths, mask, self.reverse, self.batch_first), state

    @ends_at_the_call
    def plan(self, *xs: Any, **arguments: Any) -> Any:
        """The Plan by which a call with these arguments runs; `print(loop.plan(xs))` is a table."""
        return self._planned(dispatch.plan, xs, arguments)

    def _planned(self, made: Callable[..., Any], xs: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
        if not xs and not arguments and signature_of(self.step).required:
            raise InputError(_no_inputs(self.step, made.__name__))
        with explained(self.step, xs, arguments):
            prepared = self.prepare(*xs, **arguments)
            return made(prepared.program, prepared.call, self.backend, self.save)

    @ends_at_the_call
    def profile(self, *xs: Any, **arguments: Any) -> Any:
        """The Plan of a call with these arguments, and what each piece of it takes, forward and backward.

            print(loop.profile(xs))                      # the plan, and a table of times and shares
            loop.profile(xs).save_html("plan.html")      # the same on a page

        The call is run a few times, for about half a second; the times are those of the run in the middle:
        `plan.profile` and `plan.backward.profile` have `.seconds` of the pass and `.pieces` of each part of it.
        Where anything that it reads requires a gradient, the backward pass is run too, for all those gradients. No
        `.grad` is written; random numbers are drawn as in any call.
        """
        return self._planned(dispatch.profile, xs, arguments)

    @ends_at_the_call
    def stream(
        self,
        batch_size: int,
        state: Any = None,
        *,
        on_masked: str = "zero",
        **constants: Any,
    ) -> Stream[Y]:
        """One step at a time: `s = loop.stream(8)`, then `y = s(x)` with x (8, ...). See `sl.Stream`."""
        if torch.compiler.is_dynamo_compiling():
            return _stream_outside_dynamo(self, batch_size, state, on_masked, constants)
        return Stream(self, batch_size, state, on_masked, constants)

    def prepare(
        self,
        *xs: Any,
        state: Any = None,
        lengths: Any = None,
        mask: Any = None,
        resets: Any = None,
        steps: Any = None,
        batch_size: Any = None,
        on_masked: str = "zero",
        **constants: Any,
    ) -> Prepared:
        """Everything checked and flat: what a backend runs, and how its result goes back to the caller."""
        check_on_masked(on_masked)
        xs, constants = self.step.sequences_of(xs, constants)
        packed = None
        if any(isinstance(x, PackedSequence) for x in xs):
            xs = self._time_major(xs)
            xs, lengths, packed = unpack(xs, lengths)
        elif self.batch_first:
            xs = self._time_major(xs)
        tree = survey(self.step)
        arguments, named = take_apart(self.step, tree, xs, constants)
        program = program_of(self.step, tree, arguments)
        rows = arguments.xs, program.x_names
        time, batch = time_and_batch(*rows, self.batch_first)
        sizes = CallSizes(mask, resets, lengths, state, arguments, self.batch_first)
        time = sizes.time(time, steps)
        batch = sizes.batch(batch, batch_size)
        if arguments.constants:
            check_constants(arguments.constants, arguments.constant_batched, arguments.constant_structure, batch)
        if lengths is not None:
            lengths = checked_lengths(lengths, time, batch)
        if mask is not None:
            mask = checked_mask(mask, "mask", time, batch, self.batch_first)
        if resets is not None:
            resets = checked_mask(resets, "resets", time, batch, self.batch_first)
        begun = sizing.begin(program, tree, arguments, named, batch, state, time)
        own, state = begun.own, begun.given
        if begun.tree is not tree:
            tree = begun.tree
            program = program_of(self.step, tree, arguments)
        if state is None:
            initial = require(own, tree.names)
        else:
            initial = given_states(state, tree.names, own, batch)
        ends = None if self.until is None else ending.checked(self.until, tree.names, initial)
        call = Call(
            xs=arguments.xs,
            constants=arguments.constants,
            initial=initial,
            steps=time,
            batch=batch,
            reset_to=None if resets is None else require(own, tree.names),
            lengths=lengths,
            mask=mask,
            resets=resets,
            reverse=self.reverse,
            on_masked=on_masked,
            until=ends,
        )
        check_call(program, call)
        return Prepared(program, call, tree.names, own, self.batch_first, packed)

    def _time_major(self, xs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_turned(x) if not isinstance(x, PackedSequence) else x for x in xs) if self.batch_first else xs

    def extra_repr(self) -> str:
        shown = [f"{name}=True" for name in ("batch_first", "reverse") if getattr(self, name)]
        shown += [f"{name}={getattr(self, name)!r}" for name in ("backend", "save") if getattr(self, name) != "auto"]
        shown += [f"until={self.until!r}"] if self.until is not None else []
        return ", ".join(shown)


def _without_objects(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call as plain containers."""
    plain = {}
    for name, value in arguments.items():
        if isinstance(value, Unbatched):
            plain["unbatched " + name] = value.tree
        elif name == "state" and value is not None:
            plain[name] = dict(value.items())
        else:
            plain[name] = value
    return plain


def _with_objects(plain: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_without_objects`."""
    marked = {n.removeprefix("unbatched "): Unbatched(v) for n, v in plain.items() if n.startswith("unbatched ")}
    return {**{n: v for n, v in plain.items() if not n.startswith("unbatched ")}, **marked}


Step._loop_class = Loop


def _turned(x: Any) -> Any:
    """Batch-major to time-major, in every tensor of a pytree."""
    tensors, structure = flatten(x)
    return unflatten([t.transpose(0, 1) if t.dim() > 1 else t for t in tensors], structure)


def _no_inputs(step: Step, made: str) -> str:
    takes = signature_of(step)
    needed = [*takes.positional, *(f"{n}={n}" for n in sorted(takes.required - set(takes.positional)))]
    return message(
        f"{made}() was called without the inputs of a call: what runs depends on their sizes and dtypes.",
        expected=f"the arguments of a call of the loop; {takes.owner}.step takes {', '.join(needed)}",
        found="no arguments",
        fix=f"loop.{made}({', '.join(needed)}); any numbers will do: torch.randn(T, B, ...)",
    )


def _check_step(step: Any) -> None:
    if not isinstance(step, Step):
        a_class = isinstance(step, type) and issubclass(step, Step)
        fix = "class Cell(sl.Step): ...  or sl.scan(fn, init, xs) for a function"
        if a_class:
            fix = f"sl.Loop({step.__name__}(...))"
        elif isinstance(step, nn.Module) and any(isinstance(child, Loop) for child in step.modules()):
            fix = "it has loops of its own already: call it with the sequences, layer(xs)"
        raise StepError(
            message(
                "sl.Loop takes a Step.",
                expected="an instance of a subclass of sl.Step",
                found=f"the class {step.__name__}" if a_class else describe(step),
                fix=fix,
            )
        )
    kind = type(step)
    if kind.step is Step.step:
        step.step()
    signature_of(step)
    for child in survey(step).begins:
        signature_of(child, "begin")
