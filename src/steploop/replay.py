"""A step whose random numbers are inputs: every way of running it then computes with the same ones.

One step is run to see what it draws. The numbers are drawn for all steps and given to the step as further sequences.
Inside it the k-th draw gives a slice of the k-th sequence. So masks, resets and rows apply to draws as to any input.
Where the distribution depends on the step's values, a standard draw is given, and the arithmetic of torch's own draw
follows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .backends import reference
from .compiler.program import Call, Program, StepOutput

# Draws whose numbers do not depend on the values that they read.
_BY_SHAPE = frozenset(
    "rand randn rand_like randn_like randint randint_like randperm uniform exponential geometric cauchy log_normal "
    "random normal_".split()
)


def _kind(func: Any) -> str:
    """What an operation draws, e.g. "uniform" for `uniform_`."""
    name = func.overloadpacket.__name__
    if name == "native_dropout":  # F.dropout is it or bernoulli_, whether a gradient is wanted or not
        return "bernoulli"
    return name if name == "normal_" else name.rstrip("_")


class Unlike(Exception):
    """A step draws something else than it did when it was recorded, or something that can't be given to it."""


@dataclass(frozen=True)
class Replayed:
    """A call with its random numbers among its sequences."""

    program: Program
    call: Call


def replayed(program: Program, call: Call) -> Replayed | None:
    """The same call with its random numbers drawn now; None where no step runs.

    Raises Unlike, or what the step raises on other rows, where a draw can't be made an input.
    """
    draws = _recorded(program, call)
    if draws is None:
        return None
    numbers = [draw.all_steps(call.steps) for draw in draws]
    names = [f"draw {i}" for i in range(len(draws))]
    given = dataclasses.replace(
        program, run=_Step(program, draws), x_names=[*program.x_names, *names], key=(program.key, *draws)
    )
    cast(_Step, given.run).given = given
    return Replayed(given, dataclasses.replace(call, xs=[*call.xs, *numbers]))


def with_numbers_of(other: Replayed, call: Call) -> Replayed:
    """A call of the same program with the numbers of another."""
    count = len(other.call.xs) - len(call.xs)
    return Replayed(other.program, dataclasses.replace(call, xs=[*call.xs, *other.call.xs[-count:]]))


def _recorded(program: Program, call: Call) -> list[_Draw] | None:
    """What a step draws."""
    if call.steps == 0:
        return None
    found = _record(program, call)
    if call.batch is None:
        return found
    # Which axis is the batch's shows where it has other sizes.
    others = [_record(program, _with_rows(program, call, rows)) for rows in (7, 11)]
    return [draw.with_axis(*alike) for draw, *alike in zip(found, *others, strict=True)]


def _record(program: Program, call: Call) -> list[_Draw]:
    first = dataclasses.replace(
        call, steps=1, xs=[x[:1] for x in call.xs], lengths=None, mask=None, resets=None, reset_to=None
    )
    with torch.no_grad(), _Recording() as recording:
        reference.run(program, first)
    return recording.draws


def _with_rows(program: Program, call: Call, rows: int) -> Call:
    """The call on another number of rows, copies of its own."""
    index = torch.arange(rows, device="cpu") % cast(int, call.batch)
    constants = [
        c[index] if batched else c for c, batched in zip(call.constants, program.constant_batched, strict=True)
    ]
    return dataclasses.replace(
        call, batch=rows, xs=[x[:, index] for x in call.xs], constants=constants,
        initial=[s[index] for s in call.initial],
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Draw:
    """One draw of a step. standard: gives the numbers of one step, of this shape.  axis: that of the batch."""

    kind: str
    standard: Callable[[], Tensor]
    shape: torch.Size
    axis: int = 0

    def with_axis(self, *others: _Draw) -> _Draw:
        """With the axis along which the draws of 7 and of 11 rows have these sizes."""
        seven, eleven = (other.shape for other in others)
        axes = [d for d, sizes in enumerate(zip(seven, eleven, strict=True)) if sizes == (7, 11)]
        rest = [a for d, a in enumerate(seven) if d not in axes]
        if len(axes) != 1 or rest != [b for d, b in enumerate(eleven) if d not in axes]:
            raise Unlike("one axis of what is drawn is not the batch's")
        return dataclasses.replace(self, axis=axes[0])

    def all_steps(self, steps: int) -> Tensor:
        """(T, B, ...), or (T, ...) without a batch."""
        if not self.shape:
            return torch.stack([self.standard() for _ in range(steps)])
        return torch.stack([self.standard().movedim(self.axis, 0) for _ in range(steps)])

    def of_step(self, value: Tensor) -> Tensor:
        """The numbers in the shape that the step asked for."""
        return value.movedim(0, self.axis) if self.shape else value

    @staticmethod
    def of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Draw:
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
        standard = _standard(func, args, kwargs)
        return _Draw(_kind(func), standard, standard().shape)


def _standard(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Tensor]:
    """What gives the numbers that a draw is made of."""
    kind = _kind(func)
    like = next((a for a in args if isinstance(a, Tensor)), None)
    if kind in _BY_SHAPE or like is None:
        return lambda: func(*args, **kwargs).clone()
    if kind == "bernoulli":
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return lambda: torch.rand_like(like, dtype=dtype)
    if kind == "normal":
        shape = torch.broadcast_shapes(*(a.shape for a in args if isinstance(a, Tensor)))
        return lambda: torch.randn(shape, dtype=like.dtype, device=like.device)
    if kind == "multinomial" and (args[1] == 1 or not (len(args) > 2 and args[2])):
        return lambda: torch.empty_like(like).exponential_()
    raise Unlike(f"{func} can't be given its numbers")


class _Draws(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            return self.draw(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class _Recording(_Draws):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no annotations
        self.draws: list[_Draw] = []

    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.draws.append(_Draw.of(func, args, kwargs))
        return func(*args, **kwargs)


class _Answers(_Draws):
    def __init__(self, answers: Iterator[tuple[_Draw, Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no annotations
        self.answers = answers

    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        draw, value = next(self.answers, (None, None))
        if draw is None or draw.kind != _kind(func):
            raise Unlike(f"the step draws {func} where it did not before")
        return _answer(func, args, draw.of_step(cast(Tensor, value)))


def _answer(func: Any, args: tuple[Any, ...], given: Tensor) -> Any:
    """The result of a draw whose standard numbers are given."""
    kind, name = _kind(func), func.overloadpacket.__name__
    if name == "native_dropout":
        return _dropout(*cast("tuple[Tensor, float, bool | None]", args), given)
    if kind == "multinomial":
        scores = args[0] / given
        return scores.argmax(-1, keepdim=True) if args[1] == 1 else scores.topk(args[1]).indices
    if kind == "bernoulli":
        given = (given < _probability(func, args)).to(args[0].dtype)
    elif kind == "normal" and any(isinstance(a, Tensor) for a in args):
        given = args[0] + given * (args[1] if len(args) > 1 else 1.0)
    return args[0].copy_(given) if name.endswith("_") else given


def _probability(func: Any, args: tuple[Any, ...]) -> Any:
    if len(args) > 1:
        return args[1]
    return 0.5 if func is torch.ops.aten.bernoulli_.float else args[0]


def _dropout(x: Tensor, p: float, train: bool | None, given: Tensor) -> tuple[Tensor, Tensor]:
    if train is False:
        return x, torch.ones_like(x, dtype=torch.bool)
    kept = given < 1 - p
    return x * kept * (0.0 if p == 1 else 1 / (1 - p)), kept


class _Step:
    """run(xs, constants, prevs) of a program with its draws behind the xs."""

    def __init__(self, program: Program, draws: list[_Draw]) -> None:
        self.program, self.draws = program, draws
        self.given: Program | None = None

    def __call__(self, xs: Any, constants: Any, prevs: Any) -> StepOutput:
        own = len(xs) - len(self.draws)
        with _Answers(iter(zip(self.draws, xs[own:], strict=True))):
            results = self.program.run(xs[:own], constants, prevs)
        cast(Program, self.given).out_spec = self.program.out_spec
        return results
